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

UNCHANGED = (
    4 / 255
)  # a pixel that source and goal share up to this belongs to what should stay
_STILL = 1e-6  # length of a change that is rounding
SMALLEST = _WINDOW = 11  # pixels: the window of SSIM
_SIGMA, _K1, _K2 = 1.5, 0.01, 0.03
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixels(picture: Image.Image, like: Image.Image | None = None) -> Tensor:
    """Return an RGB picture as (3, H, W) in 0 .. 1, resized to the size of `like` first (bicubic)."""
    if like is not None and picture.size != like.size:
        picture = picture.resize(like.size, Image.Resampling.BICUBIC)
    return (
        torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float()
        / 255
    )


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
    if min(o.shape[1:]) < _WINDOW:
        raise ValueError(
            f"SSIM needs pictures of {_WINDOW} pixels at least, not {tuple(o.shape[1:])}"
        )
    at = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    row = torch.exp(-(at**2) / (2 * _SIGMA**2))
    row = row / row.sum()
    window = torch.outer(row, row)[None, None]

    def mean(x: Tensor) -> Tensor:
        return conv2d(x[:, None], window)[:, 0]

    x, y = o.double(), g.double()
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = _K1**2, _K2**2
    return float(
        (
            ((2 * mx * my + c1) * (2 * vxy + c2))
            / ((mx * mx + my * my + c1) * (vx + vy + c2))
        ).mean()
    )


def preserved(o: Tensor, v: Tensor, g: Tensor) -> float | None:
    """Return the mean absolute difference of output and source where source and goal agree: what should have stayed.

    None where nothing should have: then there is nothing to score.
    """
    stays = ((v - g).abs() <= UNCHANGED).all(0)
    return float((o - v).abs()[:, stays].mean()) if stays.any() else None


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
    return 100 * float(
        (normalize(ones.float(), dim=-1) @ normalize(others.float(), dim=-1).T).mean()
    )


def among_themselves(encodings: Tensor) -> float | None:
    """Return the mean similarity over all pairs of different rows of (B, D), B > 1; None for a single row."""
    count = len(encodings)
    return (
        None
        if count < 2
        else (all_pairs(encodings, encodings) * count - 100) / (count - 1)
    )


def direction(
    v: Tensor, o: Tensor, caption: Tensor, target_caption: Tensor
) -> float | None:
    """Return the cosine of the change of the picture and that of its caption (Gal et al. 2022), in one space.

    None where nothing changed: then there is no direction.
    """
    unit = [
        normalize(encoding.float(), dim=-1)
        for encoding in (v, o, caption, target_caption)
    ]
    picture, text = unit[1] - unit[0], unit[3] - unit[2]
    if min(float(picture.norm()), float(text.norm())) < _STILL:
        return None
    return float(cosine_similarity(picture, text, dim=-1))


class ClipEncoder:
    """A CLIP that encodes pictures and texts in one space; scores that use it carry its name."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model.eval(), processor, name

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D)."""
        inputs = self.processor.image_processor(
            images=list(pictures), return_tensors="pt"
        )
        found = self.model.get_image_features(
            inputs["pixel_values"].to(self.model.device), return_dict=True
        )
        return found.pooler_output.float().cpu()  # type: ignore[no-any-return]

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
        found = self.model.get_text_features(
            inputs["input_ids"], inputs["attention_mask"], return_dict=True
        )
        return found.pooler_output.float().cpu()  # type: ignore[no-any-return]


class TokenEncoder:
    """The mean of the image tokens a vision-language model sees; scores that use it carry its name."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model, self.name = model, model.name

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D)."""
        return torch.stack(
            [
                tokens.float().mean(0).cpu()
                for tokens in self.model.encode_images(pictures)
            ]
        )


class DinoEncoder:
    """A self-supervised vision transformer: its [CLS] of a picture of 256 pixels, cropped to 224 (MagicBrush)."""

    def __init__(
        self, model: Any, name: str, *, resize: int = 256, crop: int = 224
    ) -> None:
        self.model, self.name, self._resize, self._crop = (
            model.eval(),
            name,
            resize,
            crop,
        )

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D)."""
        inputs = torch.stack([self._prepared(picture) for picture in pictures]).to(
            self.model.device
        )
        return self.model(pixel_values=inputs).last_hidden_state[:, 0].float().cpu()  # type: ignore[no-any-return]

    def _prepared(self, picture: Image.Image) -> Tensor:
        scale = self._resize / min(picture.size)
        width, height = (
            max(self._resize, round(side * scale)) for side in picture.size
        )
        picture = picture.convert("RGB").resize(
            (width, height), Image.Resampling.BICUBIC
        )
        left, top = (width - self._crop) // 2, (height - self._crop) // 2
        cropped = pixels(picture.crop((left, top, left + self._crop, top + self._crop)))
        mean, spread = (torch.tensor(values)[:, None, None] for values in _IMAGENET)
        return (cropped - mean) / spread
