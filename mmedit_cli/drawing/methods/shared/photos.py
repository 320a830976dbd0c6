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

_SEGMENT_SIZE = 352  # pixels, what CLIPSeg was trained on
_MEAN = (0.485, 0.456, 0.406)  # of ImageNet
_STD = (0.229, 0.224, 0.225)


class Photos:
    """The P photos of a concept as latents (P, 2, C, h, w), with mean and deviation; index 1 of 2 is mirrored.

    `masks` (P, 2, 1, h, w) in 0..1 show where the concept is; None means everywhere.
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
        means = []
        deviations = []
        for pair in _with_mirrored(pixels):  # one photo at a time: little memory
            mean, deviation = model.latents(pair)
            means.append(mean)
            deviations.append(deviation)
        self.mean = torch.stack(means)
        self.deviation = torch.stack(deviations)
        self.masks: Tensor | None = None
        if masks is not None:
            small = F.interpolate(
                masks[:, None].float(),
                self.mean.shape[-2:],
                mode="bilinear",
                align_corners=False,
            )
            self.masks = _with_mirrored(small).to(self.mean.device)

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, count: int, source: Generator) -> tuple[Tensor, Tensor | None]:
        """Return (latents, masks) of photos chosen at random: (count, C, h, w) and (count, 1, h, w) or None."""
        chosen = torch.randint(0, len(self), (count,), generator=source)
        return self.at(chosen, source)

    def at(self, chosen: Tensor, source: Generator) -> tuple[Tensor, Tensor | None]:
        """Return (latents, masks) as `sample` does, of the photos with these indices (count,)."""
        device = self.mean.device
        count = len(chosen)
        mirrored = torch.rand(count, generator=source) < self.flip
        noise = torch.randn(
            count,
            *self.mean.shape[2:],
            generator=source,
        )
        index = (
            chosen.to(device),
            mirrored.long().to(device),
        )
        mean = self.mean[index]
        deviation = self.deviation[index]
        # A sample of the VAE's normal distribution.
        latents = mean + deviation * noise.to(mean)
        masks = None if self.masks is None else self.masks[index]
        return latents, masks


def masked_loss(errors: Tensor, masks: Tensor | None, power: int = 1) -> Tensor:
    """Return the mean of squared errors (B, C, h, w), weighted by masks (B, 1, h, w) if there are any."""
    if masks is None:
        return errors.mean()
    weighted = errors * masks.pow(power)
    return weighted.mean()


def open_squares(
    images: Sequence[Path], size: int, *, crop: bool = True, background: str = "#ffffff"
) -> list[Image.Image]:
    """Return the pictures as squares of `size` pixels, cropped around the middle or squeezed.

    Transparent parts get the background. Raises DataError naming every bad picture.
    """
    squares: list[Image.Image] = []
    problems: list[str] = []
    for path in images:
        try:
            picture = load_picture(Picture(path, background))
        except MmeditError as error:
            problems += error.problems
            continue
        if crop:
            square = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        else:
            square = picture.resize((size, size), Image.Resampling.BICUBIC)
        squares.append(square)
    if problems:
        raise DataError(
            problems, "replace the pictures, or take them out of the folder"
        )
    return squares


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two squares at half their size beside each other.

    The space above and below each has the median colour of its upper and lower edge.
    """
    width, height = left.size
    half_width = width // 2
    scene = Image.new("RGB", left.size)
    for i, picture in enumerate((left, right)):
        edges = np.asarray(picture)[[0, -1]]
        median = np.median(edges.reshape(-1, 3), 0)
        padded = ImageOps.pad(
            picture,
            (half_width, height),
            Image.Resampling.BICUBIC,
            color=tuple(int(value) for value in median),
        )
        scene.paste(padded, (i * half_width, 0))
    return scene


class MaskOptions(NamedTuple):
    """Where masks come from: `kind` is none, file (masks/NAME.png beside a photo) or clipseg, with its `model`."""

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
        masks = _masks_of_files(images, squares[0].width, options.crop)
    else:
        masks = _segment(options, squares, superclass, device)
    return normalized(masks)


def _masks_of_files(images: Sequence[Path], size: int, crop: bool) -> Tensor:
    files = [path.parent / "masks" / f"{path.stem}.png" for path in images]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise DataError(
            [f"{path}: no such mask" for path in missing],
            "or learn with --set mask=none",
        )
    masks = []
    for square in open_squares(files, size, crop=crop):
        grey = np.asarray(square.convert("L"))
        masks.append(torch.from_numpy(grey / 255.0))
    return torch.stack(masks)


def normalized(masks: Tensor) -> Tensor:
    """Return masks (P, H, W), each divided by its own largest value; an empty one stays empty."""
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

    folder = Path(options.model)
    if not folder.is_dir():
        folder = hub_folder(options.model, None)
    with loading(folder):
        segmenter: Any = CLIPSegForImageSegmentation.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    segmenter.to(device).eval()
    prompts = [template.format(superclass) for template in options.templates]
    words = tokenizer(
        prompts,
        padding=True,
        truncation=True,
        return_tensors="pt",
    ).to(device)
    size = min(_SEGMENT_SIZE, 2 * segmenter.config.vision_config.image_size)
    mean = torch.tensor(_MEAN).view(3, 1, 1)
    std = torch.tensor(_STD).view(3, 1, 1)
    masks = []
    for square in squares:
        resized = square.resize((size, size), Image.Resampling.BILINEAR)
        pixels = (_pixels(resized) / 2 + 0.5 - mean) / std
        repeated = pixels.expand(len(prompts), -1, -1, -1)
        output = segmenter(pixel_values=repeated.to(device), **words)
        by_prompt = output.logits.view(len(prompts), size, size)
        masks.append(by_prompt.sigmoid().mean(0).cpu())
    return torch.stack(masks)


def _pixels(picture: Image.Image) -> Tensor:
    """Return a picture as (3, H, W) in -1..1."""
    values = np.asarray(picture, dtype=np.float32)
    scaled = torch.from_numpy(values / 127.5 - 1.0)
    return scaled.permute(2, 0, 1)


def _with_mirrored(pictures: Tensor) -> Tensor:
    """Return pictures (P, C, H, W) with their mirror images behind them, (P, 2, C, H, W)."""
    mirrored = pictures.flip(-1)
    return torch.stack([pictures, mirrored], 1)
