"""SERAC: a classifier finds the edit that a question is about, and a small model answers; no weight changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mmedit_cli.errors import HparamsError
from mmedit_cli.knowledge.methods.serac.hparams import SeracHparams
from mmedit_cli.knowledge.methods.serac.memory import (
    Memory,
    answered,
    answers_of,
)
from mmedit_cli.knowledge.methods.serac.networks import SeracNetworks
from mmedit_cli.knowledge.methods.serac.training import losses_of
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.current_question import Decision
from mmedit_cli.knowledge.methods.shared.question_end import ends_of
from mmedit_cli.knowledge.methods.shared.row_editor import RowEditor
from mmedit_cli.knowledge.methods.shared.scope import codes
from mmedit_cli.knowledge.models.shared.batch import Batch
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query

_ASKED = 32  # queries that are routed at a time


class Serac(RowEditor):
    """SERAC (Mitchell et al., ICML 2022): edits are kept in a memory, and answer only what they are about.

    A scope classifier compares picture and prompt of a question with those of every edit, once a question. If none
    passes the threshold, the base model answers, with the same bits. Otherwise the counterfactual model answers from
    the edit that is nearest. Published are two language models that read text; here both networks are small and
    read what the frozen model computes anyway: its embeddings, and its last states.
    """

    name = "serac"
    Hparams = SeracHparams
    architecture: ClassVar[tuple[str, ...]] = (
        "hidden_dim",
        "prompt_dim",
        "detail_dim",
        "answer_dim",
    )
    hparams: SeracHparams
    networks: SeracNetworks
    _rows: Memory

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        backbone = self.backbone
        head = backbone.anchors.module("head").weight
        assert isinstance(head, Tensor)
        if head.shape[1] != backbone.width:
            raise HparamsError(
                f"serac: the head of {backbone.name} reads {head.shape[1]} values, its last layer writes "
                f"{backbone.width}"
            )
        with self.untrained():
            self.networks = SeracNetworks(
                backbone.width,
                backbone.entry_width,
                hp,
            )
        self._rows = Memory(
            backbone.width,
            self.networks.scope.width,
            hp.answer_tokens,
        )
        self._patch = Patch(backbone.model)
        self._decision: Decision[Tensor] = Decision(backbone, "serac")

    @property
    def first_layer(self) -> int:
        """Behind the last layer: only what enters the final norm changes."""
        return self.backbone.n_layers

    # -- editing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        backbone = self.backbone
        hp = self.hparams
        batch = backbone.batch(requests)
        prefix = backbone.prefix(batch, backbone.n_layers)
        kept = answers_of(
            backbone,
            prefix,
            hp.answer_tokens,
            teach_end=hp.teach_end,
        )
        rows = {
            "code": codes(self.networks.scope, backbone, prefix.batch),
            "states": kept.states,
            "words": kept.words,
            "used": kept.used,
        }
        self._add(rows, requests)
        return {}

    def _add(self, rows: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        if not len(self._rows):
            entered = self.backbone.anchors.tail[0]
            self._patch.hook_input(
                entered,
                self._answer,
            )
        self._rows.add(rows, requests)
        self._decision.forget()

    def _reset(self) -> None:
        self._patch.undo()
        self._rows.clear()
        self._decision.forget()

    # -- which edit answers ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _answer(self, hidden: Tensor) -> Tensor | None:
        """Replace the last states (B, T, D) of questions that are about an edit, from the end of the question on."""
        decision = self._decision
        batch = decision.batch
        whole = decision.is_due(hidden)
        if whole:
            decision.make(self._about(batch))
        # a token that is generated is answered by what its question was sent to
        about = decision.made
        rows = (about >= 0).nonzero()[:, 0]
        if not len(rows):
            return None
        states = hidden[rows]
        answers = self._rows.answers.of(about[rows])
        changed = answered(
            self.networks,
            self.backbone,
            states,
            answers,
        )
        changed = changed.to(hidden.dtype)
        if whole:
            places = torch.arange(hidden.shape[1], device=hidden.device)
            ends = ends_of(batch.prompt_mask[rows])
            behind = places >= ends[:, None]
            changed = torch.where(behind[..., None], changed, states)
        return hidden.index_copy(0, rows, changed)

    def _about(self, batch: Batch) -> Tensor:
        """Return which edit each query of a batch is about, -1 for none: (B,)."""
        scope = self.networks.scope
        queries = codes(scope, self.backbone, batch)
        return self._rows.about(
            scope,
            queries,
            self.hparams.threshold,
        )

    @torch.no_grad()
    def _places(self, queries: Sequence[Query]) -> list[int]:
        backbone = self.backbone
        found: dict[Query, int] = {}
        for part in chunks(backbone.by_length(queries), _ASKED):
            about = self._about(backbone.batch(part))
            found |= zip(part, about.tolist(), strict=True)
        return [found[query] for query in queries]

    # -- training -----------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> Mapping[str, Sequence[float]]:
        """The threshold of the scope classifier."""
        return {"threshold": (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0)}

    def losses(
        self,
        cases: Sequence[EditCase],
        source: Generator,
        *,
        others: Sequence[EditCase] = (),
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, Tensor]:
        """Return the losses of both networks by name, and `total`, their sum; see `serac/training.py`.

        The networks share no parameter, so no weights between them are needed; each process computes all of it.
        """
        losses = losses_of(
            self.networks,
            self.backbone,
            self.hparams,
            cases,
            others,
            source,
        )
        every = torch.stack(list(losses.values()))
        return {**losses, "total": every.sum() / world}


EDITOR = Serac
