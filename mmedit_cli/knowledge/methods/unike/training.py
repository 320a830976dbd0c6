"""How UniKE gathers its knowledge, the wrong answers of the model beside the right ones, and learns from it.

N triples (question, right answer, wrong answer), S edited layers, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.draws import one_of
from mmedit_cli.knowledge.methods.unike.networks import (
    Scope,
    UnikeNetworks,
    semantic_loss,
    truth_loss,
)
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query

_ANSWER_TOKENS = 16  # that the model is given to answer
_GROUP = 32  # queries of one forward pass


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
    """Ask the model every request; return the states of those that it answers wrongly (section 3.3, App. C).

    sem: on entering `layer`, at the last token of the question; pos, neg: the output of the attention of `layer` and
    of all above it, at the last token of the right answer and of the model's own.
    """
    distinct = {case.uid: case for case in cases}
    cases = list(distinct.values())
    answers = _answers(backbone, cases)
    wrong: list[EditCase] = []
    wrong_answers: list[Query] = []
    for case in cases:
        request = case.request
        answer = answers[replace(request, target="")]
        right = request.target.strip().lower()
        if answer and answer.lower() != right:
            wrong.append(case)
            wrong_answers.append(replace(request, target=answer))
    sem, pos = states(
        backbone,
        [case.request for case in wrong],
        layer,
    )
    _, neg = states(backbone, wrong_answers, layer)
    place = {case.uid: i for i, case in enumerate(wrong)}
    return Triples(
        place,
        sem,
        pos,
        neg,
    )


def _answers(
    backbone: VisionLanguageModel, cases: Sequence[EditCase]
) -> dict[Query, str]:
    """Return what the model answers to each distinct request; the queries are without a target."""

    def length(query: Query) -> int:
        encoded = backbone.encode(query, with_answer=False)
        return len(encoded.ids)

    questions = [replace(case.request, target="") for case in cases]
    distinct = list(dict.fromkeys(questions))
    distinct.sort(key=length)
    answers: dict[Query, str] = {}
    for group in chunks(distinct, _GROUP):
        generated = backbone.generate(group, max_new_tokens=_ANSWER_TOKENS)
        answers.update(zip(group, generated, strict=True))
    return answers


@torch.no_grad()
def states(
    backbone: VisionLanguageModel, queries: Sequence[Query], layer: int
) -> tuple[Tensor, Tensor]:
    """Return the states of questions, (N, D), and of their answers, (S, N, D), as `gather` says; float32."""
    layers = range(layer, backbone.n_layers)
    sem = [torch.zeros(0, backbone.width)]
    pos = [
        torch.zeros(
            len(layers),
            0,
            backbone.width,
        )
    ]
    for group in chunks(queries, _GROUP):
        batch = backbone.batch(group)
        prefix = backbone.prefix(batch, layer)
        outputs: list[Tensor] = []
        with Patch(backbone.model) as patch:
            for number in layers:
                path = backbone.anchors.path("attn", number)
                patch.hook(path, outputs.append)
            backbone.advance(prefix, backbone.n_layers)
        ends = prefix.batch.ends
        questions = prefix.hidden[last(prefix.batch.prompt_mask)]
        answers = torch.stack([output[ends] for output in outputs])
        sem.append(questions.float().cpu())
        pos.append(answers.float().cpu())
    device = backbone.device
    return torch.cat(sem).to(device), torch.cat(pos, 1).to(device)


def last(mask: Tensor) -> Tensor:
    """Return only the last of the marked positions of each row: (B, T) bool -> (B, T) bool."""
    from_the_end = mask.flip(1).cumsum(1).flip(1)
    return mask & (from_the_end == 1)


def encoder_losses(
    networks: UnikeNetworks,
    triples: Triples,
    cases: Sequence[EditCase],
    temperature: float,
) -> dict[str, Tensor]:
    """Return the losses of both encoders on the triples of these cases (eq. 4 and 5), the mean over the layers."""
    place = triples.place
    places = [place[case.uid] for case in cases if case.uid in place]
    if len(places) < 2:  # nothing to compare
        zero = networks.scope.bias * 0.0
        return {"truth": zero, "semantic": zero}
    sem = triples.sem[places]
    right = triples.pos[:, places]
    wrong = triples.neg[:, places]
    truth: list[Tensor] = []
    semantic: list[Tensor] = []
    for layer, encode in enumerate(networks.truth):  # eq. 4
        loss = truth_loss(
            encode(right[layer]),
            encode(wrong[layer]),
            temperature,
        )
        truth.append(loss)
    for layer, encode in enumerate(networks.semantic):  # eq. 5
        codes = encode(right[layer])
        wrong_codes = encode(wrong[layer])
        loss = semantic_loss(
            sem,
            codes,
            wrong_codes,
            temperature,
        )
        semantic.append(loss)
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
    """Return the cross entropy of choosing the edit that a query is about, or none.

    One query is drawn from each column of a case. Requests of other cases are edits too, so that there are many to
    choose among.
    """
    own: list[int] = []  # of each query the edit it is about, -1 for none
    queries: list[Query] = []
    for i, case in enumerate(cases):
        for column, candidates in case.columns():
            is_about = column.startswith(("reliability", "generality"))
            if is_about or column.startswith("locality"):
                own.append(i if is_about else -1)
                queries.append(one_of(candidates, source))
    requests = [case.request for case in (*cases, *others)]
    with torch.no_grad():
        batch = backbone.batch([*requests, *queries])
        prefix = backbone.prefix(batch, layer)
    features = scope(
        prefix.hidden,
        prefix.batch.prompt_mask,
        prefix.batch.image_mask,
    )
    n = len(requests)
    score = scope.score(features[n:], features[:n])
    no_edit = torch.zeros_like(score[:, :1])
    score = torch.cat((score, no_edit), 1)
    labels = [n if i < 0 else i for i in own]
    return F.cross_entropy(score, torch.tensor(labels, device=score.device))
