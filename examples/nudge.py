"""Nudge: a few steps of gradient descent on the last FFN matrix, all of the same length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from mmedit_cli.errors import StateError
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.patch import Patch, trainable
from mmedit_cli.types import Query


@dataclass(frozen=True)
class NudgeHparams:
    """See nudge.yaml."""

    steps: int = 10
    step_length: float = 0.3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be above 0, not {self.steps}")
        if self.step_length <= 0:
            raise ValueError(f"step_length must be above 0, not {self.step_length}")


class Nudge(Editor):
    """Moves one matrix down the gradient of the answer's cross entropy, by `step_length` a step."""

    name = "nudge"
    Hparams = NudgeHparams
    plain = True  # the edited model is the same model with other weights

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patch = Patch(self.backbone.model)
        self._weight_name = self.backbone.anchors.path("ffn_out", -1) + ".weight"

    @property
    def first_layer(self) -> int:
        """The last layer: nothing below it changes."""
        return self.backbone.n_layers - 1

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        batch = self.backbone.batch(requests)
        weight = self._patch.parameter(self._weight_name)
        losses = []
        for _ in range(self.hparams.steps):
            with trainable([weight]):
                logits = self.backbone.logits(batch)[batch.predicting]
                loss = answer_loss(logits, batch.answers)
                (gradient,) = torch.autograd.grad(loss, [weight])
            with torch.no_grad():
                weight -= self.hparams.step_length * gradient / gradient.norm()
            losses.append(loss.item())
        return {"losses": losses}

    def _reset(self) -> None:
        self._patch.undo()

    def _tensors(self) -> dict[str, Tensor]:
        return self._patch.changed()

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        for name, tensor in tensors.items():
            if name != self._weight_name:
                raise StateError(f"the state changes {name}, nudge does not")
            self._patch.set_(name, tensor)


EDITOR = Nudge
