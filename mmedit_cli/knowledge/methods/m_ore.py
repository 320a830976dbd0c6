"""M-ORE: LoRA with a fixed basis that avoids the directions earlier edits used; folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.errors import MmeditError
from mmedit_cli.knowledge.methods.base import Editor, check_shapes
from mmedit_cli.knowledge.methods.shared import lora_adapters
from mmedit_cli.knowledge.methods.shared.lora_blocks import Blocks
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.models.shared.anchors import FfnRole, check_upright
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.layers import Layer, check_layers, count_above
from mmedit_cli.patch import Patch
from mmedit_cli.runtime import generator
from mmedit_cli.types import Query


@dataclass(frozen=True)
class MOreHparams:
    """See hparams/m_ore.yaml for what each value means and where it comes from."""

    layers: Layer = 12
    roles: tuple[FfnRole, ...] = ("ffn_in", "ffn_out")
    rank: int = 512
    scale: float = 2.0
    active: int = 7
    learning_rate: float = 0.1
    memory: float = 2000.0
    steps: int = 5
    stop_loss: float | None = 1e-2
    teach_end: bool = True

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "rank",
            "scale",
            "active",
            "learning_rate",
            "memory",
            "steps",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not self.roles:
            raise ValueError("roles must name at least one")
        check_layers("layers", self.layers)

    def at_depth(self, depth: int) -> MOreHparams:
        """Return these values for a model with so many decoder layers."""
        count = count_above(self.layers, depth)
        return replace(self, layers=min(count, depth))


@dataclass(frozen=True)
class Pair:
    """What was learned for one linear layer: scale * b a is added to its weight.

    a: (r, in), fixed, its rows of length 1 and orthogonal; b: (out, r); free: (r, r), how far b may still move in each
    direction of the basis, the identity before the first edit.
    """

    a: Tensor
    b: Tensor
    free: Tensor


def basis(rank: int, width: int, source: Generator) -> Tensor:
    """Return orthogonal rows of length 1: (r, in); r is at most the width."""
    count = min(rank, width)
    columns = torch.randn(
        width,
        count,
        generator=source,
    )
    rotation, _ = torch.linalg.qr(columns)
    rows: Tensor = rotation.T.contiguous()
    return rows


def less_free(free: Tensor, z: Tensor, memory: float) -> Tensor:
    """Return P - (P z)(P z)^T / (memory + z^T P z), recursive least squares: (r, r), (r,) -> (r, r).

    After n of them P is the inverse of I + sum z z^T / memory.
    """
    used = free @ z
    size = memory + z @ used
    return free - torch.outer(used, used) / size


class MOre(Editor):
    """M-ORE (ICML 2026): each edit moves a fixed-basis LoRA of the layers with the largest gradients.

    Steps are multiplied by what is left free in the basis, so the cost of an edit and the memory do not grow. Nothing
    of an evaluation enters: the published code updates the matrix with the locality questions it is then judged by.
    The edited model is the same model with other weights. Undo makes the remaining edits again.
    """

    name = "m-ore"
    Hparams = MOreHparams
    hparams: MOreHparams
    plain = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        depth = self.backbone.n_layers
        count = int(self.hparams.layers)
        self._layer = depth - count
        self._paths: list[str] = []
        for layer in range(self._layer, depth):
            for role in self.hparams.roles:
                path = self.backbone.anchors.path(role, layer)
                check_upright(self.backbone.model, path, self.name)
                self._paths.append(path)
        self._patch = Patch(self.backbone.model)
        self._pairs: dict[str, Pair] = {}
        # as they were before the operation under way
        self._before: dict[str, Pair] = {}
        self._base: dict[str, Tensor] = {}

    @property
    def first_layer(self) -> int:
        """The lowest layer with a pair."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        self._before = dict(self._pairs)
        hp = self.hparams
        batch = self.backbone.batch(requests)
        with torch.no_grad():
            prefix = self.backbone.prefix(batch, self._layer)
        pairs = self._pairs or self._fresh()
        moved = {path: torch.zeros_like(pair.b) for path, pair in pairs.items()}
        used: dict[str, Tensor] = {}
        losses: list[float] = []
        for _ in range(hp.steps):
            one = self._step(prefix, pairs, moved)
            losses.append(one.loss)
            if hp.stop_loss is not None and one.loss < hp.stop_loss:
                break
            used |= one.used
            for path, change in one.changes.items():
                moved[path] -= hp.learning_rate * change
        learned: dict[str, Pair] = {}
        for path, pair in pairs.items():
            learned[path] = self._after(pair, moved[path], used.get(path))
        self._pairs = learned
        self._fold()
        return {"losses": losses}

    def _after(self, pair: Pair, moved: Tensor, used: Tensor | None) -> Pair:
        """Return a pair after an edit; `used` (n, r) are the directions that its n requests took, if it moved."""
        if used is None:
            return pair
        free = pair.free
        for z in used:
            free = less_free(free, z, self.hparams.memory)
        return Pair(pair.a, pair.b + moved, free)

    def _fresh(self) -> dict[str, Pair]:
        """Return pairs that change nothing yet: the same whichever edit comes first."""
        device = self.backbone.device
        source = generator(self.seed)
        pairs: dict[str, Pair] = {}
        for path in self._paths:
            linear: Any = self.backbone.model.get_submodule(path)
            a = basis(self.hparams.rank, linear.in_features, source)
            rank = len(a)
            pairs[path] = Pair(
                a=a.to(device),
                b=torch.zeros(linear.out_features, rank, device=device),
                free=torch.eye(rank, device=device),
            )
        return pairs

    def _step(
        self, prefix: Prefix, pairs: Mapping[str, Pair], moved: Mapping[str, Tensor]
    ) -> _Step:
        """Return the loss with what was moved so far, and the next change of the layers with the largest gradients."""
        hp = self.hparams
        batch = prefix.batch
        at, labels = batch.target_positions(self.backbone.end_id, with_end=hp.teach_end)
        inner: dict[str, Tensor] = {}
        trial = {path: b.clone().requires_grad_() for path, b in moved.items()}
        with torch.enable_grad(), Patch(self.backbone.model) as patch:
            for path, pair in pairs.items():
                add = partial(self._add, pair.a, trial[path], inner, path)
                patch.hook_call(path, add)
            logits = self.backbone.resume(prefix, at=at)
            loss = answer_loss(logits, labels[at])
            value = loss.item()
            if not value < float("inf"):
                raise MmeditError(
                    f"m-ore: the loss became {value}", "lower learning_rate"
                )
            found = torch.autograd.grad(loss, list(trial.values()))
        gradients = dict(zip(trial, found, strict=True))
        largest = _largest(gradients, hp.active)
        changes = {path: gradients[path] @ pairs[path].free for path in largest}
        used = {path: _mean_by_row(inner[path], at) for path in largest}
        return _Step(value, changes, used)

    def _add(
        self,
        a: Tensor,
        b: Tensor,
        inner: dict[str, Tensor],
        path: str,
        x: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Add what was moved to what leaves a linear layer, and note what the basis reads."""
        entering = x.float()
        read = F.linear(entering, a)
        inner[path] = read.detach()
        added = F.linear(read, b)
        added = self.hparams.scale * added
        return out + added.to(out.dtype)

    def _fold(self) -> None:
        """Write the pairs into the weights."""
        for path, pair in self._pairs.items():
            name = f"{path}.weight"
            if path not in self._base:
                weight = self._patch.parameter(name)
                self._base[path] = weight.detach().clone()
            base = self._base[path]
            change = self.hparams.scale * (pair.b @ pair.a)
            folded = base.float() + change
            self._patch.set_(
                name,
                folded.to(base.dtype),
            )

    def _keep(self, positions: Sequence[int]) -> bool:
        """Return True if all edits stay, as after a failed edit; else False: the others are made again."""
        if len(positions) < len(self.requests):
            return False
        self._pairs = self._before
        self._fold()
        return True

    def _reset(self) -> None:
        self._patch.undo()
        self._pairs = {}
        self._before = {}
        self._base = {}

    # -- saving -------------------------------------------------------------------------------------------------

    def save_adapters(self, folder: Path) -> dict[Path, tuple[Query, ...]]:
        """Write the pairs as one adapter, which all edits share."""
        if not self._pairs:
            return {}
        downs: dict[str, Tensor] = {}
        ups: dict[str, Tensor] = {}
        for layer, pair in self._pairs.items():
            downs[layer] = pair.a.T[None]
            ups[layer] = pair.b.T[None]
        path = folder / "m-ore"
        lora_adapters.write(
            path,
            Blocks(downs, ups),
            scale=self.hparams.scale,
            backbone=self.backbone,
        )
        return {path: tuple(self.requests)}

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path, pair in self._pairs.items():
            tensors[f"a.{path}"] = pair.a
            tensors[f"b.{path}"] = pair.b
            tensors[f"free.{path}"] = pair.free
        return tensors

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        device = self.backbone.device
        wanted: dict[str, tuple[int, ...]] = {}
        pairs: dict[str, Pair] = {}
        for path, pair in self._fresh().items():
            for name in ("a", "b", "free"):
                wanted[f"{name}.{path}"] = tuple(getattr(pair, name).shape)
        held = f"pairs of rank {self.hparams.rank} for these layers"
        check_shapes(tensors, wanted, held)
        for path in self._paths:
            pairs[path] = Pair(
                a=tensors[f"a.{path}"].to(device),
                b=tensors[f"b.{path}"].to(device),
                free=tensors[f"free.{path}"].to(device),
            )
        self._pairs = pairs
        self._fold()


@dataclass(frozen=True)
class _Step:
    """One look at the requests: the loss, and by path the next change (out, r) and the directions taken (n, r)."""

    loss: float
    changes: dict[str, Tensor]
    used: dict[str, Tensor]


def _largest(gradients: Mapping[str, Tensor], count: int) -> list[str]:
    """Return the layers with the largest gradients."""
    sizes: dict[str, float] = {}
    for path, gradient in gradients.items():
        size = gradient.norm()
        sizes[path] = float(size)
    ordered = sorted(
        sizes,
        key=sizes.__getitem__,
        reverse=True,
    )
    return ordered[:count]


def _mean_by_row(inner: Tensor, at: Tensor) -> Tensor:
    """Return the mean over the marked positions of each row: (B, T, r) or (B T, r), (B, T) bool -> (B, r)."""
    rank = inner.shape[-1]
    rows, length = at.shape
    by_sequence = inner.reshape(
        rows,
        length,
        rank,
    )
    here = at.unsqueeze(-1)
    marked = by_sequence * here
    number = here.sum(1)
    return marked.sum(1) / number


EDITOR = MOre
