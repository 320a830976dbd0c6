"""Scores of edited pictures as pure functions; pictures are (3, H, W) in 0 .. 1, encodings (D,).

o is the output, g the goal, v the picture that was edited. A score that needs an encoder carries its name: a CLIP-I of
one is not comparable to that of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, cosine_similarity, normalize

from mmedit_cli.knowledge.models.base import VisionLanguageModel

UNCHANGED = 4 / 255  # pixels of source and goal that differ less should stay
_NO_CHANGE = 1e-6  # a change of an encoding that is shorter is rounding
SMALLEST = 11  # pixels: the window of SSIM
_SIGMA = 1.5
_K1 = 0.01
_K2 = 0.03
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def pixels(picture: Image.Image, like: Image.Image | None = None) -> Tensor:
    """Return an RGB picture as (3, H, W) in 0 .. 1, resized to the size of `like` first (bicubic)."""
    if like is not None and picture.size != like.size:
        picture = picture.resize(
            like.size,
            Image.Resampling.BICUBIC,
        )
    values = np.array(picture.convert("RGB"))
    channels_first = torch.from_numpy(values).permute(2, 0, 1)
    return channels_first.float() / 255


def l1(o: Tensor, g: Tensor) -> float:
    """Return the mean absolute difference over pixels and channels."""
    return float((o - g).abs().mean())


def l2(o: Tensor, g: Tensor) -> float:
    """Return the mean squared difference over pixels and channels: what MagicBrush calls L2, without a root."""
    return float((o - g).square().mean())


def ssim(o: Tensor, g: Tensor) -> float:
    """Return the structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, mean of channels.

    Raises ValueError for pictures smaller than the window.
    """
    size = tuple(o.shape[1:])
    if min(size) < SMALLEST:
        raise ValueError(
            f"SSIM needs pictures of {SMALLEST} pixels at least, not {size}"
        )
    window = _gaussian_window()

    def mean(x: Tensor) -> Tensor:
        return conv2d(x[:, None], window)[:, 0]

    x = o.double()
    y = g.double()
    mean_x = mean(x)
    mean_y = mean(y)
    variance_x = mean(x * x) - mean_x * mean_x
    variance_y = mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    c1 = _K1**2
    c2 = _K2**2
    # Wang et al. 2004, equation 13
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    luminance = mean_x * mean_x + mean_y * mean_y + c1
    contrast = variance_x + variance_y + c2
    similarities = numerator / (luminance * contrast)
    return float(similarities.mean())


def _gaussian_window() -> Tensor:
    """Return weights (1, 1, 11, 11) that sum to 1."""
    positions = torch.arange(SMALLEST, dtype=torch.float64)
    offsets = positions - SMALLEST // 2
    exponents = -(offsets**2) / (2 * _SIGMA**2)
    row = torch.exp(exponents)
    row = row / row.sum()
    window = torch.outer(row, row)
    return window[None, None]


def preserved(o: Tensor, v: Tensor, g: Tensor) -> float | None:
    """Return the mean absolute difference of output and source in the pixels that source and goal share.

    None if they share no pixel: then there is nothing to score.
    """
    shared = ((v - g).abs() <= UNCHANGED).all(0)
    if not shared.any():
        return None
    differences = (o - v).abs()
    return float(differences[:, shared].mean())


def similarity(one: Tensor, other: Tensor) -> float:
    """Return 100 times the cosine of two encodings: CLIP-I, CLIP-T and DINO are this."""
    return 100 * float(cosine_similarity(one.float(), other.float(), dim=-1))


def paired(ones: Tensor, others: Tensor) -> float:
    """Return the mean similarity of encodings (B, D) to those of the same row: of pictures with the same seeds."""
    return 100 * float(cosine_similarity(ones.float(), others.float(), dim=-1).mean())


def all_pairs(ones: Tensor, others: Tensor) -> float:
    """Return the mean similarity over all pairs of encodings (A, D) and (B, D): CLIP-I and DINO of DreamBooth.

    Of a set of different pictures with itself it is below 100.
    """
    unit_ones = normalize(ones.float(), dim=-1)
    unit_others = normalize(others.float(), dim=-1)
    cosines = unit_ones @ unit_others.T
    return 100 * float(cosines.mean())


def among_themselves(encodings: Tensor) -> float | None:
    """Return the mean similarity over all pairs of different rows of (B, D), B > 1; None for a single row."""
    count = len(encodings)
    if count < 2:
        return None
    # the mean over all pairs contains each row's similarity to itself, 100
    with_itself = all_pairs(encodings, encodings)
    return (with_itself * count - 100) / (count - 1)


def direction(
    v: Tensor, o: Tensor, caption: Tensor, target_caption: Tensor
) -> float | None:
    """Return the cosine of the change of the picture and that of its caption (Gal et al. 2022), in one space.

    None if picture or caption did not change: then there is no direction.
    """

    def unit(encoding: Tensor) -> Tensor:
        return normalize(encoding.float(), dim=-1)

    picture_change = unit(o) - unit(v)
    caption_change = unit(target_caption) - unit(caption)
    lengths = [float(change.norm()) for change in (picture_change, caption_change)]
    if min(lengths) < _NO_CHANGE:
        return None
    return float(cosine_similarity(picture_change, caption_change, dim=-1))


class ClipEncoder:
    """A CLIP that encodes pictures and texts in one space; scores that use it carry its name."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model = model.eval()
        self.processor = processor
        self.name = name

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D)."""
        inputs = self.processor.image_processor(
            images=list(pictures),
            return_tensors="pt",
        )
        pixel_values = inputs["pixel_values"].to(self.model.device)
        output = self.model.get_image_features(pixel_values, return_dict=True)
        features: Tensor = output.pooler_output
        return features.float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return (B, D); a text that is longer than the model reads is cut (the MagicBrush script raises)."""
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.processor.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.get_text_features(
            inputs["input_ids"],
            inputs["attention_mask"],
            return_dict=True,
        )
        features: Tensor = output.pooler_output
        return features.float().cpu()


