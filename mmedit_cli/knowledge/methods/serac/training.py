"""How the networks of SERAC are trained: which edit a query is about, if any, and how it is then answered.

B cases, the first edits; N edits with the others; R queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.serac.hparams import SeracHparams
from mmedit_cli.knowledge.methods.serac.memory import answered, answers_of, codes
from mmedit_cli.knowledge.methods.serac.networks import Scope, SeracNetworks
from mmedit_cli.knowledge.methods.shared.draws import one_of
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.models.base import VisionLanguageModel
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


def losses_of(
    networks: SeracNetworks,
    backbone: VisionLanguageModel,
    hparams: SeracHparams,
    cases: Sequence[EditCase],
    others: Sequence[EditCase],
    source: Generator,
) -> dict[str, Tensor]:
    """Return the loss of the scope classifier and that of the answers; the networks share no parameter."""
    asked = choose(cases, source)
    edits = [*cases, *others]
    with torch.no_grad():
        batch = backbone.batch(asked.queries)
        prefix = backbone.prefix(batch, backbone.n_layers)
        requests = backbone.batch([case.request for case in edits])
    queries = codes(networks.scope, backbone, prefix.batch)
    known = codes(networks.scope, backbone, requests)
    pairs = _Pairs.of(asked, edits)
    score = networks.scope(queries, known)
    losses = {"scope": pairs.loss(score, hparams.training.scope_loss)}
    if hparams.training.composed:
        mixed = _composed(
            networks.scope,
            known,
            edits,
            len(cases),
            source,
        )
        if mixed is not None:
            mixed_score, mixed_pairs = mixed
            kind = hparams.training.scope_loss
            losses["composed"] = mixed_pairs.loss(mixed_score, kind)
    own = [row for row, about in enumerate(asked.is_about) if about]
    inside = backbone.select(prefix, own)
    with torch.no_grad():
        taught = backbone.batch([case.request for case in cases])
        states = backbone.prefix(taught, backbone.n_layers)
        answers = answers_of(
            backbone,
            states,
            hparams.answer_tokens,
            teach_end=hparams.teach_end,
        )
    case = torch.tensor(
        [asked.case[row] for row in own],
        device=queries.device,
    )
    changed = answered(
        networks,
        backbone,
        inside.hidden,
        answers.of(case),
    )
    at, labels = inside.batch.target_positions(
        backbone.end_id, with_end=hparams.teach_end
    )
    hidden = changed.to(inside.hidden.dtype)
    logits = backbone.resume(replace(inside, hidden=hidden), at)
    losses["answers"] = answer_loss(logits, labels[at])
    return losses


@dataclass(frozen=True)
class _Pairs:
    """Which edit each query is about, N for none: (R,); and the edits that are not judged for it: (R, N) bool.

    Another edit of the same thing may be as right, or not: the data do not say which.
    """

    right: Tensor
    unknown: Tensor

    @classmethod
    def of(cls, asked: Asked, edits: Sequence[EditCase]) -> _Pairs:
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


def _composed(
    scope: Scope,
    known: Tensor,
    edits: Sequence[EditCase],
    count: int,
    source: Generator,
) -> tuple[Tensor, _Pairs] | None:
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
    return score, _Pairs(
        torch.tensor(right),
        unknown,
    )
