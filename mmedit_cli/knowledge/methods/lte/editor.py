"""LTE: the fact stands in front of the questions it is about, and a trained LoRA follows what stands there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.lte.follower import LteNetworks
from mmedit_cli.knowledge.methods.lte.hparams import FACT, QUESTION, LteHparams
from mmedit_cli.knowledge.methods.lte.training import Teaching, losses_of
from mmedit_cli.knowledge.methods.shared.current_question import Decision
from mmedit_cli.knowledge.methods.shared.edit_rows import EditRows
from mmedit_cli.knowledge.methods.shared.routed_context import RoutedContext
from mmedit_cli.knowledge.methods.shared.row_editor import RowEditor
from mmedit_cli.knowledge.methods.shared.scope import about, codes
from mmedit_cli.knowledge.models.shared.anchors import sizes
from mmedit_cli.knowledge.models.shared.batch import Batch, joined
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query


class Lte(RowEditor):
    """LTE (Jiang et al., ACL 2024): the model is taught once to follow a fact in front of a question, or to ignore it.

    The fact that a question is about is retrieved by words and picture, once a question, and put in front of it; the
    follower is on for such questions alone. Any other is read as it is by the untouched model.
    """

    name = "lte"
    Hparams = LteHparams
    first_layer: ClassVar[None] = None  # the question itself changes
    architecture: ClassVar[tuple[str, ...]] = (
        "roles",
        "rank",
        "alpha",
        "hidden_dim",
        "prompt_dim",
        "detail_dim",
    )
    hparams: LteHparams
    networks: LteNetworks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backbone = self.backbone
        anchors = backbone.anchors
        shapes = {}
        for layer in range(backbone.n_layers):
            for role in self.hparams.roles:
                path = anchors.path(role, layer)
                linear = anchors.module(role, layer)
                shapes[path] = sizes(linear)
        with self.untrained():
            self.networks = LteNetworks(
                shapes,
                backbone.entry_width,
                self.hparams,
            )
        width = self.networks.scope.width
        self._rows = EditRows({"code": (width,)})
        self._facts: list[Query] = []
        self._patch = Patch(backbone.model)
        self._decision: Decision[list[int]] = Decision(backbone, "lte")
        self._context = RoutedContext(
            backbone,
            self._about,
            lambda query, place: self._told(self._facts[place], query),
        )

    def _told(self, fact: Query, query: Query) -> Query:
        """Return a question with a fact in front of it."""
        before, _, rest = self.hparams.template.partition(FACT)
        between, _, behind = rest.partition(QUESTION)
        answer = joined(fact)
        parts = (
            before,
            fact.prompt,
            answer,
            between,
            query.prompt,
            behind,
        )
        prompt = "".join(parts)
        return replace(query, prompt=prompt)

    # -- editing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        backbone = self.backbone
        # requests are read as they are, whatever edits there are
        self._context.detach()
        for request in requests:
            # what could never be read is refused before anything is kept
            backbone.encode(self._told(request, request))
        batch = backbone.batch(requests)
        rows = {"code": codes(self.networks.scope, backbone, batch)}
        self._add(rows, requests)
        return {}

    def _add(self, rows: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        if not len(self._rows):
            follower = self.networks.follower
            follower.hook(
                self._patch,
                self._followed,
            )
        self._rows.add(rows, requests)
        self._facts += requests
        self._context.attach()

    def _reset(self) -> None:
        self._patch.undo()
        self._rows.clear()
        self._facts = []
        self._context.detach()

    # -- which fact a question is about -------------------------------------------------------------------------

    def _followed(self) -> Tensor:
        """Return the rows of the batch in the forward pass that have a fact in front: (n,)."""
        batch = self._decision.batch
        places = self._context.places(batch.queries)
        rows = [row for row, place in enumerate(places) if place >= 0]
        return torch.tensor(
            rows,
            dtype=torch.long,
            device=self.backbone.device,
        )

    def _about(self, batch: Batch) -> Tensor:
        """Return which edit each question of a batch is about, -1 for none: (B,)."""
        scope = self.networks.scope
        asked = codes(
            scope,
            self.backbone,
            batch,
        )
        return about(
            scope,
            asked,
            self._rows.tensors["code"],
            self._rows.hidden,
            self.hparams.threshold,
        )

    def _places(self, queries: Sequence[Query]) -> list[int]:
        return self._context.places(queries)

    # -- training -----------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> Mapping[str, Sequence[float]]:
        """The threshold of the retrieval."""
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
        """Return the losses by name, and `total`, their weighted sum; see `lte/training.py`.

        Each process computes all of it.
        """
        training = self.hparams.training
        teaching = Teaching(
            self.networks,
            self.backbone,
            self.hparams,
            self._told,
        )
        losses = losses_of(
            teaching,
            cases,
            others,
            source,
        )
        weights = {"answers": training.answers, "locality": training.locality}
        total = torch.zeros((), device=self.backbone.device)
        for name, loss in losses.items():
            weight = weights.get(name, 1.0)
            total = total + weight * loss
        return {**losses, "total": total / world}


EDITOR = Lte
