"""What an edit does to everything else: questions that no edit is about, and how far their answers move.

They are of EmojiKB's training side, which comes along: what evaluates an editor is never among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

import torch
from torch import Tensor

from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.types import EditCase, Query

_SIDE = "emojikb:train"
_GROUP = 32  # questions of one pass


@cache
def unrelated_questions(count: int, *, pictures: bool = True) -> tuple[Query, ...]:
    """Return so many questions about pictures and facts without one, the same at every call.

    Without `pictures` all of them are in text.

    Raises DataError where EmojiKB is not there.
    """
    by_case = []
    for case in load_cases(_SIDE, limit=count):
        asked = [query for query in _questions(case) if pictures or not query.image]
        by_case.append(asked)
    rounds = zip_longest(*by_case)
    in_turn = [query for turn in rounds for query in turn if query is not None]
    return tuple(dict.fromkeys(in_turn))[:count]


def _questions(case: EditCase) -> list[Query]:
    """Return what must stay where a case is edited: its answers are true."""
    return [query for queries in case.locality.values() for query in queries]


@dataclass(frozen=True)
class Unrelated:
    """What the untouched model answers to unrelated questions.

    parts: the state of each group on entering the lowest edited layer; log_probs: (n, V) for each, float32, at the
    positions that predict an answer.
    """

    backbone: VisionLanguageModel
    parts: Sequence[Prefix]
    log_probs: Sequence[Tensor]

    @classmethod
    @torch.no_grad()
    def ask(
        cls, backbone: VisionLanguageModel, questions: Sequence[Query], layer: int
    ) -> Unrelated:
        """Ask the untouched model; nothing below `layer` may change afterwards."""
        parts = []
        for group in chunks(questions, _GROUP):
            batch = backbone.batch(group)
            part = backbone.prefix(batch, layer)
            parts.append(part)
        asked = cls(backbone, parts, ())
        log_probs = []
        for part in parts:
            answers = asked._answers(part)
            log_probs.append(answers)
        return cls(
            backbone,
            parts,
            log_probs,
        )

    @torch.no_grad()
    def divergence(self) -> float:
        """Return KL(untouched || present model), the mean over all answer tokens, in nats."""
        total, tokens = 0.0, 0
        for part, before in zip(self.parts, self.log_probs, strict=True):
            lost = before - self._answers(part)
            total += float((before.exp() * lost).sum())
            tokens += len(before)
        return total / max(tokens, 1)

    def _answers(self, part: Prefix) -> Tensor:
        logits = self.backbone.resume(part, part.batch.predicting)
        return logits.float().log_softmax(-1)
