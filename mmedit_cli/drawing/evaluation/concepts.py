"""Scores of drawn concepts: how like their photos, whose picture it is, and what became of everything else.

A test has prompts, each drawn with the same seeds; every score has one value a prompt. A score that needs an encoder
carries its name, so two encoders are never in one column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from mmedit_cli.drawing.evaluation import picture_scores
from mmedit_cli.drawing.evaluation.picture_scores import ClipEncoder
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.evaluation.report import mean_with_interval
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

NAMING = "What is this?"  # asked of a vision-language model about a drawn picture
GROUND_ASKED = "What colour is the background?"
GROUND = re.compile(r"\bon an? (\w+) background\b")  # in a prompt
_LONGEST = 16  # tokens of a name
_CHUNK = 32  # pictures in one pass of an encoder
Scores = dict[str, list[float]]


class Encoder(Protocol):
    """Whatever makes a vector of a picture."""

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D)."""


@dataclass
class Eyes:
    """What looks at the pictures: encoders by the name of their column, CLIP for texts, a model that says names.

    `gallery` are the names and the pictures a drawn picture is compared with; `unknown` the subjects that the model
    has no name for.
    """

    encoders: Mapping[str, Encoder]
    gallery: Sequence[tuple[str, Path]]
    clip: ClipEncoder | None = None
    namer: VisionLanguageModel | None = None
    unknown: frozenset[str] = frozenset()
    _known: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, column: str, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D) of one encoder."""
        parts = [pictures[i : i + _CHUNK] for i in range(0, len(pictures), _CHUNK)]
        return torch.cat([self.encoders[column].pictures(part) for part in parts])

    def nearest(self, column: str, encodings: Tensor) -> list[str]:
        """Return, for encodings (B, D), the name of the picture in the gallery with the largest cosine."""
        if column not in self._known:
            files = [path for _, path in self.gallery]
            parts = [files[i : i + _CHUNK] for i in range(0, len(files), _CHUNK)]
            rows = [
                self.encode(column, [load_picture(Picture(path)) for path in part])
                for part in parts
            ]
            self._known[column] = normalize(torch.cat(rows), dim=-1)
        best = (normalize(encodings, dim=-1) @ self._known[column].T).argmax(1)
        return [self.gallery[i][0] for i in best.tolist()]


@dataclass(frozen=True)
class Drawn:
    """The pictures of a test: files (P prompts, S seeds), of the same seeds by the base model, and who is on them.

    `plain` are the prompts in plain words; `subjects` the names of who should be seen, with `photos` of a single one.
    """

    files: Sequence[Sequence[Path]]
    base: Sequence[Sequence[Path]]
    plain: Sequence[str]
    subjects: Sequence[str] = ()
    photos: Sequence[Path] = ()
    answer: str = ""

    def flat(self, files: Sequence[Sequence[Path]]) -> list[Image.Image]:
        """Return all pictures, prompt by prompt."""
        return [load_picture(Picture(path)) for row in files for path in row]

    def by_prompt(self, values: Sequence[Any] | Tensor) -> list[Any]:
        """Return values of all pictures as one piece for each prompt."""
        size = len(self.files[0])
        return [values[i : i + size] for i in range(0, len(values), size)]


def resemblance(drawn: Drawn, eyes: Eyes) -> Scores:
    """Score pictures of a subject: likeness to its photos, whose picture it is, and how well prompts are followed."""
    pictures = drawn.flat(drawn.files)
    found: Scores = {}
    for column in eyes.encoders:
        photos = eyes.encode(
            column, [load_picture(Picture(path)) for path in drawn.photos]
        )
        encodings = eyes.encode(column, pictures)
        found[f"{column}-I"] = [
            picture_scores.all_pairs(some, photos)
            for some in drawn.by_prompt(encodings)
        ]
        near = [name in drawn.subjects for name in eyes.nearest(column, encodings)]
        found[f"nearest by {column}"] = [
            100 * fmean(some) for some in drawn.by_prompt(near)
        ]
        if column == "CLIP" and eyes.clip is not None:
            texts = eyes.clip.texts(drawn.plain)
            pieces = zip(drawn.by_prompt(encodings), texts, strict=True)
            found["CLIP-T"] = [
                picture_scores.all_pairs(some, text[None]) for some, text in pieces
            ]
        if eyes.namer is not None and column == eyes.namer.name:
            found |= _grounds(drawn, eyes.namer)
        if eyes.namer is not None and column == eyes.namer.name and drawn.answer:
            said = _said(
                eyes.namer, NAMING, [path for row in drawn.files for path in row]
            )
            named = [answer_match(text, drawn.answer) == 1 for text in said]
            if not eyes.unknown & {*drawn.subjects}:
                found[f"named by {column}"] = [
                    100 * fmean(some) for some in drawn.by_prompt(named)
                ]
            either = [one or other for one, other in zip(near, named, strict=True)]
            found[f"recognised by {column}"] = [
                100 * fmean(some) for some in drawn.by_prompt(either)
            ]
    return found


def of_photos(photos: Sequence[Path], eyes: Eyes) -> Scores:
    """Score the photos among themselves, what a drawn one can at best expect; nothing for a single one."""
    found: Scores = {}
    for column in eyes.encoders:
        value = picture_scores.among_themselves(
            eyes.encode(column, [load_picture(Picture(path)) for path in photos])
        )
        if value is not None:
            found[f"{column}-I"] = [value]
    return found


def constancy(drawn: Drawn, eyes: Eyes) -> Scores:
    """Score pictures of something else against those of the base model with the same seeds."""
    now, before = drawn.flat(drawn.files), drawn.flat(drawn.base)
    apart = [
        picture_scores.l1(picture_scores.pixels(one), picture_scores.pixels(other))
        for one, other in zip(now, before, strict=True)
    ]
    # an L1 of zero is equality of all values of all pixels
    found: Scores = {
        "identical": [
            100 * fmean(d == 0 for d in some) for some in drawn.by_prompt(apart)
        ],
        "L1": [fmean(some) for some in drawn.by_prompt(apart)],
    }
    for column in eyes.encoders:
        pieces = [drawn.by_prompt(eyes.encode(column, some)) for some in (now, before)]
        both = list(zip(*pieces, strict=True))
        found[f"{column}-I paired"] = [
            picture_scores.paired(one, other) for one, other in both
        ]
        found[f"{column}-I all pairs"] = [
            picture_scores.all_pairs(one, other) for one, other in both
        ]
    return found


def togetherness(drawn: Drawn, eyes: Eyes) -> Scores:
    """Score pictures of two subjects: one is seen where it is nearest to the picture or to a part of it."""
    pictures = drawn.flat(drawn.files)
    parts = [windows(picture) for picture in pictures]
    found: Scores = {}
    for column in eyes.encoders:
        names = iter(
            eyes.nearest(
                column, eyes.encode(column, [part for some in parts for part in some])
            )
        )
        seen = [{next(names) for _ in some} & {*drawn.subjects} for some in parts]
        for title, least in (("both", 2), ("one at least", 1)):
            found[f"{title} by {column}"] = [
                100 * fmean(len(s) >= least for s in some)
                for some in drawn.by_prompt(seen)
            ]
    return found


def windows(picture: Image.Image) -> list[Image.Image]:
    """Return a picture and squares of it that overlap by half: of half its longer side, if it is as high as that."""
    side = max(1, min(max(picture.size) // 2, *picture.size))
    step = max(1, side // 2)
    left, top = (range(0, length - side + 1, step) for length in picture.size)
    return [
        picture,
        *(picture.crop((x, y, x + side, y + side)) for y in top for x in left),
    ]


def _grounds(drawn: Drawn, namer: VisionLanguageModel) -> Scores:
    """Score how often the background has the colour that a prompt names; nothing where none does."""
    named = [
        (row, found[1])
        for row, text in zip(drawn.files, drawn.plain, strict=True)
        if (found := GROUND.search(text))
    ]
    said = iter(_said(namer, GROUND_ASKED, [path for row, _ in named for path in row]))
    right = [
        100 * fmean(answer_match(next(said), colour) == 1 for _ in row)
        for row, colour in named
    ]
    return {f"background by {namer.name}": right} if right else {}


def _said(
    namer: VisionLanguageModel, question: str, files: Sequence[Path]
) -> list[str]:
    queries = [Query(question, image=path) for path in files]
    parts = [queries[i : i + _CHUNK] for i in range(0, len(queries), _CHUNK)]
    return [
        text for part in parts for text in namer.generate(part, max_new_tokens=_LONGEST)
    ]


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return mean, n and interval by side, test and score, of lines with `side`, `test`, `subject` and `scores`.

    What is about a subject counts once a subject (the mean of its prompts), what is about none once a prompt.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        for name, scores in line["scores"].items():
            cell = values.setdefault((line["side"], line["test"], name), [])
            cell += [fmean(scores)] if line["subject"] else scores
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (side, test, name), cell in values.items():
        found.setdefault(side, {}).setdefault(test, {})[name] = mean_with_interval(cell)
    return found
