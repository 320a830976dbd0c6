"""Soft tokens in front of a question: marks in its text keep their places, and the first layer gets them there.

A mark is the padding token, which no question contains otherwise. So masks, positions and caches are those of a longer
question, left-padded or not, and a picture stays where it is: the marks stand behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mmedit_cli.errors import HparamsError, MmeditError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query


class SoftPrompts:
    """Marks questions of one model, and puts soft tokens in the places of the marks."""

    def __init__(self, backbone: VisionLanguageModel, count: int) -> None:
        self._backbone = backbone
        self._count = count
        self._mark = str(backbone.tokenizer.pad_token)
        self._id = backbone.tokenizer.pad_token_id
        question = Query("What is this?", "a star")
        plain = backbone.encode(question).ids
        marked = backbone.encode(self.marked(question)).ids
        added = marked.count(self._id) - plain.count(self._id)
        if added != count or self._id in plain:
            raise HparamsError(
                f"recipe: {backbone.name} does not read {count} padding tokens in front of a question as such"
            )
        self._first = backbone.anchors.path("layer", 0)

    def marked(self, query: Query) -> Query:
        """Return the question with the places of its soft tokens in front."""
        return replace(query, prompt=self._count * self._mark + query.prompt)

    def places(self, batch: Batch) -> Tensor:
        """Return where the soft tokens of each row belong: (B, T) bool; none in rows that are not marked."""
        marks = (batch.input_ids == self._id) & batch.prompt_mask
        number = marks.cumsum(1)
        found: Tensor = marks & (number <= self._count)
        return found

    def put(
        self, hidden: Tensor, batch: Batch, rows: Sequence[int], soft: Tensor
    ) -> Tensor:
        """Return what enters the first layer with soft tokens in some rows: (B, T, D), (n, P, D) -> (B, T, D).

        What the model puts there itself, a position for one, stays. Raises MmeditError for a row without the marks.
        """
        chosen = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        chosen[list(rows)] = True
        where = self.places(batch) & chosen[:, None]
        if int(where.sum()) != len(rows) * self._count:
            raise MmeditError("recipe met a question that was not marked")
        tokens = soft.flatten(0, 1)
        values = hidden[where] + tokens.to(hidden.dtype)
        return hidden.index_put((where,), values)

    def hook(self, patch: Patch, change: Callable[[Tensor], Tensor | None]) -> None:
        """Pass what enters the first layer through `change`."""
        patch.hook_input(self._first, change)

    @contextmanager
    def on(self, batch: Batch, rows: Sequence[int], soft: Tensor) -> Iterator[None]:
        """Inside the block, rows of this batch have soft tokens, which keep their gradients."""

        def change(hidden: Tensor) -> Tensor | None:
            if self._backbone.current_batch is not batch:
                return None
            return self.put(hidden, batch, rows, soft)

        with Patch(self._backbone.model) as patch:
            self.hook(patch, change)
            yield
