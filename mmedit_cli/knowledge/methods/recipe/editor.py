"""RECIPE: a few soft tokens in front of a question carry an edit; a learned prototype says which questions get any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.recipe.edits import make
from mmedit_cli.knowledge.methods.recipe.hparams import RecipeHparams
from mmedit_cli.knowledge.methods.recipe.networks import RecipeNetworks
from mmedit_cli.knowledge.methods.recipe.prompts import SoftPrompts
from mmedit_cli.knowledge.methods.recipe.training import losses_of
from mmedit_cli.knowledge.methods.shared.current_question import Decision
from mmedit_cli.knowledge.methods.shared.edit_rows import EditRows
from mmedit_cli.knowledge.methods.shared.question_features import question_features
from mmedit_cli.knowledge.methods.shared.routed_context import RoutedContext
from mmedit_cli.knowledge.methods.shared.row_editor import RowEditor
from mmedit_cli.knowledge.models.shared.batch import Batch
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query


class Recipe(RowEditor):
    """RECIPE (Chen et al., EMNLP 2024): an edit is a few soft tokens, which stand behind the picture of a question.

    A question is compared with every edit, by its words and its picture, once. The nearest edit answers if it is
    nearer than a learned prototype; else the question is read as it is, and the answer has the same bits. No weight
    changes.
    """

    name = "recipe"
    Hparams = RecipeHparams
    first_layer: ClassVar[None] = None  # the question itself gets longer
    architecture: ClassVar[tuple[str, ...]] = (
        "hidden_dim",
        "key_dim",
        "soft_tokens",
        "prototype_tokens",
        "answer_tokens",
    )
    hparams: RecipeHparams
    networks: RecipeNetworks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        backbone = self.backbone
        with self.untrained():
            self.networks = RecipeNetworks(
                backbone.width,
                backbone.entry_width,
                hp,
            )
        self._prompts = SoftPrompts(backbone, hp.soft_tokens)
        self._rows = EditRows(
            {
                "key": (hp.key_dim,),
                "soft": (hp.soft_tokens, backbone.width),
                "sees": (),
            }
        )
        self._patch = Patch(backbone.model)
        self._decision: Decision[list[int]] = Decision(backbone, "recipe")
        self._context = RoutedContext(
            backbone,
            self._about,
            lambda query, _place: self._prompts.marked(query),
        )

    # -- editing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        backbone = self.backbone
        # requests are read as they are, whatever edits there are
        self._context.detach()
        made = make(
            self.networks,
            backbone,
            requests,
            self.hparams.answer_tokens,
        )
        rows = {
            "key": made.keys,
            "soft": made.soft,
            "sees": made.sees,
        }
        self._add(rows, requests)
        return {}

    def _add(self, rows: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        if not len(self._rows):
            self._prompts.hook(self._patch, self._enter)
        self._rows.add(rows, requests)
        self._decision.forget()
        self._context.attach()

    def _reset(self) -> None:
        self._patch.undo()
        self._rows.clear()
        self._decision.forget()
        self._context.detach()

    # -- which edit answers ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _enter(self, hidden: Tensor) -> Tensor | None:
        """Put the soft tokens into what enters the first layer (B, T, D), where a whole question does."""
        decision = self._decision
        batch = decision.batch
        if not decision.is_due(hidden):
            # what is generated reads them in the cache
            return None
        places = self._context.places(batch.queries)
        rows = [row for row, place in enumerate(places) if place >= 0]
        if not rows:
            return None
        edits = [places[row] for row in rows]
        soft = self._rows.tensors["soft"][edits]
        return self._prompts.put(hidden, batch, rows, soft)

    def _about(self, batch: Batch) -> Tensor:
        """Return which edit each question of a batch is about, -1 for none: (B,)."""
        rows = self._rows
        found = question_features(
            self.backbone,
            batch,
        )
        scores = self.networks.scores(
            found,
            rows.tensors["key"],
            rows.tensors["sees"],
        )
        threshold = scores[:, -1] + self.hparams.margin
        hidden = rows.hidden.to(scores.device)
        of_edits = scores[:, :-1].masked_fill(
            hidden,
            float("-inf"),
        )
        best, place = of_edits.max(1)
        return torch.where(best > threshold, place, -1)

    def _places(self, queries: Sequence[Query]) -> list[int]:
        return self._context.places(queries)

    # -- training -----------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> Mapping[str, Sequence[float]]:
        """By how much an edit must be nearer than the prototype."""
        return {"margin": (-2.0, -1.0, 0.0, 1.0, 2.0)}

    def losses(
        self,
        cases: Sequence[EditCase],
        source: Generator,
        *,
        others: Sequence[EditCase] = (),
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, Tensor]:
        """Return the losses by name, and `total`, their weighted sum; see `recipe/training.py`.

        Each process computes all of it.
        """
        training = self.hparams.training
        losses = losses_of(
            self.networks,
            self.backbone,
            self._prompts,
            self.hparams,
            cases,
            others,
            source,
        )
        weights = {"answers": training.answers, "locality": training.locality}
        total = torch.zeros((), device=self.backbone.device)
        for name, loss in losses.items():
            total = total + weights.get(name, training.routing) * loss
        return {**losses, "total": total / world}


EDITOR = Recipe
