"""How UniKE comes to know: the model's own wrong answers against the right ones, and what is learned from them.

N triples (question, right answer, wrong answer), S edited layers, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.unike.networks import (
    Scope,
    UnikeNetworks,
    semantic_loss,
    truth_loss,
)
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query

_ANSWER_TOKENS, _GROUP = 16, 32


@dataclass(frozen=True)
class Triples:
    """States of questions and of both answers: place of each case by uid; sem (N, D); pos, neg (S, N, D)."""

    place: dict[str, int]
    sem: Tensor
    pos: Tensor
    neg: Tensor


@torch.no_grad()
def gather(
    backbone: VisionLanguageModel, cases: Sequence[EditCase], layer: int
) -> Triples:
    """Ask the model every request; return the states of those it answers otherwise than it should.

    sem: on entering `layer`, at the last token of the question; pos, neg: what the attention of `layer` and of all
    above it says at the last token of the right answer and of the model's own.
    """
    cases = list({case.uid: case for case in cases}.values())
    asked = list(dict.fromkeys(replace(case.request, target="") for case in cases))
    asked.sort(key=lambda query: len(backbone.encode(query, with_answer=False).ids))
    said: dict[Query, str] = {}
    for group in _groups(asked):
        said.update(
            zip(
                group,
                backbone.generate(group, max_new_tokens=_ANSWER_TOKENS),
                strict=True,
            )
        )
    pairs = [(case, said[replace(case.request, target="")]) for case in cases]
    wrong = [
        (case, text)
        for case, text in pairs
        if text and text.lower() != case.request.target.strip().lower()
    ]
    sem, pos = states(backbone, [case.request for case, _ in wrong], layer)
    neg = states(
        backbone, [replace(case.request, target=text) for case, text in wrong], layer
    )[1]
    return Triples({case.uid: i for i, (case, _) in enumerate(wrong)}, sem, pos, neg)


@torch.no_grad()
def states(
    backbone: VisionLanguageModel, queries: Sequence[Query], layer: int
) -> tuple[Tensor, Tensor]:
    """Return the states of questions, (N, D), and of their answers, (S, N, D), as `gather` says; float32."""
    above = range(layer, backbone.n_layers)
    sem, pos = (
        [torch.zeros(0, backbone.width)],
        [torch.zeros(len(above), 0, backbone.width)],
    )
    for group in _groups(queries):
        prefix = backbone.prefix(backbone.batch(group), layer)
        said: list[Tensor] = []
        with Patch(backbone.model) as patch:
            for number in above:
                patch.hook(backbone.anchors.path("attn", number), said.append)
            backbone.advance(prefix, backbone.n_layers)
        sem.append(prefix.hidden[last(prefix.batch.prompt_mask)].float().cpu())
        pos.append(torch.stack([out[prefix.batch.ends] for out in said]).float().cpu())
    return torch.cat(sem).to(backbone.device), torch.cat(pos, 1).to(backbone.device)


def last(mask: Tensor) -> Tensor:
    """Return only the last of the marked positions of each row: (B, T) bool -> (B, T) bool."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def encoder_losses(
    networks: UnikeNetworks,
    triples: Triples,
    cases: Sequence[EditCase],
    temperature: float,
) -> dict[str, Tensor]:
    """Return the losses of both encoders on the triples of these cases (eq. 4 and 5), the mean over the layers."""
    places = [triples.place[case.uid] for case in cases if case.uid in triples.place]
    zero = networks.scope.bias * 0.0
    if len(places) < 2:  # nothing to compare
        return {"truth": zero, "semantic": zero}
    sem, pos, neg = triples.sem[places], triples.pos[:, places], triples.neg[:, places]
    truth = [
        truth_loss(net(p), net(n), temperature)
        for net, p, n in zip(networks.truth, pos, neg, strict=True)
    ]
    semantic = [
        semantic_loss(sem, net(p), net(n), temperature)
        for net, p, n in zip(networks.semantic, pos, neg, strict=True)
    ]
    return {
        "truth": torch.stack(truth).mean(),
        "semantic": torch.stack(semantic).mean(),
    }


def scope_loss(
    scope: Scope,
    backbone: VisionLanguageModel,
    layer: int,
    cases: Sequence[EditCase],
    others: Sequence[EditCase],
    source: Generator,
) -> Tensor:
    """Return the cross entropy of telling which edit a query is about, or none: one query of each column of a case.

    Requests of other cases are edits as well, so that edits are told apart among many.
    """
    asked: list[tuple[int, Query]] = []
    for i, case in enumerate(cases):
        for column, queries in case.columns():
            about = column == "reliability" or column.startswith("generality")
            if about or column.startswith("locality"):
                drawn = queries[
                    int(torch.randint(len(queries), (1,), generator=source))
                ]
                asked.append((i if about else -1, drawn))
    requests = [case.request for case in (*cases, *others)]
    with torch.no_grad():
        prefix = backbone.prefix(
            backbone.batch([*requests, *(query for _, query in asked)]), layer
        )
    features = scope(prefix.hidden, prefix.batch.prompt_mask, prefix.batch.image_mask)
    score = scope.score(features[len(requests) :], features[: len(requests)])
    score = torch.cat((score, torch.zeros_like(score[:, :1])), 1)
    right = torch.tensor(
        [len(requests) if i < 0 else i for i, _ in asked], device=score.device
    )
    return F.cross_entropy(score, right)


def _groups(queries: Sequence[Query]) -> Iterator[Sequence[Query]]:
    return (queries[i : i + _GROUP] for i in range(0, len(queries), _GROUP))
