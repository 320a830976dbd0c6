"""How a scope is trained: which of many edits a question is about, with negatives of both kinds.

B cases, the first edits; N edits with the others; R queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.shared.draws import one_of
from mmedit_cli.knowledge.methods.shared.scope import Scope
from mmedit_cli.types import EditCase, Query


@dataclass(frozen=True)
class Asked:
    """Queries, the case of each, and whether each is about its edit; those that are come first."""

    queries: list[Query]
    case: list[int]
    is_about: list[bool]


def choose(cases: Sequence[EditCase], source: Generator) -> Asked:
    """Draw one query from each column of generality and locality of each case; every request is asked as well."""
    inside: list[tuple[int, Query]] = []
    outside: list[tuple[int, Query]] = []
    for number, case in enumerate(cases):
        for column, queries in case.columns():
            family = column.partition(".")[0]
            if not queries or family in ("portability", "needs"):
                continue
            pair = (number, one_of(queries, source))
            group = outside if family == "locality" else inside
            group.append(pair)
    every = [*inside, *outside]
    return Asked(
        [query for _, query in every],
        [number for number, _ in every],
        [place < len(inside) for place in range(len(every))],
    )


@dataclass(frozen=True)
class ScopeCodes:
    """Codes of what is asked (R, C) and of the edits (N, C), of which the first `count` are those of the cases."""

    queries: Tensor
    edits: Tensor
    count: int


def scope_losses(
    scope: Scope,
    asked: Asked,
    edits: Sequence[EditCase],
    known: ScopeCodes,
    kind: str,
    *,
    composed: bool,
    source: Generator,
) -> dict[str, Tensor]:
    """Return the loss of choosing an edit for what is asked, and with `composed` that for questions put together."""
    pairs = Pairs.of(asked, edits)
    score = scope(known.queries, known.edits)
    losses = {"scope": pairs.loss(score, kind)}
    if composed:
        mixed = composed_questions(
            scope,
            known.edits,
            edits,
            known.count,
            source,
        )
        if mixed is not None:
            mixed_score, mixed_pairs = mixed
            losses["composed"] = mixed_pairs.loss(mixed_score, kind)
    return losses


@dataclass(frozen=True)
class Pairs:
    """Which edit each query is about, N for none: (R,); and the edits that are not judged for it: (R, N) bool.

    Another edit of the same thing may be as right, or not: the data do not say which.
    """

    right: Tensor
    unknown: Tensor

    @classmethod
    def of(cls, asked: Asked, edits: Sequence[EditCase]) -> Pairs:
        """Return the pairs of what is asked, of N edits that begin with those of the cases."""
        right = []
        for case, about in zip(asked.case, asked.is_about, strict=True):
            right.append(case if about else len(edits))
        unknown = [
            _unknown(
                case,
                edits,
            )
            for case in asked.case
        ]
        return cls(
            torch.tensor(right),
            torch.tensor(unknown),
        )

    def loss(self, score: Tensor, kind: str) -> Tensor:
        """Return the cross entropy of choosing the right edit or none (`choice`), or that of each pair (`binary`)."""
        right = self.right.to(score.device)
        unknown = self.unknown.to(score.device)
        if kind == "choice":
            columns = score.masked_fill(unknown, float("-inf"))
            none = torch.zeros_like(score[:, :1])
            return F.cross_entropy(
                torch.cat((columns, none), 1),
                right,
            )
        edits = torch.arange(
            score.shape[1],
            device=score.device,
        )
        is_right = right[:, None] == edits
        each = F.binary_cross_entropy_with_logits(
            score,
            is_right.float(),
            reduction="none",
        )
        is_wrong = ~is_right & ~unknown
        # there are many more pairs that do not belong together
        return (_mean(each, is_right) + _mean(each, is_wrong)) / 2


def _mean(values: Tensor, where: Tensor) -> Tensor:
    count = where.sum().clamp(min=1)
    return (values * where).sum() / count


def _unknown(case: int, edits: Sequence[EditCase]) -> list[bool]:
    """Whether each edit is another one of the thing that the case is about."""
    concept = edits[case].concept
    return [
        bool(concept) and number != case and other.concept == concept
        for number, other in enumerate(edits)
    ]


def composed_questions(
    scope: Scope,
    known: Tensor,
    edits: Sequence[EditCase],
    count: int,
    source: Generator,
) -> tuple[Tensor, Pairs] | None:
    """Return scores and right choices of queries that ask the question of one case about the picture of another.

    If both cases ask for the same sort of fact, that is what the other edit is about; else no edit is. Where the data
    name no sorts of facts, there are no such queries, and the result is None.
    """
    order = torch.randperm(
        count,
        generator=source,
    ).tolist()
    prompts = []
    pictures = []
    right = []
    for one, other in zip(order, order[1:] + order[:1], strict=True):
        first, second = edits[one], edits[other]
        named = first.type and second.type
        seeing = first.request.image and second.request.image
        if one == other or not named or not seeing:
            continue
        prompts.append(one)
        pictures.append(other)
        right.append(other if first.type == second.type else len(edits))
    if not right:
        return None
    unknown = torch.tensor([_unknown(picture, edits) for picture in pictures])
    codes_of_both = scope.composed(
        known[prompts],
        known[pictures],
    )
    score = scope(codes_of_both, known)
    return score, Pairs(
        torch.tensor(right),
        unknown,
    )
