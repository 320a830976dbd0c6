"""Denoising under two guidance scales (InstructPix2Pix, Brooks et al. 2023, equation 3), in coefficient form.

    s_T eps(z, v, c) + (s_I - s_T) eps(z, v, 0) + (1 - s_I) eps(z, 0, 0)

z: noisy latents; v: latents of the picture; c: the condition. It is the published sum with equal terms collected, so a
branch whose coefficient is 0 is never run, and every pair of scales counts, also below 1, where the pipeline of
diffusers drops both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.finite import all_finite, not_finite

FULL, PICTURE, NOTHING = range(
    3
)  # the branches: picture and condition, picture alone, neither


def coefficients(text: float | Tensor, image: float | Tensor, n: int) -> Tensor:
    """Return the weight of each branch for n pictures, (3, B); a scale is one for all or (B,). They sum to 1."""
    s_t, s_i = (
        torch.as_tensor(scale, dtype=torch.float64).expand(n) for scale in (text, image)
    )
    return torch.stack([s_t, s_i - s_t, 1 - s_i])


def combine(predictions: Tensor, weights: Tensor) -> Tensor:
    """Return the guided prediction (B, C, H, W) in float32 of the branches (3, B, C, H, W) with weights (3, B)."""
    return (
        predictions.float()
        * weights.to(predictions.device, torch.float32)[..., None, None, None]
    ).sum(0)


@dataclass(frozen=True)
class Conditioned:
    """What the denoiser is told: source (B, 4, h, w), the latents of the picture; text and null (B, T, D)."""

    source: Tensor
    text: Tensor
    null: Tensor


def predict(
    unet: Any, latents: Tensor, step: Tensor, told: Conditioned, weights: Tensor
) -> Tensor:
    """Return the guided prediction (B, C, h, w) for scaled latents, with one pass over the branches that count."""
    branch, row = (index.to(latents.device) for index in weights.nonzero(as_tuple=True))
    seen = (branch != NOTHING).to(told.source.dtype)[:, None, None, None]
    inputs = torch.cat([latents[row], told.source[row] * seen], dim=1)
    context = torch.where(
        (branch == FULL)[:, None, None], told.text[row], told.null[row]
    )
    predicted = unet(inputs, step, encoder_hidden_states=context, return_dict=False)[0]
    table = predicted.new_zeros(3, *latents.shape)
    table[branch, row] = predicted
    return combine(table, weights).to(latents.dtype)


def denoise(
    unet: Any,
    scheduler: Any,
    told: Conditioned,
    weights: Tensor,
    steps: int,
    seeds: Sequence[int],
    tick: Callable[[int], None] = lambda _n: None,
) -> Tensor:
    """Return the latents (B, 4, h, w) of the edited pictures; each depends on its own seed alone.

    Randomness comes from the CPU, so a seed means the same on every device. Raises NotFinite for latents that are not
    finite, with the step and the first module.
    """
    generators = [Generator().manual_seed(seed) for seed in seeds]
    device, dtype = told.source.device, told.source.dtype
    noise = [
        torch.randn(told.source.shape[1:], generator=generator, dtype=dtype)
        for generator in generators
    ]
    scheduler.set_timesteps(steps, device=device)
    latents = torch.stack(noise).to(device) * scheduler.init_noise_sigma
    random = (
        {"generator": generators}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for number, step in enumerate(scheduler.timesteps, 1):
        guess = partial(
            predict,
            unet,
            scheduler.scale_model_input(latents, step),
            step,
            told,
            weights,
        )
        latents = scheduler.step(guess(), step, latents, **random, return_dict=False)[0]
        if not all_finite(latents):
            raise not_finite(
                f"the latents of step {number} of {steps}",
                nn.ModuleDict({"unet": unet}),
                guess,
            )
        tick(len(seeds))
    return latents.to(dtype)
