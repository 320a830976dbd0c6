"""What MEMIT and AlphaEdit share: targets are learned, spread over some layers, and written by ridge regressions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from mmedit_cli.adapters import is_transposed
from mmedit_cli.errors import MmeditError, StateError
from mmedit_cli.knowledge.covariance import Tokens, ffn_moments
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.shared.answer_rows import layer_inputs, says
from mmedit_cli.knowledge.methods.shared.hidden_targets import (
    Lesson,
    TargetTraining,
    hidden_targets,
    states_at,
)
from mmedit_cli.knowledge.methods.shared.key_positions import Position, key_places
from mmedit_cli.knowledge.methods.shared.ridge import KeptKeys
from mmedit_cli.knowledge.methods.shared.side_effects import unrelated_questions
from mmedit_cli.layers import Layer, check_layers, layer_numbers, layer_of_model
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query

H = TypeVar("H", bound="KeyValueHparams")


@dataclass(frozen=True)
class KeyValueHparams:
    """Where keys are read and values written, and what the moments are made of."""

    layers: tuple[Layer, ...] = (0.125, 0.16, 0.19, 0.22, 0.25)
    position: Position = "last-prompt"
    answer_keys: bool = True
    remember: bool = True
    tokens: Tokens = "all"
    questions: int = 2000
    rounds: int = 1
    teach_end: bool = True
    target: TargetTraining = field(default_factory=TargetTraining)

    def __post_init__(self) -> None:
        for name in ("questions", "rounds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not self.layers:
            raise ValueError("layers must name at least one")
        check_layers("layers", *self.layers)

    def at_depth(self: H, depth: int) -> H:
        """Return these values for a model with so many decoder layers."""
        return replace(self, layers=layer_numbers(self.layers, depth))


class KeyValueEditor(Editor):
    """Writes (key, value) pairs into the last feed-forward matrices of some layers, lowest first.

    Published is one key a request; with `answer_keys` (ours) every token of the answer that is fed has one too, and
    the values of a request are learned together. A value is the state behind the highest of the layers that gives the
    new answer; each layer brings the state there nearer by an equal share of what is missing (MEMIT, Meng et al. 2023,
    eq. 18 to 20). A method says what M of its ridge regression is, and in which basis keys are seen.
    """

    hparams: Any
    plain = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backbone = self.backbone
        depth = backbone.n_layers
        layers = set()
        for layer in self.hparams.layers:
            number = layer_of_model(layer, depth, backbone.name)
            layers.add(number)
        self._layers = sorted(layers)
        self._patch = Patch(backbone.model)
        self._kept: dict[int, KeptKeys] = {}
        self._around: dict[int, KeptKeys] = {}
        self._bases: dict[int, Tensor] = {}

    @property
    def first_layer(self) -> int:
        """The lowest edited layer."""
        return self._layers[0]

    @abstractmethod
    def _kept_of(self, layer: int, moment: Tensor) -> KeptKeys:
        """Return what the matrix of a layer is to keep before the first edit, from its moment (F, F) in float64."""

    def _seen(self, layer: int, keys: Tensor) -> Tensor:
        """Return keys (n, F) in the basis of the layer's regression; by default as they are."""
        return keys

    def _back(self, layer: int, change: Tensor) -> Tensor:
        """Return a change (r, D) of the regression in the basis of the keys: (F, D)."""
        return change

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        self._begin()
        lesson = self._lesson(requests)
        losses: list[list[float]] = [[] for _ in requests]
        missed: list[float] = []
        keys: dict[int, Tensor] = {}
        for _ in range(self.hparams.rounds):
            targets, courses = self._targets(lesson)
            for course, more in zip(losses, courses, strict=True):
                course += more
            keys = self._spread(lesson, targets)
            left = targets - self._states(lesson)
            missed.append(_relative(left, targets))
            if self._reached(lesson):
                break
        if self.hparams.remember:
            for layer, seen in keys.items():
                self._kept[layer].remember(seen)
        return {"losses": losses, "missed": missed}

    def _targets(self, lesson: Lesson) -> tuple[Tensor, list[list[float]]]:
        """Return the states that give the new answers, (n, D), and the losses of each request on the way there."""
        targets, losses = hidden_targets(
            self.backbone,
            lesson,
            self._layers[-1],
            self.hparams.target,
        )
        if not targets.isfinite().all():
            raise MmeditError(
                f"{self.name}: a target became infinite", "lower target.learning_rate"
            )
        return targets, losses

    def _spread(self, lesson: Lesson, targets: Tensor) -> dict[int, Tensor]:
        """Change each matrix by its share of what is missing, the lowest first; return the keys that each saw."""
        keys: dict[int, Tensor] = {}
        layers_left = len(self._layers)
        for layer in self._layers:
            missing = targets - self._states(lesson)
            entering = self._keys(lesson, layer)
            keys[layer] = self._seen(layer, entering)
            share = missing / layers_left
            self._write(layer, keys[layer], share)
            layers_left -= 1
        return keys

    def _states(self, lesson: Lesson) -> Tensor:
        """Return what leaves the highest edited layer now, where the keys are read: (n, D)."""
        return states_at(
            self.backbone,
            lesson,
            self._layers[-1],
        )

    @torch.no_grad()
    def _reached(self, lesson: Lesson) -> bool:
        """Whether every token of every answer is the likeliest one now."""
        logits = self.backbone.resume(lesson.prefix, lesson.at)
        answers = lesson.labels[lesson.at]
        return says(logits, answers)

    def _lesson(self, requests: Sequence[Query]) -> Lesson:
        backbone = self.backbone
        batch = backbone.batch(requests)
        with torch.no_grad():
            prefix = backbone.prefix(batch, self.first_layer)
        at, labels = batch.target_positions(
            backbone.end_id, with_end=self.hparams.teach_end
        )
        said = at if self.hparams.answer_keys else torch.zeros_like(at)
        places = key_places(
            backbone,
            batch,
            self.hparams.position,
            said,
        )
        return Lesson(prefix, places, at, labels)

    def _keys(self, lesson: Lesson, layer: int) -> Tensor:
        """Return what enters the matrix of a layer at the places of the keys: (n, F) float64."""
        path = self.backbone.anchors.path("ffn_out", layer)
        inputs = layer_inputs(
            self.backbone,
            lesson.prefix,
            lesson.places,
            [path],
        )
        return inputs[path].double()

    def _write(self, layer: int, seen: Tensor, values: Tensor) -> None:
        """Change the matrix of a layer so that keys, as its regression sees them, give values (n, D) more."""
        kept = self._kept[layer]
        change = self._back(layer, kept.ridge(seen, values.double()))
        # GPT-2 keeps its matrices as (in, out)
        if not is_transposed(self.backbone.anchors.module("ffn_out", layer)):
            change = change.T
        name = self._name(layer)
        weight = self._patch.parameter(name).detach()
        moved = weight.float() + change.to(weight.device).float()
        if not moved.isfinite().all():
            raise MmeditError(
                f"{self.name}: a weight became infinite", "lower target.clamp"
            )
        self._patch.set_(name, moved.to(weight.dtype))

    def _name(self, layer: int) -> str:
        return self.backbone.anchors.path("ffn_out", layer) + ".weight"

    def _begin(self) -> None:
        """Before the first edit, find out what is to be kept."""
        if self._kept:
            return
        if not self._around:
            moments = self._moments()
            for layer, moment in moments.items():
                kept = self._kept_of(layer, moment)
                self._around[layer] = kept
        for layer, around in self._around.items():
            inverse = around.inverse
            self._kept[layer] = KeptKeys(inverse)

    def _moments(self) -> dict[int, Tensor]:
        """Return the second moment (F, F) of each layer on the untouched model, float64."""
        hp = self.hparams
        sees = self.backbone.sees
        questions = unrelated_questions(hp.questions, pictures=sees)
        with self._patch.lifted():
            found = ffn_moments(self.backbone, questions, self._layers, hp.tokens)
        device = self.backbone.device
        moments = {}
        for layer, matrix in found.matrices.items():
            there = matrix.to(device)
            moments[layer] = there.double()
        return moments

    # -- taking back, saving ----------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._patch.undo()
        self._kept = {}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self._patch.changed()
        if not self.hparams.remember:
            return tensors
        for layer, kept in self._kept.items():
            key = f"kept.{layer}"
            tensors[key] = kept.inverse
        return tensors

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        device = self.backbone.device
        try:
            for layer in self._layers:
                name = self._name(layer)
                self._patch.set_(name, tensors[name])
                if self.hparams.remember:
                    inverse = tensors[f"kept.{layer}"].to(device)
                    self._kept[layer] = KeptKeys(inverse.clone())
        except (KeyError, ValueError) as error:
            raise StateError(f"the state does not fit this editor: {error}") from error


def _relative(left: Tensor, whole: Tensor) -> float:
    """Return the length of what is left relative to the whole, the mean over rows."""
    shares = left.norm(dim=1) / whole.norm(dim=1).clamp_min(1e-12)
    return float(shares.mean())
