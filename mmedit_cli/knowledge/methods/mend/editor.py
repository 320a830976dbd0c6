"""MEND: trained networks turn the gradient of a request into a change of weights that also holds for rewordings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mmedit_cli.adapters import is_transposed
from mmedit_cli.errors import HparamsError, MmeditError
from mmedit_cli.knowledge.methods.base import TrainedEditor, check_shapes
from mmedit_cli.knowledge.methods.mend.gradients import (
    Aggregation,
    changes,
    request_rows,
)
from mmedit_cli.knowledge.methods.mend.hparams import MendHparams
from mmedit_cli.knowledge.methods.mend.networks import MendNetworks
from mmedit_cli.knowledge.methods.mend.training import (
    FrozenRows,
    Place,
    choose,
    in_groups,
    losses_of,
)
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.models.shared.anchors import sizes
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query

_COUNTED = 512  # requests, of which each has a row a token


class Mend(TrainedEditor):
    """MEND (Mitchell et al., ICLR 2022): small networks edit the gradient of a request, and it changes the weights.

    A gradient is a sum of outer products, one a token; the networks change their factors. Every request keeps its
    own change, and changes add up: of a request, of a batch, and of edits in a row. With `aggregate: ridge` the
    changes of one operation are joined by a ridge regression instead (MALMEN, Tan et al., ICLR 2024).
    """

    name = "mend"
    Hparams = MendHparams
    plain = True
    architecture: ClassVar[tuple[str, ...]] = (
        "layers",
        "roles",
        "rank",
        "depth",
    )
    hparams: MendHparams
    networks: MendNetworks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args,
            **kwargs,
        )
        hp = self.hparams
        backbone = self.backbone
        if hp.layers > backbone.n_layers:
            raise HparamsError(
                f"layers {hp.layers}: {backbone.name} has {backbone.n_layers}"
            )
        self._layer = backbone.n_layers - hp.layers
        self._shapes: dict[str, tuple[int, int]] = {}
        for layer in range(self._layer, backbone.n_layers):
            for role in hp.roles:
                path = backbone.anchors.path(
                    role,
                    layer,
                )
                linear = backbone.model.get_submodule(path)
                self._shapes[path] = sizes(linear)
        self._paths = list(self._shapes)
        with self.untrained():
            self.networks = MendNetworks(
                self._shapes,
                rank=hp.rank,
                depth=hp.depth,
                step_size=hp.step_size,
                pace=hp.training.step_size_pace,
            )
        by_regression = hp.aggregate == "ridge"
        self._aggregation = Aggregation(hp.ridge if by_regression else None)
        self._patch = Patch(backbone.model)
        # the sum of all changes of each matrix, (in, out), float32
        self._changes: dict[str, Tensor] = {}
        self._frozen: FrozenRows | None = None

    @property
    def first_layer(self) -> int:
        """The lowest edited layer."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        hp = self.hparams
        untouched = hp.chain == "base"
        rows = []
        losses = []
        with self._patch.lifted() if untouched else nullcontext():
            for part in chunks(requests, hp.batch_size):
                found, loss = request_rows(
                    self.backbone,
                    part,
                    self._layer,
                    self._paths,
                    teach_end=hp.teach_end,
                )
                rows += found
                losses.append(loss)
        self._add(changes(self.networks, rows, self._aggregation))
        return {"losses": losses}

    def _add(self, new: Mapping[str, Tensor]) -> None:
        """Add to the sum of all changes; each weight is then the untouched one and the sum, rounded once."""
        totals = {}
        for path, change in new.items():
            before = self._changes.get(path)
            total = change if before is None else before + change
            if not total.isfinite().all():
                raise MmeditError(
                    "mend: a weight became infinite",
                    "lower step_size",
                )
            totals[path] = total
        self._changes = totals
        with self._patch.lifted():
            edited = {path: self._edited(path) for path in totals}
        for path, weight in edited.items():
            self._patch.set_(f"{path}.weight", weight)

    def _edited(self, path: str) -> Tensor:
        """Return the weight of a matrix with the sum of all changes; the untouched one must be in its place."""
        parameter = self._patch.parameter(f"{path}.weight")
        weight = parameter.detach()
        linear = self.backbone.model.get_submodule(path)
        change = self._changes[path]
        change = change.to(weight.device)
        # GPT-2 keeps its matrices as (in, out)
        upright = change if is_transposed(linear) else change.T
        moved = weight.float() + upright
        return moved.to(weight.dtype)

    def _reset(self) -> None:
        self._patch.undo()
        self._changes = {}

    # -- training -----------------------------------------------------------------------------------------------

    def gather(self, cases: Sequence[EditCase]) -> str:
        """Let the normalisers see the gradients of requests from all over the training cases."""
        frozen = FrozenRows(
            self.backbone,
            self._layer,
            self._paths,
            teach_end=self.hparams.teach_end,
        )
        requests = [case.request for case in cases]
        counted = requests[:: -(-len(requests) // _COUNTED)]
        frozen.plan(counted)
        frozen.plan(requests)
        self.networks.count(frozen.of([request]) for request in counted)
        self._frozen = frozen
        return f"normalisers have seen the gradients of {len(counted)} requests"

    def losses(
        self,
        cases: Sequence[EditCase],
        source: Generator,
        *,
        others: Sequence[EditCase] = (),
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, Tensor]:
        """Return the loss of each column of the cases by name, and `total`; see `mend/training.py`."""
        hp = self.hparams
        if self._frozen is None:
            self.gather(cases)
        assert self._frozen is not None
        groups = in_groups(cases, hp.training.together)
        asked = choose(
            groups,
            source,
            reliability=hp.training.reliability > 0,
        )
        place = Place(
            self.backbone,
            self._layer,
            self._aggregation,
            hp.training,
            hp.teach_end,
            rank,
            world,
        )
        return losses_of(
            self.networks,
            self._frozen,
            place,
            groups,
            asked,
            others,
        )

    # -- saving -------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self._changes)

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        wanted = dict(self._shapes) if requests else {}
        held = f"the changes of {len(wanted)} matrices"
        check_shapes(
            tensors,
            wanted,
            held,
        )
        if requests:
            device = self.backbone.device
            found = {}
            for path, tensor in tensors.items():
                found[path] = tensor.to(device)
            self._add(found)


EDITOR = Mend
