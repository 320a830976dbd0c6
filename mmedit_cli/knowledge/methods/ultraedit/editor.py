"""UltraEdit: one backward pass and a ridge regression change the weights; nothing is trained, nothing is routed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from mmedit_cli.adapters import is_transposed
from mmedit_cli.errors import MmeditError, NotFinite, StateError
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.shared.answer_rows import AnswerRows
from mmedit_cli.knowledge.methods.shared.ridge import KeptKeys, ridge
from mmedit_cli.knowledge.methods.shared.running_moments import RunningMoments
from mmedit_cli.knowledge.methods.shared.side_effects import (
    Unrelated,
    unrelated_questions,
)
from mmedit_cli.knowledge.methods.ultraedit.hparams import UltraeditHparams
from mmedit_cli.knowledge.methods.ultraedit.turn import Turn
from mmedit_cli.knowledge.models.shared.anchors import sizes
from mmedit_cli.layers import layer_numbers
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query

_INVERSE = "inverse."
_MOMENTS = ("inputs", "gradients")
# a smaller change of the loss may be rounding: in low precision a short step is not seen
_VISIBLE = 1e-3
_ONCE_BYTES = 1 << 30  # of what enters the lowest edited layer, while it is asked


class Ultraedit(Editor):
    """UltraEdit (Gu et al., TMLR 2026): normalised gradients are the values of a ridge regression on the inputs.

    Published is one step of a fixed size for a turn of edits. Here the step is made longer while the loss falls and
    unrelated questions are answered as before, and may be repeated. `remember` and `keep` (ours) let the regression
    keep what the matrices say to the keys of earlier edits, and to unrelated questions.
    """

    name = "ultraedit"
    Hparams = UltraeditHparams
    hparams: UltraeditHparams
    plain = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        backbone = self.backbone
        depth = backbone.n_layers
        layers = layer_numbers(hp.layers, depth)
        self._layer = min(layer % depth for layer in layers)
        self._paths: list[str] = []
        for layer in layers:
            for role in hp.roles:
                path = backbone.anchors.path(role, layer)
                self._paths.append(path)
        self._patch = Patch(backbone.model)
        self._moments: dict[str, dict[str, RunningMoments]] = {}
        self._kept: dict[str, KeptKeys] = {}
        self._size = self.hparams.step_size
        self._unrelated: Unrelated | None = None
        self._start: dict[str, dict[str, RunningMoments]] = {}
        self._around: dict[str, KeptKeys] = {}

    @property
    def first_layer(self) -> int:
        """The lowest edited layer."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        hp = self.hparams
        unrelated = self._look_around()
        self._begin()
        earlier = self._drawn(source)
        turn = self._turn([*requests, *earlier])
        new = turn.tokens_of(len(requests))
        cap = unrelated.divergence() + hp.kl_cap * len(requests)
        losses: list[float] = []
        sizes: list[float] = []
        keys: dict[str, Tensor] = {}
        while True:
            found = turn.rows()
            losses.append(found.loss)
            reached = found.right and found.loss <= hp.stop_loss
            if reached or len(sizes) == hp.steps:
                break
            if not keys:
                self._take_in(found.rows, new)
                keys = _first_keys(found.rows, new)
            changes = self._changes(found.rows)
            size = self._descend(turn, changes, found.loss, cap, sizes)
            if not size:
                break
            sizes.append(size)
        if hp.remember:
            for path, rows in keys.items():
                self._kept[path].remember(rows)
        return {"losses": losses, "step_sizes": sizes, "reached": reached}

    def _drawn(self, source: Generator) -> list[Query]:
        """Draw at most `replay` earlier edits."""
        earlier = self.requests
        order = torch.randperm(
            len(earlier),
            generator=source,
        )
        drawn = order[: self.hparams.replay]
        return [earlier[i] for i in drawn.tolist()]

    def _turn(self, requests: Sequence[Query]) -> Turn:
        hp = self.hparams
        return Turn(
            self.backbone,
            requests,
            self._layer,
            self._paths,
            size=hp.batch_size,
            teach_end=hp.teach_end,
        )

    def _take_in(self, rows: Mapping[str, AnswerRows], new: int) -> None:
        """Let the normaliser see the first `new` rows of a turn before they are normalised."""
        for path, found in rows.items():
            moments = self._moments[path]
            inputs = found.inputs[:new]
            gradients = found.gradients[:new]
            moments["inputs"].add(inputs)
            moments["gradients"].add(gradients)

    def _changes(self, rows: Mapping[str, AnswerRows]) -> dict[str, Tensor]:
        """Return the change of each matrix for step size 1: (out, in), float32."""
        changes = {}
        for path, found in rows.items():
            keys = found.inputs.double()
            values = self._values(path, found)
            kept = self._kept.get(path)
            if kept is None:
                penalty = self.hparams.ridge
                change = ridge(
                    keys,
                    values,
                    penalty,
                )
            else:
                change = kept.ridge(keys, values)
            # GPT-2 keeps its matrices as (in, out)
            across = is_transposed(self.backbone.model.get_submodule(path))
            changes[path] = (change if across else change.T).float()
        return changes

    def _values(self, path: str, rows: AnswerRows) -> Tensor:
        """Return what the outputs are to change by, for step size 1: (n, out), float64 (eq. 3 and 4 of the paper)."""
        if self.hparams.values == "raw":
            return -len(rows.gradients) * rows.gradients.double()
        moments = self._moments[path]
        inputs = moments["inputs"].standardized(rows.inputs)
        gradients = moments["gradients"].standardized(rows.gradients)
        weights = inputs.square().sum(1, keepdim=True)
        return -weights * gradients

    # -- how far --------------------------------------------------------------------------------------------------

    def _descend(
        self,
        turn: Turn,
        changes: Mapping[str, Tensor],
        loss: float,
        cap: float,
        before: Sequence[float],
    ) -> float:
        """Change the weights; return the step size, 0 if none makes the loss smaller within the cap."""
        hp = self.hparams
        weights = {path: self._weight(path).detach().clone() for path in changes}
        size = before[-1] if before else self._size
        if not hp.search:
            self._move(weights, changes, size)
            return size
        best = 0.0
        factor = 2.0
        for _ in range(hp.trials):
            self._move(weights, changes, size)
            found, right = self._outcome(turn, loss, cap)
            if found < loss:
                best, loss = size, found
                if factor < 1 or (right and found <= hp.stop_loss):
                    break
            elif found > (1 + _VISIBLE) * loss:
                if best:
                    break
                factor = 0.5  # the first size was too long already
            size *= factor
        self._move(weights, changes, best)
        # the next edit begins near it, from below
        self._size = best / 2 or self._size
        return best

    def _outcome(self, turn: Turn, loss: float, cap: float) -> tuple[float, bool]:
        """Return the loss and whether every token is right; infinity if too much else changes for a smaller loss."""
        assert self._unrelated is not None
        worse = float("inf"), False
        try:
            found, right = turn.loss()
            if found < loss and self._unrelated.divergence() > cap:
                return worse
        except NotFinite:
            return worse
        return found, right

    def _move(
        self, weights: Mapping[str, Tensor], changes: Mapping[str, Tensor], size: float
    ) -> None:
        """Set the weights to those given and so much of the changes; in float32, however they are stored."""
        for path, weight in weights.items():
            moved = weight.float() + size * changes[path].to(weight.device)
            if not moved.isfinite().all():
                raise MmeditError(
                    "ultraedit: a weight became infinite", "lower step_size"
                )
            self._patch.set_(f"{path}.weight", moved.to(weight.dtype))

    def _weight(self, path: str) -> Tensor:
        return self._patch.parameter(f"{path}.weight")

    # -- everything else --------------------------------------------------------------------------------------------

    def _look_around(self) -> Unrelated:
        """Ask the untouched model the unrelated questions, once; return what it answers."""
        if self._unrelated is not None:
            return self._unrelated
        hp = self.hparams
        sees = self.backbone.sees
        questions = unrelated_questions(hp.unrelated, pictures=sees)
        watched = questions[: hp.watched]
        # those watched are surveyed too
        once = self.backbone.cached_activations(
            self._layer,
            questions,
            group=hp.batch_size,
            budget=_ONCE_BYTES,
        )
        with self._patch.lifted(), once:
            self._unrelated = Unrelated.ask(
                self.backbone,
                watched,
                self._layer,
            )
            self._survey(questions)
        return self._unrelated

    def _survey(self, questions: Sequence[Query]) -> None:
        """Start the normaliser, and the second moments of what is to be kept, with the rows of these questions."""
        hp = self.hparams
        found = self._turn(questions).rows()
        for path, rows in found.rows.items():
            moments = self._empty(path)
            if hp.warm:
                moments["inputs"].add(rows.inputs)
                moments["gradients"].add(rows.gradients)
            self._start[path] = moments
            if hp.remember or hp.keep:
                self._around[path] = self._kept_around(rows.inputs)

    def _kept_around(self, inputs: Tensor) -> KeptKeys:
        """Return what a matrix is to keep before the first edit, from what it reads of unrelated questions (n, in)."""
        hp = self.hparams
        keys = inputs.double()
        moment = keys.T @ keys / len(keys)
        identity = torch.eye(len(moment)).to(moment)
        return KeptKeys.of(hp.ridge * identity + hp.keep * moment)

    def _begin(self) -> None:
        """Before the first edit, start with what is known of unrelated questions."""
        hp = self.hparams
        if self._moments:
            return
        for path, moments in self._start.items():
            self._moments[path] = {}
            for name, start in moments.items():
                again = RunningMoments(
                    start.count,
                    start.mean,
                    start.squares,
                )
                self._moments[path][name] = again
            if hp.remember or hp.keep:
                around = self._around[path]
                self._kept[path] = KeptKeys(around.inverse)

    def _empty(self, path: str) -> dict[str, RunningMoments]:
        entering, width = sizes(self.backbone.model.get_submodule(path))
        device = self.backbone.device
        return {
            "inputs": RunningMoments.empty(entering, device),
            "gradients": RunningMoments.empty(width, device),
        }

    # -- taking back, saving ----------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._patch.undo()
        self._moments = {}
        self._kept = {}
        self._size = self.hparams.step_size

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self._patch.changed()
        tensors["step_size"] = torch.tensor(self._size, dtype=torch.float64)
        for path, moments in self._moments.items():
            for name, found in moments.items():
                for part, tensor in found.tensors().items():
                    tensors[f"{name}.{path}.{part}"] = tensor
        for path, kept in self._kept.items():
            tensors[_INVERSE + path] = kept.inverse
        return tensors

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        try:
            self._read(tensors)
        except (KeyError, ValueError) as error:
            raise StateError(f"the state does not fit this editor: {error}") from error

    def _read(self, tensors: Mapping[str, Tensor]) -> None:
        device = self.backbone.device
        hp = self.hparams
        self._size = float(tensors["step_size"])
        for path in self._paths:
            self._patch.set_(f"{path}.weight", tensors[f"{path}.weight"])
            self._moments[path] = {}
            for name in _MOMENTS:
                parts = [
                    tensors[f"{name}.{path}.{part}"].to(device)
                    for part in ("count", "mean", "squares")
                ]
                self._moments[path][name] = RunningMoments.from_tensors(*parts)
            if hp.remember or hp.keep:
                self._kept[path] = KeptKeys(tensors[_INVERSE + path].to(device).clone())


def _first_keys(rows: Mapping[str, AnswerRows], count: int) -> dict[str, Tensor]:
    """Return the first so many inputs of each matrix: (n, in), float64."""
    keys = {}
    for path, found in rows.items():
        first = found.inputs[:count]
        keys[path] = first.double()
    return keys


EDITOR = Ultraedit
