"""Queries as tensors, and the state of a batch in the middle of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.knowledge.models.shared.prefix import DeepStack, RowCache
from mmedit_cli.pictures import Picture
from mmedit_cli.runtime import Processes
from mmedit_cli.types import Query

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Queries as tensors, right-padded (left-padded for generation).

    input_ids, attention_mask: (B, T); labels: (B, T), the answer tokens at their own positions and -100 elsewhere;
    image_mask, prompt_mask, answer_mask: (B, T) bool; the prompt is everything between the image and the answer.
    `pictures` are the distinct images in order of first use, `picture_of` the index of each row's own, or None.
    """

    queries: tuple[Query, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    image_mask: Tensor
    prompt_mask: Tensor
    answer_mask: Tensor
    pictures: tuple[Picture, ...]
    picture_of: tuple[int | None, ...]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return self.attention_mask.sum(1).tolist()

    @property
    def predicting(self) -> Tensor:
        """(B, T) bool: the positions whose logits predict the answer tokens, one before each of them."""
        return predicting(self.answer_mask)

    @property
    def ends(self) -> Tensor:
        """(B, T) bool: the last token of each row, whose logits say how a right-padded row goes on."""
        here = self.attention_mask.bool()
        return here & ~predicting(here)

    def target_positions(
        self, end: int, *, with_end: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the positions that predict the answer, (B, T) bool, and the right tokens, (B, T).

        Those that predict the token `end` behind the answer are among them, but not without `with_end`.
        """
        positions = self.predicting | self.ends if with_end else self.predicting
        following = torch.roll(self.input_ids, -1, 1)
        return positions, torch.where(self.ends, end, following)

    @property
    def answers(self) -> Tensor:
        """(n,): the answer tokens of all rows, in the order of `logits[predicting]`."""
        return self.labels[self.answer_mask]


def predicting(answer_mask: Tensor) -> Tensor:
    """Shift an answer mask (B, T) one position to the left: logits at t predict the token at t + 1."""
    return torch.cat((answer_mask[:, 1:], torch.zeros_like(answer_mask[:, :1])), dim=1)


@dataclass(frozen=True)
class Prefix:
    """The state of a batch on entering decoder layer `layer`.

    hidden: (B, T, D); contexts: what each decoder layer receives beside the hidden state (masks, positions), one a
    layer of the model; deepstack: None where no later layer adds image tokens.
    """

    layer: int
    batch: Batch
    hidden: Tensor
    contexts: tuple[dict[str, Any], ...] = field(repr=False)
    deepstack: DeepStack | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ActivationCache:
    """Rows below the first edited layer, cached: image tokens by picture, and what enters `layer` by query.

    Without a layer, there are image tokens alone. `found` has what else is computed of each picture, by a name.
    """

    layer: int | None
    features: RowCache[Picture]
    prefixes: RowCache[Query]
    found: dict[str, RowCache[Picture]] = field(default_factory=dict)

    def compute_together(self, folder: Path, processes: Processes) -> None:
        """Compute all rows once among several processes, which read each other's from files in `folder`.

        The image tokens come first: the prefixes are computed from them.
        """
        parts: dict[str, RowCache[Any]] = {"pictures": self.features}
        if self.layer is not None:
            parts["prefixes"] = self.prefixes
        for name, rows in parts.items():
            place = folder / name
            place.mkdir(exist_ok=True)
            rows.compute_together(place, processes)


@dataclass(frozen=True)
class Encoded:
    """One query as token ids: `n_image` placeholders from `image_start`, and `n_answer` answer tokens at the end."""

    ids: list[int]
    image_start: int
    n_image: int
    n_answer: int


def collate(
    queries: Sequence[Query],
    rows: Sequence[Encoded],
    pad: int,
    device: torch.device,
    *,
    left_pad: bool = False,
) -> Batch:
    """Return encoded queries as one batch, padded with the id `pad`."""
    length = max(len(row.ids) for row in rows)
    shape = (len(rows), length)
    ids = torch.full(shape, pad)
    is_token = torch.zeros(shape, dtype=torch.bool)
    in_image = is_token.clone()
    in_prompt = is_token.clone()
    in_answer = is_token.clone()
    for i, row in enumerate(rows):
        start = length - len(row.ids) if left_pad else 0
        end = start + len(row.ids)
        image_start = start + row.image_start
        image_end = image_start + row.n_image
        answer_start = end - row.n_answer
        ids[i, start:end] = torch.tensor(row.ids)
        is_token[i, start:end] = True
        in_image[i, image_start:image_end] = True
        in_prompt[i, image_end:answer_start] = True
        in_answer[i, answer_start:end] = True
    ids = ids.to(device)
    in_answer = in_answer.to(device)
    pictures, picture_of = _distinct_pictures(queries)
    return Batch(
        queries=tuple(queries),
        input_ids=ids,
        attention_mask=is_token.to(device).long(),
        labels=torch.where(in_answer, ids, IGNORE),
        image_mask=in_image.to(device),
        prompt_mask=in_prompt.to(device),
        answer_mask=in_answer,
        pictures=pictures,
        picture_of=picture_of,
    )


def _distinct_pictures(
    queries: Sequence[Query],
) -> tuple[tuple[Picture, ...], tuple[int | None, ...]]:
    """Return the pictures in order of first use, and for each query the index of its own."""
    place: dict[Picture, int] = {}
    picture_of: list[int | None] = []
    for query in queries:
        if query.image is None:
            picture_of.append(None)
        else:
            picture = Picture(query.image, query.background)
            picture_of.append(place.setdefault(picture, len(place)))
    return tuple(place), tuple(picture_of)


def joined(query: Query) -> str:
    """Return the target as it follows the prompt: with one blank between, unless there is white space already."""
    before = query.prompt[-1:]
    first = query.target[:1]
    if before.isspace() or first.isspace():
        return query.target
    return " " + query.target
