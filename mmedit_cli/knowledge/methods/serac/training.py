"""How the networks of SERAC are trained: which edit a query is about, if any, and how it is then answered.

B cases, the first edits; N edits with the others; R queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.serac.hparams import SeracHparams
from mmedit_cli.knowledge.methods.serac.memory import answered, answers_of
from mmedit_cli.knowledge.methods.serac.networks import SeracNetworks
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.methods.shared.scope import codes
from mmedit_cli.knowledge.methods.shared.scope_training import (
    ScopeCodes,
    choose,
    scope_losses,
)
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.types import EditCase


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
    losses = scope_losses(
        networks.scope,
        asked,
        edits,
        ScopeCodes(
            queries,
            known,
            len(cases),
        ),
        hparams.training.scope_loss,
        composed=hparams.training.composed,
        source=source,
    )
    own = [row for row, is_about in enumerate(asked.is_about) if is_about]
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
