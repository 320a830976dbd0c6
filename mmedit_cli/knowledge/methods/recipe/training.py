"""How the networks of RECIPE are trained: which edit a question is about, and what its soft tokens say (section 4.4).

B cases, the first edits; N edits with the others; R questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.recipe.edits import Made, make
from mmedit_cli.knowledge.methods.recipe.hparams import RecipeHparams
from mmedit_cli.knowledge.methods.recipe.networks import RecipeNetworks
from mmedit_cli.knowledge.methods.recipe.prompts import SoftPrompts
from mmedit_cli.knowledge.methods.shared.draws import one_of
from mmedit_cli.knowledge.methods.shared.losses import answer_kl
from mmedit_cli.knowledge.methods.shared.question_features import question_features
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.types import EditCase, Query


@dataclass(frozen=True)
class Asked:
    """What is asked of B cases: a question about each edit, another about it, and some that no edit is about.

    `first` and `second` have a question a case: the request and one drawn from its generality, in any order. `outside`
    has one from each column of locality, `outside_case` whose it is.
    """

    first: list[Query]
    second: list[Query]
    outside: list[Query]
    outside_case: list[int]


def choose(cases: Sequence[EditCase], source: Generator) -> Asked:
    """Draw the questions of a step."""
    asked = Asked([], [], [], [])
    for number, case in enumerate(cases):
        others = list(chain.from_iterable(case.generality.values()))
        pair = [case.request, one_of(others, source) if others else case.request]
        if int(torch.randint(2, (1,), generator=source)):
            pair.reverse()
        asked.first.append(pair[0])
        asked.second.append(pair[1])
        for queries in case.locality.values():
            if queries:
                asked.outside.append(one_of(queries, source))
                asked.outside_case.append(number)
    return asked


def losses_of(
    networks: RecipeNetworks,
    backbone: VisionLanguageModel,
    prompts: SoftPrompts,
    hparams: RecipeHparams,
    cases: Sequence[EditCase],
    others: Sequence[EditCase],
    source: Generator,
) -> dict[str, Tensor]:
    """Return the losses by name: three of routing, that of the answers, and that of what must not change."""
    asked = choose(cases, source)
    edits = [*cases, *others]
    requests = [case.request for case in edits]
    made = make(
        networks,
        backbone,
        requests,
        hparams.answer_tokens,
    )
    losses = _routing(
        networks,
        backbone,
        asked,
        edits,
        made,
        hparams.training.hinge,
    )
    inside = [*asked.first, *asked.second]
    soft = made.soft[: len(cases)]
    losses["answers"] = _answers(
        backbone,
        prompts,
        hparams,
        inside,
        torch.cat((soft, soft)),
    )
    if asked.outside:
        of_case = torch.tensor(asked.outside_case)
        losses["locality"] = _locality(
            backbone,
            prompts,
            asked.outside,
            soft[of_case],
        )
    return losses


# -- which edit a question is about -----------------------------------------------------------------------------------


def _routing(
    networks: RecipeNetworks,
    backbone: VisionLanguageModel,
    asked: Asked,
    edits: Sequence[EditCase],
    made: Made,
    hinge: float | None,
) -> dict[str, Tensor]:
    """Return three losses of choosing among N edits and the prototype, which is the last column.

    `own`: a question finds its edit. `prototype`: without its edit, it finds the prototype. `none`: what no edit is
    about finds the prototype.
    """
    count = len(asked.first)
    scores = []
    for questions in (asked.first, asked.second, asked.outside):
        if not questions:
            continue
        with torch.no_grad():
            batch = backbone.batch(questions, with_answer=False)
        found = question_features(backbone, batch)
        scores.append(networks.scores(found, made.keys, made.sees))
    own = torch.arange(count, device=made.keys.device)
    threshold = torch.full_like(own, len(edits))
    unknown = _unknown(range(count), edits).to(own.device)
    first = scores[0].masked_fill(unknown, float("-inf"))
    second = scores[1].masked_fill(unknown, float("-inf"))
    # the key of its own edit is not there
    second = second.index_put((own, own), second.new_tensor(float("-inf")))
    losses = {
        "own": F.cross_entropy(first, own),
        "prototype": hinged(second, threshold, hinge),
    }
    if asked.outside:
        rows = torch.full(
            (len(asked.outside),),
            len(edits),
            device=own.device,
        )
        unknown = _unknown(asked.outside_case, edits).to(own.device)
        outside = scores[2].masked_fill(unknown, float("-inf"))
        losses["none"] = hinged(outside, rows, hinge)
    return losses


def hinged(logits: Tensor, right: Tensor, hinge: float | None) -> Tensor:
    """Return the mean cross entropy of (n, V) and (n,), where what is right by far counts for nothing.

    That is where its probability is at least `hinge` times that of the next best; None: everything counts.
    """
    each = F.cross_entropy(
        logits,
        right,
        reduction="none",
    )
    if hinge is None:
        return each.mean()
    shares = logits.detach().softmax(-1)
    own = shares.gather(1, right[:, None])[:, 0]
    rest = shares.scatter(1, right[:, None], 0.0)
    open_still = own < hinge * rest.amax(1)
    return (each * open_still).mean()


def _unknown(of: Sequence[int], edits: Sequence[EditCase]) -> Tensor:
    """Return which edits are not judged for questions of these cases, (R, N + 1) bool: others of the same thing.

    Another edit of the same thing may be as right, or not: the data do not say which.
    """
    rows = []
    for case in of:
        concept = edits[case].concept
        row = [
            bool(concept) and number != case and other.concept == concept
            for number, other in enumerate(edits)
        ]
        rows.append([*row, False])
    return torch.tensor(rows)


# -- what the soft tokens say -----------------------------------------------------------------------------------------


def _answers(
    backbone: VisionLanguageModel,
    prompts: SoftPrompts,
    hparams: RecipeHparams,
    questions: Sequence[Query],
    soft: Tensor,
) -> Tensor:
    """Return the cross entropy of the answers to questions with these soft tokens: (R, P, D)."""
    with torch.no_grad():
        batch = backbone.batch([prompts.marked(query) for query in questions])
    at, labels = batch.target_positions(backbone.end_id, with_end=hparams.teach_end)
    rows = range(len(questions))
    with prompts.on(
        batch,
        rows,
        soft,
    ):
        prefix = backbone.prefix(batch, 0)
        logits = backbone.resume(prefix, at)
    return hinged(
        logits.float(),
        labels[at],
        hparams.training.hinge,
    )


def _locality(
    backbone: VisionLanguageModel,
    prompts: SoftPrompts,
    questions: Sequence[Query],
    soft: Tensor,
) -> Tensor:
    """Return KL(untouched || with soft tokens) over the answers to questions that no edit is about."""
    with torch.no_grad():
        plain = backbone.batch(questions)
        prefix = backbone.prefix(plain, 0)
        untouched = backbone.resume(
            prefix,
            plain.predicting,
        )
        batch = backbone.batch([prompts.marked(query) for query in questions])
    rows = range(len(questions))
    with prompts.on(
        batch,
        rows,
        soft,
    ):
        prefix = backbone.prefix(batch, 0)
        logits = backbone.resume(prefix, batch.predicting)
    return answer_kl(untouched, logits)
