"""LoRA: one adapter of peft, trained further by every edit and active for every question; the papers' baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.adapters import LoraLayers
from mmedit_cli.errors import MmeditError, StateError
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.shared import lora_adapters
from mmedit_cli.knowledge.methods.shared.lora_blocks import Blocks
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.models.shared.anchors import LinearRole
from mmedit_cli.layers import Layer, check_layers, layer_numbers
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query


@dataclass(frozen=True)
class LoraHparams:
    """See hparams/lora.yaml for what each value means and where it comes from."""

    layers: tuple[Layer, ...] = (0.47, 0.63, 0.79, 0.97)
    roles: tuple[LinearRole, ...] = ("attn_q", "attn_k", "attn_v", "attn_out")
    rank: int = 64
    alpha: float = 64.0
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    decay_every: int = 20
    decay: float = 0.5
    steps: int = 100
    stop_loss: float | None = None
    teach_end: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "learning_rate", "decay_every", "decay", "steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("layers", "roles"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        check_layers("layers", *self.layers)

    def at_depth(self, depth: int) -> LoraHparams:
        """Return these values for a model with so many decoder layers."""
        return replace(self, layers=layer_numbers(self.layers, depth))


class Lora(Editor):
    """LoRA as the baseline of Multi-MELO (BruthYU/MELO-V2): every edit trains the same adapter with a new optimiser.

    The layers below the lowest adapted one run once an edit. Undoing one edit makes the others again.
    """

    name = "lora"
    encoder_decoder = True
    Hparams = LoraHparams
    hparams: LoraHparams

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        anchors = self.backbone.anchors
        depth = self.backbone.n_layers
        layers = layer_numbers(hp.layers, depth)
        self._paths: list[str] = []
        for layer in layers:
            self._paths += [anchors.path(role, layer) for role in hp.roles]
        self._layer = min(layer % depth for layer in layers)
        self._patch = Patch(self.backbone.model)
        self._adapter: LoraLayers | None = None

    @property
    def first_layer(self) -> int:
        """The lowest adapted layer."""
        return self._layer

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        backbone = self.backbone
        batch = backbone.batch(requests)
        with torch.no_grad():
            prefix = backbone.prefix(batch, self._layer)  # lies below every adapter
        if self._adapter is None:
            self._adapt()
        at, right = batch.target_positions(
            backbone.end_id, with_end=self.hparams.teach_end
        )

        def loss_of() -> Tensor:
            logits = backbone.resume(prefix, at=at)
            return answer_loss(logits, right[at])

        parameters = self._parameters()
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            losses = self._descend(parameters, loss_of)
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
            raise
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        return {"losses": losses}

    def _descend(
        self, parameters: list[nn.Parameter], loss_of: Callable[[], Tensor]
    ) -> list[float]:
        """Take the steps of one edit, with an optimiser of its own; return the losses."""
        hp = self.hparams
        optimizer = torch.optim.AdamW(
            parameters,
            lr=hp.learning_rate,
            weight_decay=hp.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, hp.decay_every, hp.decay)
        losses: list[float] = []
        for _ in range(hp.steps):
            with torch.enable_grad():
                loss = loss_of()
            value = loss.item()
            losses.append(value)
            if not value < float("inf"):
                raise MmeditError(
                    f"lora: the loss became {value}", "lower learning_rate"
                )
            if hp.stop_loss is not None and value < hp.stop_loss:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return losses

    def _adapt(self) -> None:
        """Put a new adapter, which changes nothing yet, on the linear layers: the same whichever edit comes first."""
        hp = self.hparams
        ranks = dict.fromkeys(self._paths, hp.rank)
        alphas = dict.fromkeys(self._paths, hp.alpha)
        self._adapter = LoraLayers(
            self._patch,
            ranks,
            alphas,
            self.seed,
        )

    def _parameters(self) -> list[nn.Parameter]:
        assert self._adapter is not None
        return self._adapter.parameters()

    def _keep(self, positions: Sequence[int]) -> bool:
        """Return True if all edits stay, as after a failed edit, which restores the adapter itself; else False."""
        return len(positions) == len(self.requests)

    def _reset(self) -> None:
        self._patch.undo()
        self._adapter = None

    def save_adapters(self, folder: Path) -> dict[Path, tuple[Query, ...]]:
        """Write the adapter that all edits share."""
        if self._adapter is None:
            return {}
        pairs = self._adapter.pairs()
        downs = {path: down.T[None] for path, (down, _) in pairs.items()}
        ups = {path: up.T[None] for path, (_, up) in pairs.items()}
        hp = self.hparams
        path = folder / "lora"
        lora_adapters.write(
            path,
            Blocks(downs, ups),
            scale=hp.alpha / hp.rank,
            backbone=self.backbone,
        )
        return {path: tuple(self.requests)}

    def _tensors(self) -> dict[str, Tensor]:
        return {} if self._adapter is None else self._adapter.tensors()

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        self._adapt()
        assert self._adapter is not None
        own = self._adapter.tensors()
        expected = {name: tensor.shape for name, tensor in own.items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != expected:
            self._reset()
            raise StateError(
                f"the state does not hold an adapter of rank {self.hparams.rank} for these layers"
            )
        self._adapter.load(tensors)


EDITOR = Lora
