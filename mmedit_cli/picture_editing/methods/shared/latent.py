"""Image editors whose denoiser sees the latents of the picture beside the noisy ones; they differ in the condition."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmedit_cli.drawing.models.schedule import check_scheduler, check_steps
from mmedit_cli.errors import ModelError
from mmedit_cli.finite import check_finite
from mmedit_cli.picture_editing.methods.base import (
    EditedPicture,
    EditJob,
    EditSettings,
    ImageEditor,
    Tick,
)
from mmedit_cli.picture_editing.methods.shared.sampling import (
    DenoiserInputs,
    coefficients,
    denoise,
)


@dataclass(frozen=True)
class LatentCondition:
    """The conditions of B instructions, `text` and `null` (B, T, D), and a note with expressive text and warnings."""

    text: Tensor
    null: Tensor
    notes: Sequence[EditedPicture]


class LatentEditor(ImageEditor):
    """An InstructPix2Pix denoiser: the first convolution takes noisy latents and those of the picture (8 channels).

    The latents of the picture are the mode of its distribution without the scaling factor (Brooks et al. 2023).
    `reading` are the modules that make the conditions, by name.
    """

    defaults = EditSettings(steps=100, text_guidance=7.5, image_guidance=1.5)
    reading: nn.Module
    at_a_time: int | None = None  # rows of the denoiser in one pass

    def __init__(
        self,
        model: str,
        fingerprint: str,
        pipeline: Any,
        usual: EditSettings | None = None,
    ) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.vae = pipeline.vae
        self.unet = pipeline.unet
        self.scheduler = pipeline.scheduler
        self.defaults = (usual or EditSettings()).over(type(self).defaults)
        check_scheduler(self.scheduler, model)
        found = self.unet.config.in_channels
        channels = 2 * self.vae.config.latent_channels
        if found != channels:
            raise ModelError(
                f"{model}: a denoiser of {found} channels, an image editor's has {channels}",
                "it is a text-to-image model; name one trained as InstructPix2Pix",
            )

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = self.unet.device
        return device

    @property
    def multiple(self) -> int:
        """Pixels to a latent."""
        levels = len(self.vae.config.block_out_channels)
        return 1 << (levels - 1)

    @property
    def resolution(self) -> int:
        """The width and height in pixels that the denoiser was made for."""
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

    def save_memory(self) -> None:
        """Run the branches of guidance one after another, and encode and decode pictures one by one."""
        self.at_a_time = 1
        self.vae.enable_slicing()

    @abstractmethod
    def conditions(self, jobs: Sequence[EditJob]) -> LatentCondition:
        """Return the conditions of some jobs; raise DataError for an instruction that cannot be read."""

    def edit_batch(
        self, jobs: Sequence[EditJob], settings: EditSettings, tick: Tick
    ) -> list[EditedPicture]:
        """Edit pictures of one size, with one pass for each step over the branches of guidance with a weight."""
        condition = self.conditions(jobs)
        what = f"{self.model}: what the instructions became"
        check_finite(condition.text, what, self.reading, lambda: self.conditions(jobs))
        inputs = DenoiserInputs(
            source=encode_pictures(self.vae, [job.picture for job in jobs]),
            text=condition.text,
            null=condition.null,
            at_a_time=self.at_a_time,
        )
        weights = coefficients(
            settings.text_guidance or 0.0,
            settings.image_guidance or 0.0,
            len(jobs),
        )
        latents = denoise(
            self.unet,
            self.scheduler,
            inputs,
            weights,
            settings.steps or 1,
            [job.seed for job in jobs],
            tick,
        )
        pictures = decode_latents(self.vae, latents)
        branches = int(weights[:, 0].count_nonzero())
        rows = branches * len(self.scheduler.timesteps)
        results = []
        for picture, note in zip(pictures, condition.notes, strict=True):
            results.append(replace(note, picture=picture, rows=rows))
        return results


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Return RGB pictures of one size as (B, 3, H, W) in -1..1."""
    arrays = [np.asarray(picture) for picture in pictures]
    channels_last = torch.from_numpy(np.stack(arrays))
    pixels = channels_last.permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Return (B, 3, H, W) in -1..1 as RGB pictures."""
    shares = pixels.float() / 2 + 0.5
    scaled = shares.clamp(0, 1) * 255
    values = scaled.round().byte()
    channels_last = values.permute(0, 2, 3, 1)
    arrays = channels_last.cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def encode_pictures(vae: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Return the latents (B, 4, h, w) of pictures as the denoiser sees them beside the noise: the mode, not scaled."""
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
