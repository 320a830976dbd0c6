"""Which edit a question is about, decided once and before it is read: what stands in front of it then changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch
from mmedit_cli.types import Query

_TOGETHER = 32  # questions that are decided about at a time
_MOST = 1 << 16  # questions whose decision is kept


class RoutedContext:
    """Rewrites the questions that are about an edit; all others go to the model as they are.

    `decide` returns for a batch of questions, without answers, the place of the edit of each, -1 for none: (B,).
    `rewrite` returns a question with what belongs to the edit at a place.
    """

    def __init__(
        self,
        backbone: VisionLanguageModel,
        decide: Callable[[Batch], Tensor],
        rewrite: Callable[[Query, int], Query],
    ) -> None:
        self._backbone = backbone
        self._decide = decide
        self._rewrite = rewrite
        self._made: dict[Query, int] = {}

    def attach(self) -> None:
        """From now on questions are rewritten; what was decided before is forgotten."""
        self._made = {}
        self._backbone.rewrite = self._rewritten

    def detach(self) -> None:
        """From now on no question is rewritten."""
        self._made = {}
        self._backbone.rewrite = None

    def places(self, queries: Sequence[Query]) -> list[int]:
        """Return for each query the place of the edit that it is about, -1 for none."""
        questions = [replace(query, target="") for query in queries]
        found = {query: self._made[query] for query in questions if query in self._made}
        new = [query for query in dict.fromkeys(questions) if query not in found]
        if new:
            decided = self._decided(new)
            found |= decided
            if len(self._made) + len(decided) > _MOST:
                self._made = {}
            self._made |= decided
        return [found[query] for query in questions]

    @torch.no_grad()
    def _decided(self, questions: Sequence[Query]) -> dict[Query, int]:
        backbone = self._backbone
        by_length = sorted(questions, key=lambda query: len(query.prompt))
        before = backbone.rewrite
        # what is decided about is the question as it was asked
        backbone.rewrite = None
        try:
            found: dict[Query, int] = {}
            for part in chunks(by_length, _TOGETHER):
                batch = backbone.batch(part, with_answer=False)
                places = self._decide(batch).tolist()
                found.update(zip(part, places, strict=True))
            return found
        finally:
            backbone.rewrite = before

    def _rewritten(self, query: Query) -> Query:
        (place,) = self.places([query])
        return query if place < 0 else self._rewrite(query, place)
