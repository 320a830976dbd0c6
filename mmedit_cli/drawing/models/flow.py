"""Stable Diffusion 3.x and FLUX through diffusers: transformers that predict the flow from noise to a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from mmedit_cli.drawing.models.canvas import GRID
from mmedit_cli.drawing.models.prompts import Tokens
from mmedit_cli.drawing.models.stable_diffusion import (
    Encoding,
    Projection,
    StableDiffusion,
)
from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.finite import check_finite

_PATCH = 2  # latents along an edge of what the transformers see as one token
_T5_OF_SD3 = 256  # tokens that the pipeline of Stable Diffusion 3 reads of a prompt, and it pads to them
_TEXT = "context_embedder"  # the projection that all of the text passes through


class FlowModel(StableDiffusion):
    """A pipeline of Stable Diffusion 3.x or FLUX with frozen weights; its denoiser is a transformer.

    Text and picture attend to each other in one sequence, so there are no projections of a cross attention: what
    closed forms change is the one through which all encodings of the text come in. `words` have no learned vectors.
    """

    denoiser = "transformer"
    in_windows = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_xl = False
        self.is_flux = "Flux" in type(self.pipe).__name__
        self.guidance = 3.5 if self.is_flux else 7.0
        if not self.is_flux and len(self.tokenizers) > 2:
            t5 = self.tokenizers[-1]
            t5.model_max_length = min(t5.model_max_length, _T5_OF_SD3)

    # -- what it is made of -------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """D, the width of a token's encoding."""
        return int(self.unet.config.joint_attention_dim)

    @property
    def resolution(self) -> int:
        """The native height and width in pixels."""
        return int(self.pipe.default_sample_size) * self.scale

    @property
    def grid(self) -> int:
        """Of how many pixels a picture's height and width are multiples."""
        return math.lcm(GRID, _PATCH * self.scale)

    @property
    def has_pooled(self) -> bool:
        """Whether the pipeline is given a pooled encoding of the prompt."""
        return True

    def cross_attention(self) -> list[Projection]:
        """Return the projection through which the encodings of the text come in, as one of values."""
        weight = getattr(self.unet, _TEXT).weight
        return [Projection(f"{self.denoiser}.{_TEXT}", "v", weight.shape[0])]

    def spellings(self) -> list[tuple[int, int]]:
        """Return (index of a tokenizer, row of an encoding where its tokens begin) for all rows of an encoding."""
        t5 = len(self.tokenizers) - 1
        if self.is_flux:
            return [(t5, 0)]
        found = [(0, 0)]
        if t5 > 1:
            found.append((t5, self.max_length))
        return found

    # -- prompts ------------------------------------------------------------------------------------------------

    def encode(self, tokens: Tokens, *, plain: bool = False) -> Encoding:
        """Run the text encoders; raise ModelError for prompts with words that have learned vectors."""
        learned = [token for token, places in tokens.places.items() if places.any()]
        if learned:
            raise ModelError(
                f"{self.name}: {learned[0]} has learned embeddings, which Stable Diffusion 1.x, 2.x and XL read",
                "dreambooth-lora and multi-melo-diffusion name a thing by plain words",
            )
        ids = [rows.to(self.device) for rows in tokens.ids]
        with ExitStack() as stack:
            stack.enter_context(self.running(tokens))
            return self._of_flux(ids) if self.is_flux else self._of_sd3(ids)

    def _of_flux(self, ids: Sequence[Tensor]) -> Encoding:
        """Return the encodings of T5, and the pooled one of CLIP."""
        clip, t5 = self.text_encoders
        pooled = clip(ids[0]).pooler_output
        return Encoding(t5(ids[1]).last_hidden_state, pooled)

    def _of_sd3(self, ids: Sequence[Tensor]) -> Encoding:
        """Return the encodings of both CLIPs side by side, and behind them those of T5; zeros where it is left out."""
        hidden = []
        pooled = []
        for encoder, its_ids in zip(self.text_encoders[:2], ids, strict=False):
            out = encoder(its_ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        clip = torch.cat(hidden, -1)
        missing = self.width - clip.shape[-1]
        clip = F.pad(clip, (0, missing))
        if len(ids) > 2:
            t5 = self.text_encoders[2](ids[2]).last_hidden_state
        else:
            t5 = clip.new_zeros(len(clip), _T5_OF_SD3, self.width)
        both = torch.cat([clip, t5], 1)
        return Encoding(both, torch.cat(pooled, -1))

    def encode_ids(self, ids: Sequence[Tensor]) -> Tensor:
        """Raise ModelError: there is no encoding of one token by all encoders."""
        raise ModelError(
            f"{self.name}: its encoders do not read the same tokens",
            "perfusion and covariances are for Stable Diffusion 1.x, 2.x and XL",
        )

    # -- pictures -----------------------------------------------------------------------------------------------

    def errors(self, latents: Tensor, encoding: Encoding, source: Generator) -> Tensor:
        """Return the squared errors (B, C, h, w) of the predicted flow, at times from a logit-normal distribution.

        Rectified flow (Esser et al. 2024, section 3.1): x_s = (1 - s) x + s e, and the target is e - x.
        """
        noise = torch.randn(latents.shape, generator=source).to(latents)
        sigmas = self._levels(len(latents), source)
        on_device = sigmas.to(latents)
        levels = on_device[:, None, None, None]
        # x + s (e - x)
        noisy = torch.lerp(latents, noise, levels)

        def predict() -> Tensor:
            return self._predict(noisy.to(self.dtype), sigmas, encoding)

        predicted = predict()
        what = f"{self.name}: the predicted flow"
        check_finite(predicted, what, self.model, predict)
        target = (noise - latents).float()
        difference = predicted.float() - target
        return difference.square()

    def _levels(self, count: int, source: Generator) -> Tensor:
        """Return random noise levels (count,) between 0 and 1, shifted as the scheduler shifts its own."""
        drawn = torch.randn(count, generator=source)
        levels = drawn.sigmoid()
        config = self.pipe.scheduler.config
        shift = float(config.get("shift", 1.0))
        below = 1 + (shift - 1) * levels
        return shift * levels / below

    def _predict(self, noisy: Tensor, sigmas: Tensor, encoding: Encoding) -> Tensor:
        """Return the flow (B, C, h, w) at noise levels (B,)."""
        given = {
            "encoder_hidden_states": encoding.hidden,
            "pooled_projections": encoding.pooled,
            "return_dict": False,
        }
        times = sigmas.to(noisy)
        if not self.is_flux:
            scale = self.pipe.scheduler.config.num_train_timesteps
            (flow,) = self.unet(noisy, timestep=times * scale, **given)
            return cast(Tensor, flow)
        _, _, height, width = noisy.shape
        if self.unet.config.guidance_embeds:
            # what FLUX was distilled to is trained at no guidance (as diffusers' example does)
            given["guidance"] = torch.ones_like(times)
        length = encoding.hidden.shape[1]
        (flow,) = self.unet(
            packed(noisy),
            timestep=times,
            img_ids=places(height, width).to(noisy),
            txt_ids=torch.zeros(length, 3).to(noisy),
            **given,
        )
        return unpacked(flow, height, width)

    def check_sampling(self, steps: int) -> None:
        """Raise DataError unless the scheduler can make so many steps."""
        most = int(self.pipe.scheduler.config.num_train_timesteps)
        if not 1 <= steps <= most:
            raise DataError(f"--steps {steps}: made for 1 to {most}", "28 are usual")

    def _is_guided(self, scale: float) -> bool:
        """FLUX reads its guidance as a number; there are no rows without a prompt."""
        return scale > 1 and not self.is_flux


def packed(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as tokens (B, h/2 * w/2, 4C) of four neighbours, as FLUX reads them."""
    pair = (-1, _PATCH)
    columns = latents.unflatten(3, pair)
    squares = columns.unflatten(2, pair)
    # (B, rows, columns, C, 2, 2)
    ordered = squares.permute(0, 2, 4, 1, 3, 5)
    tokens = ordered.flatten(3)
    flat: Tensor = tokens.flatten(1, 2)
    return flat


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the latents (B, C, h, w) of tokens (B, h/2 * w/2, 4C)."""
    size = (height // _PATCH, width // _PATCH)
    grid = tokens.unflatten(1, size)
    squares = grid.unflatten(3, (-1, _PATCH, _PATCH))
    # (B, C, rows, 2, columns, 2)
    ordered = squares.permute(0, 3, 1, 4, 2, 5)
    columns = ordered.flatten(4)
    latents: Tensor = columns.flatten(2, 3)
    return latents


def places(height: int, width: int) -> Tensor:
    """Return (0, row, column) of every token of latents of this size: (h/2 * w/2, 3)."""
    rows = torch.arange(height // _PATCH)
    columns = torch.arange(width // _PATCH)
    pairs = torch.cartesian_prod(rows, columns)
    return F.pad(pairs, (1, 0)).float()
