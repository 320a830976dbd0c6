"""Changed copies of photos that take a share of every batch, each with a prompt of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmedit_cli.drawing.data.base import with_article
from mmedit_cli.drawing.methods.shared.photos import Photos, open_squares
from mmedit_cli.pictures import load_alpha


class Variants(NamedTuple):
    """Changed copies of the photos: their share of a batch, and the index of each one's prompt."""

    share: float
    photos: Photos
    prompts: list[int]


def replace_some(
    latents: Tensor, prompts: list[int], variants: Variants, source: Generator
) -> None:
    """Replace a random share of the rows of a batch, and of their prompts, by variants."""
    chance = torch.rand(len(prompts), generator=source)
    rows = (chance < variants.share).nonzero()[:, 0]
    chosen = torch.randint(
        0,
        len(variants.photos),
        rows.shape,
        generator=source,
    )
    replacements, _ = variants.photos.at(chosen, source)
    latents[rows.to(latents.device)] = replacements
    for row, i in zip(rows.tolist(), chosen.tolist(), strict=True):
        prompts[row] = variants.prompts[i]


def on_colours(
    images: Sequence[Path],
    colours: Sequence[str],
    prompt: str,
    side: int,
    *,
    crop: bool,
) -> list[tuple[Any, str]]:
    """Return each photo that has a transparent background on each colour, with the prompt that names the colour.

    A colour is a text such as "blue #b3d1ff".
    """
    transparent = [path for path in images if load_alpha(path) is not None]
    pictures: list[tuple[Any, str]] = []
    for text in colours:
        name, colour = text.rsplit(" ", 1)
        squares = open_squares(
            transparent,
            side,
            crop=crop,
            background=colour,
        )
        in_words = f"{prompt} on {with_article(name)} background"
        pictures += [(square, in_words) for square in squares]
    return pictures


def check_coloured(share: float, colours: Sequence[str]) -> None:
    """Raise ValueError for a share that makes no sense, for no colours, and for texts that are none."""
    if not 0 <= share < 1:
        raise ValueError(f"coloured must be from 0 to below 1, not {share}")
    if share and not colours:
        raise ValueError(
            'coloured needs colours behind the subject, by name, e.g. ["blue #b3d1ff"]'
        )
    for colour in colours:
        if not re.fullmatch(r"\S.* #[0-9a-fA-F]{6}", colour):
            raise ValueError(
                f"colours: {colour!r} is not a name and a colour, as 'blue #b3d1ff'"
            )
