"""A turn: requests that are learned at once, in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.shared.answer_rows import (
    Answered,
    AnswerRows,
    answer_rows,
    joined,
    says,
)
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.types import Query


class Turn:
    """Requests on entering the lowest edited layer, and what is to be said where; loss and rows are those of all.

    The loss is the mean over all answer tokens, so it does not depend on how the requests are cut into parts.
    """

    def __init__(
        self,
        backbone: VisionLanguageModel,
        requests: Sequence[Query],
        layer: int,
        paths: Sequence[str],
        *,
        size: int,
        teach_end: bool,
    ) -> None:
        self.backbone = backbone
        self.paths = paths
        self.parts: list[tuple[Prefix, Tensor, Tensor]] = []
        counts: list[int] = []
        for part in chunks(requests, size):
            batch = backbone.batch(part)
            with torch.no_grad():
                prefix = backbone.prefix(batch, layer)
            at, labels = batch.target_positions(backbone.end_id, with_end=teach_end)
            self.parts.append((prefix, at, labels[at]))
            counts += at.sum(1).tolist()
        self._counts = counts
        self.tokens = sum(counts)

    def tokens_of(self, first: int) -> int:
        """Return how many answer tokens the first so many requests have: their rows come first."""
        return sum(self._counts[:first])

    @torch.no_grad()
    def loss(self) -> tuple[float, bool]:
        """Return the loss, and whether every token is right."""
        total, right = 0.0, True
        for prefix, at, answers in self.parts:
            logits = self.backbone.resume(prefix, at)
            loss = answer_loss(logits, answers)
            total += loss.item() * len(answers)
            right = right and says(logits, answers)
        return total / self.tokens, right

    def rows(self) -> Answered:
        """Return loss, whether every token is right, and the rows of each layer, one an answer token."""
        total, right = 0.0, True
        parts: dict[str, list[AnswerRows]] = {path: [] for path in self.paths}
        for prefix, at, answers in self.parts:
            found = answer_rows(
                self.backbone,
                prefix,
                at,
                answers,
                self.paths,
            )
            share = len(answers) / self.tokens
            total += found.loss * share
            right = right and found.right
            for path, rows in found.rows.items():
                part = AnswerRows(
                    rows.inputs,
                    rows.gradients * share,
                )
                parts[path].append(part)
        together = {}
        for path, found_parts in parts.items():
            together[path] = joined(found_parts)
        return Answered(
            total,
            right,
            together,
        )