class TokenEncoder:
    """The mean of the image tokens a vision-language model sees; scores that use it carry its name."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.name = model.name

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D)."""
        means = []
        for tokens in self.model.encode_images(pictures):
            mean = tokens.float().mean(0)
            means.append(mean.cpu())
        return torch.stack(means)


class DinoEncoder:
    """A self-supervised vision transformer: its [CLS] of a picture of 256 pixels, cropped to 224 (MagicBrush)."""

    def __init__(
        self, model: Any, name: str, *, resize: int = 256, crop: int = 224
    ) -> None:
        self.model = model.eval()
        self.name = name
        self._resize = resize
        self._crop = crop

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D)."""
        prepared = [self._prepare(picture) for picture in pictures]
        pixel_values = torch.stack(prepared).to(self.model.device)
        output = self.model(pixel_values=pixel_values)
        hidden: Tensor = output.last_hidden_state
        return hidden[:, 0].float().cpu()

    def _prepare(self, picture: Image.Image) -> Tensor:
        """Return the normalised pixels (3, H, W) of the middle of a picture."""
        shortest = self._resize
        scale = shortest / min(picture.size)
        width = max(shortest, round(picture.width * scale))
        height = max(shortest, round(picture.height * scale))
        rgb = picture.convert("RGB")
        resized = rgb.resize(
            (width, height),
            Image.Resampling.BICUBIC,
        )
        edge = self._crop
        left = (width - edge) // 2
        top = (height - edge) // 2
        box = (left, top, left + edge, top + edge)
        middle = pixels(resized.crop(box))
        mean = torch.tensor(_IMAGENET_MEAN).view(3, 1, 1)
        std = torch.tensor(_IMAGENET_STD).view(3, 1, 1)
        return (middle - mean) / std
