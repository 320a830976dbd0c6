"""How LTE is trained: which fact a question is about, to answer by it, and to ignore one it is not about.

B cases, the first edits; N edits with the others; R queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.lte.follower import LteNetworks
from mmedit_cli.knowledge.methods.lte.hparams import LteHparams
from mmedit_cli.knowledge.methods.shared.losses import answer_kl, answer_loss
from mmedit_cli.knowledge.methods.shared.scope import codes
from mmedit_cli.knowledge.methods.shared.scope_training import (
    ScopeCodes,
    choose,
    scope_losses,
)
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.types import EditCase, Query


@dataclass(frozen=True)
class Teaching:
    """What is trained, on what, and how a fact is put in front of a question: `told(fact, question)`."""

    networks: LteNetworks
    backbone: VisionLanguageModel
    hparams: LteHparams
    told: Callable[[Query, Query], Query]


def losses_of(
    teaching: Teaching,
    cases: Sequence[EditCase],
    others: Sequence[EditCase],
    source: Generator,
) -> dict[str, Tensor]:
    """Return the losses by name: those of the retrieval, of the answers, and of what must not change."""
    backbone = teaching.backbone
    training = teaching.hparams.training
    scope = teaching.networks.scope
    asked = choose(cases, source)
    edits = [*cases, *others]
    with torch.no_grad():
        batch = backbone.batch(asked.queries)
        requests = backbone.batch([case.request for case in edits])
    known = ScopeCodes(
        codes(scope, backbone, batch),
        codes(scope, backbone, requests),
        len(cases),
    )
    losses = scope_losses(
        scope,
        asked,
        edits,
        known,
        training.scope_loss,
        composed=training.composed,
        source=source,
    )
    inside: list[tuple[Query, Query]] = []
    outside: list[tuple[Query, Query]] = []
    for query, case, is_about in zip(
        asked.queries,
        asked.case,
        asked.is_about,
        strict=True,
    ):
        pair = (cases[case].request, query)
        group = inside if is_about else outside
        group.append(pair)
    losses["answers"] = answers(teaching, inside)
    if outside:
        losses["locality"] = locality(teaching, outside)
    return losses


def answers(teaching: Teaching, pairs: Sequence[tuple[Query, Query]]) -> Tensor:
    """Return the cross entropy of the answers to questions with the fact that they are about in front."""
    backbone = teaching.backbone
    told = [teaching.told(fact, query) for fact, query in pairs]
    with torch.no_grad():
        batch = backbone.batch(told)
    at, labels = batch.target_positions(
        backbone.end_id,
        with_end=teaching.hparams.teach_end,
    )
    logits = _followed(
        teaching,
        told,
        at,
    )
    return answer_loss(logits, labels[at])


def locality(teaching: Teaching, pairs: Sequence[tuple[Query, Query]]) -> Tensor:
    """Return KL(untouched || follower) over the answers to questions with a fact in front that they are not about."""
    backbone = teaching.backbone
    told = [teaching.told(fact, query) for fact, query in pairs]
    with torch.no_grad():
        plain = backbone.batch([query for _, query in pairs])
        prefix = backbone.prefix(plain, 0)
        untouched = backbone.resume(
            prefix,
            plain.predicting,
        )
        batch = backbone.batch(told)
    logits = _followed(
        teaching,
        told,
        batch.predicting,
    )
    return answer_kl(untouched, logits)


def _followed(teaching: Teaching, told: Sequence[Query], at: Tensor) -> Tensor:
    """Return the logits at positions (R, T) of questions that are all followed: (n, V)."""
    backbone = teaching.backbone
    batch = backbone.batch(told)
    rows = torch.arange(
        len(told),
        device=backbone.device,
    )
    follower = teaching.networks.follower
    with follower.on(
        backbone.model,
        rows,
    ):
        prefix = backbone.prefix(batch, 0)
        return backbone.resume(prefix, at)
