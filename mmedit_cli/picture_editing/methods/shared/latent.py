"""Image editors whose denoiser sees the latents of the picture beside the noisy ones; they differ in the condition."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmedit_cli.drawing.models.schedule import check_scheduler, check_steps
from mmedit_cli.errors import ModelError
from mmedit_cli.finite import check_finite
from mmedit_cli.picture_editing.methods.base import (
    Edited,
    ImageEditor,
    Job,
    Settings,
    Tick,
)
from mmedit_cli.picture_editing.methods.shared.sampling import (
    Conditioned,
    coefficients,
    denoise,
)


@dataclass(frozen=True)
class Condition:
    """What instructions became: text and null (B, T, D), and for each picture what is told about it."""

    text: Tensor
    null: Tensor
    notes: Sequence[Edited]


class LatentEditor(ImageEditor):
    """An InstructPix2Pix denoiser: the first convolution takes noisy latents and those of the picture (8 channels).

    The latents of the picture are the mode of its distribution without the scaling factor (Brooks et al. 2023).
    """

    defaults = Settings(steps=100, text_guidance=7.5, image_guidance=1.5)

    reading: nn.Module  # what makes the conditions, by name

    def __init__(
        self, model: str, fingerprint: str, pipeline: Any, usual: Settings | None = None
    ) -> None:
        self.model, self.fingerprint = model, fingerprint
        self.vae, self.unet, self.scheduler = (
            pipeline.vae,
            pipeline.unet,
            pipeline.scheduler,
        )
        self.defaults = (usual or Settings()).over(type(self).defaults)
        check_scheduler(self.scheduler, model)
        channels = 2 * self.vae.config.latent_channels
        if self.unet.config.in_channels != channels:
            raise ModelError(
                f"{model}: a denoiser of {self.unet.config.in_channels} channels, an image editor's has {channels}",
                "it is a text-to-image model; name one trained as InstructPix2Pix",
            )

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.unet.device  # type: ignore[no-any-return]

    @property
    def multiple(self) -> int:
        """Pixels to a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)  # type: ignore[no-any-return]

    @property
    def resolution(self) -> int:
        """The side the denoiser was made for."""
        size = self.unet.config.sample_size
        if not isinstance(size, int):
            raise ModelError(
                f"{self.model}: its unet/config.json has no sample_size, so the side it was made for is not known",
                "give --resolution, e.g. 512",
            )
        return size * self.multiple

    def check_steps(self, steps: int) -> None:
        """Raise DataError unless the sampler can make so many steps."""
        check_steps(self.scheduler, steps)

    @abstractmethod
    def conditions(self, jobs: Sequence[Job]) -> Condition:
        """Return what the instructions of some pictures become; raise DataError for one that cannot be read."""

    def edit_batch(
        self, jobs: Sequence[Job], settings: Settings, tick: Tick
    ) -> list[Edited]:
        """Edit pictures of one size, with one pass a step over the branches of guidance that count."""
        condition = self.conditions(jobs)
        what = f"{self.model}: what the instructions became"
        check_finite(condition.text, what, self.reading, lambda: self.conditions(jobs))
        told = Conditioned(
            encode_pictures(self.vae, [job.picture for job in jobs]),
            condition.text,
            condition.null,
        )
        weights = coefficients(
            settings.text_guidance or 0.0, settings.image_guidance or 0.0, len(jobs)
        )
        steps = settings.steps or 1
        latents = denoise(
            self.unet,
            self.scheduler,
            told,
            weights,
            steps,
            [job.seed for job in jobs],
            tick,
        )
        pictures = decode_latents(self.vae, latents)
        rows = int(weights[:, 0].count_nonzero()) * len(self.scheduler.timesteps)
        return [
            Edited(picture, note.expressive, note.source, rows, note.warnings)
            for picture, note in zip(pictures, condition.notes, strict=True)
        ]


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Return RGB pictures of one size as (B, 3, H, W) in -1..1."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Return (B, 3, H, W) in -1..1 as RGB pictures."""
    bytes_ = (
        ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )
    return [Image.fromarray(array) for array in bytes_]


def encode_pictures(vae: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Return the latents of pictures as a denoiser sees them beside the noise: the mode, not scaled, (B, 4, h, w)."""
    pixels = to_pixels(pictures).to(vae.device, vae.dtype)
    latents: Tensor = vae.encode(pixels).latent_dist.mode()
    check_finite(
        latents,
        "the latents of the picture",
        nn.ModuleDict({"vae": vae}),
        lambda: vae.encode(pixels),
    )
    return latents


def decode_latents(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Return the pictures of scaled latents (B, 4, h, w)."""
    unscaled = latents.to(vae.dtype) / vae.config.scaling_factor
    pixels = vae.decode(unscaled).sample
    check_finite(
        pixels,
        "the edited pictures",
        nn.ModuleDict({"vae": vae}),
        lambda: vae.decode(unscaled),
    )
    return to_pictures(pixels)
