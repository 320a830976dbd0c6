"""Photos of a concept as latents: encoded once, as they are and mirrored, with soft masks of the concept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor
from torch.nn import functional as F

from mmedit_cli.catalog import hub_folder
from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion
from mmedit_cli.errors import DataError, MmeditError
from mmedit_cli.model_folder import loading
from mmedit_cli.pictures import Picture, load_picture

_SEGMENT_SIDE = 352  # pixels, what CLIPSeg was trained on
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Photos:
    """The photos of a concept, P of them: latents (P, 2, C, h, w) as mean and deviation, mirrored in the second place.

    `masks` (P, 2, 1, h, w) in 0..1 say where the concept is; None: everywhere.
    """

    def __init__(
        self,
        model: StableDiffusion,
        pictures: Sequence[Image.Image],
        masks: Tensor | None = None,
        flip: float = 0.5,
    ) -> None:
        self.flip = flip
        pixels = torch.stack([_pixels(picture) for picture in pictures])
        both = torch.stack([pixels, pixels.flip(-1)], 1)
        parts = [
            model.latents(some) for some in both
        ]  # one photo at a time: little memory
        self.mean, self.deviation = (
            torch.stack(some) for some in zip(*parts, strict=True)
        )
        self.masks = None
        if masks is not None:
            small = F.interpolate(
                masks[:, None].float(),
                self.mean.shape[-2:],
                mode="bilinear",
                align_corners=False,
            )
            self.masks = torch.stack([small, small.flip(-1)], 1).to(self.mean.device)

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, count: int, source: Generator) -> tuple[Tensor, Tensor | None]:
        """Return (latents, masks) of photos drawn at random: (count, C, h, w) and (count, 1, h, w) or None."""
        return self.at(torch.randint(0, len(self), (count,), generator=source), source)

    def at(self, which: Tensor, source: Generator) -> tuple[Tensor, Tensor | None]:
        """Return what `sample` does, of given photos (count,)."""
        side = (torch.rand(len(which), generator=source) < self.flip).long()
        noise = torch.randn(len(which), *self.mean.shape[2:], generator=source).to(
            self.mean
        )
        which, side = which.to(self.mean.device), side.to(self.mean.device)
        latents = self.mean[which, side] + self.deviation[which, side] * noise
        return latents, None if self.masks is None else self.masks[which, side]


def masked_loss(errors: Tensor, masks: Tensor | None, power: int = 1) -> Tensor:
    """Return the mean of squared errors (B, C, h, w), weighted by masks (B, 1, h, w) if there are any."""
    return errors.mean() if masks is None else (errors * masks.pow(power)).mean()


def open_squares(
    images: Sequence[Path], side: int, *, crop: bool = True, background: str = "#ffffff"
) -> list[Image.Image]:
    """Return the pictures as squares, cut around the middle or squeezed, on a background where they are transparent.

    Raises DataError naming every bad one.
    """
    squares, problems = [], []
    for path in images:
        try:
            picture = load_picture(Picture(path, background))
        except MmeditError as error:
            problems += error.problems
            continue
        fit = ImageOps.fit if crop else Image.Image.resize
        squares.append(fit(picture, (side, side), Image.Resampling.BICUBIC))
    if problems:
        raise DataError(
            problems, "replace the pictures, or take them out of the folder"
        )
    return squares


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two squares in half their size beside each other; above and below each goes on in its edge's colour."""
    width, height = left.size
    scene = Image.new("RGB", left.size)
    for i, picture in enumerate((left, right)):
        edge = np.asarray(picture)[[0, -1]].reshape(-1, 3)
        colour = tuple(int(value) for value in np.median(edge, 0))
        half = ImageOps.pad(
            picture, (width // 2, height), Image.Resampling.BICUBIC, colour
        )
        scene.paste(half, (i * (width // 2), 0))
    return scene


class MaskOptions(NamedTuple):
    """Where masks come from: `kind` none, file (masks/NAME.png beside a photo) or clipseg; `model` for clipseg."""

    kind: str
    model: str
    templates: tuple[str, ...]
    crop: bool = True


def masks_of(
    options: MaskOptions,
    images: Sequence[Path],
    squares: Sequence[Image.Image],
    superclass: str,
    device: torch.device,
) -> Tensor | None:
    """Return soft masks (P, H, W), the largest value of each 1; None for kind none.

    Raises DataError for a mask that is missing, ModelError if there is no model that makes them.
    """
    if options.kind == "none":
        return None
    if options.kind == "file":
        files = [path.parent / "masks" / f"{path.stem}.png" for path in images]
        if missing := [path for path in files if not path.is_file()]:
            raise DataError(
                [f"{path}: no such mask" for path in missing],
                "or learn with --set mask=none",
            )
        cut = open_squares(files, squares[0].width, crop=options.crop)
        masks = torch.stack(
            [torch.from_numpy(np.asarray(mask.convert("L")) / 255.0) for mask in cut]
        )
    else:
        masks = _segment(options, squares, superclass, device)
    return normalized(masks)


def normalized(masks: Tensor) -> Tensor:
    """Return masks (P, H, W) divided by their largest value, each by its own; an empty one stays empty."""
    largest = masks.amax((1, 2), keepdim=True)
    return masks / torch.where(largest > 0, largest, 1.0)


@torch.no_grad()
def _segment(
    options: MaskOptions,
    squares: Sequence[Image.Image],
    superclass: str,
    device: torch.device,
) -> Tensor:
    """Ask CLIPSeg where the superclass is, in the words of every template (Lüddecke and Ecker 2022)."""
    from transformers import AutoTokenizer, CLIPSegForImageSegmentation

    folder = (
        Path(options.model)
        if Path(options.model).is_dir()
        else hub_folder(options.model, None)
    )
    with loading(folder):
        segmenter: Any = CLIPSegForImageSegmentation.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    segmenter.to(device).eval()
    prompts = [template.format(superclass) for template in options.templates]
    words = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(
        device
    )
    side = min(_SEGMENT_SIDE, 2 * segmenter.config.vision_config.image_size)
    mean, std = (torch.tensor(some).view(3, 1, 1) for some in (_MEAN, _STD))
    masks = []
    for square in squares:
        pixels = (
            _pixels(square.resize((side, side), Image.Resampling.BILINEAR)) / 2
            + 0.5
            - mean
        ) / std
        logits = segmenter(
            pixel_values=pixels.expand(len(prompts), -1, -1, -1).to(device), **words
        ).logits
        masks.append(logits.view(len(prompts), side, side).sigmoid().mean(0).cpu())
    return torch.stack(masks)


def _pixels(picture: Image.Image) -> Tensor:
    """Return a picture as (3, H, W) in -1..1."""
    return torch.from_numpy(
        np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
    ).permute(2, 0, 1)
