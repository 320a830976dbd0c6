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

# The branches of the guided prediction.
FULL = 0  # picture and condition
PICTURE = 1  # the picture alone
NOTHING = 2


def coefficients(text: float | Tensor, image: float | Tensor, n: int) -> Tensor:
    """Return the weight of each branch for n pictures, (3, B), with sum 1; a scale is a number or (B,)."""

    def by_picture(scale: float | Tensor) -> Tensor:
        scales = torch.as_tensor(scale, dtype=torch.float64)
        return scales.expand(n)

    s_t = by_picture(text)
    s_i = by_picture(image)
    return torch.stack([s_t, s_i - s_t, 1 - s_i])


def combine(predictions: Tensor, weights: Tensor) -> Tensor:
    """Return the guided prediction (B, C, H, W) in float32 of the branches (3, B, C, H, W) with weights (3, B)."""
    factors = weights.to(predictions.device, torch.float32)
    per_branch = factors[..., None, None, None]
    weighted = predictions.float() * per_branch
    return weighted.sum(0)


@dataclass(frozen=True)
class DenoiserInputs:
    """The inputs of the denoiser: the latents of the picture `source` (B, 4, h, w), `text` and `null` (B, T, D).

    `at_a_time`: rows that go through the denoiser together; None for all branches of all pictures.
    """

    source: Tensor
    text: Tensor
    null: Tensor
    at_a_time: int | None = None


def predict(
    unet: Any, latents: Tensor, step: Tensor, inputs: DenoiserInputs, weights: Tensor
) -> Tensor:
    """Return the guided prediction (B, C, h, w) for scaled latents; a branch without a weight is not run.

    All branches and pictures are one batch, or as many rows at a time as `inputs` says.
    """
    device = latents.device
    branches, rows = weights.nonzero(as_tuple=True)
    branches = branches.to(device)
    rows = rows.to(device)
    source = inputs.source[rows]
    sees_picture = branches != NOTHING
    factors = sees_picture.to(source.dtype)
    source = source * factors[:, None, None, None]
    has_text = branches == FULL
    context = torch.where(
        has_text[:, None, None],
        inputs.text[rows],
        inputs.null[rows],
    )
    channels = torch.cat([latents[rows], source], dim=1)
    size = inputs.at_a_time or len(rows)
    parts = []
    for part, said in zip(channels.split(size), context.split(size), strict=True):
        found, *_ = unet(part, step, encoder_hidden_states=said, return_dict=False)
        parts.append(found)
    predicted = torch.cat(parts)
    table = predicted.new_zeros(3, *latents.shape)
    table[branches, rows] = predicted
    guided = combine(table, weights)
    return guided.to(latents.dtype)


def denoise(
    unet: Any,
    scheduler: Any,
    inputs: DenoiserInputs,
    weights: Tensor,
    steps: int,
    seeds: Sequence[int],
    tick: Callable[[int], None] = lambda _n: None,
) -> Tensor:
    """Return the latents (B, 4, h, w) of the edited pictures; each depends on its own seed alone.

    Random numbers come from the CPU, so a seed means the same on every device. Raises NotFinite for latents that are
    not finite, naming the step and the first module.
    """
    device, dtype = inputs.source.device, inputs.source.dtype
    shape = inputs.source.shape[1:]
    generators = []
    noise = []
    for seed in seeds:
        generator = Generator().manual_seed(seed)
        generators.append(generator)
        noise.append(torch.randn(shape, generator=generator, dtype=dtype))
    scheduler.set_timesteps(steps, device=device)
    unit_noise = torch.stack(noise).to(device)
    latents: Tensor = unit_noise * scheduler.init_noise_sigma
    random = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        random["generator"] = generators
    for number, step in enumerate(scheduler.timesteps, 1):
        scaled = scheduler.scale_model_input(latents, step)
        run_unet = partial(predict, unet, scaled, step, inputs, weights)
        latents, *_ = scheduler.step(
            run_unet(),
            step,
            latents,
            **random,
            return_dict=False,
        )
        if not all_finite(latents):
            raise not_finite(
                f"the latents of step {number} of {steps}",
                nn.ModuleDict({"unet": unet}),
                run_unet,
            )
        tick(len(seeds))
    return latents.to(dtype)
