"""LoRA: one adapter of peft, trained further by every edit and active for every question; the papers' baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.editors import _lora_adapters
from mmedit_cli.editors._lora_blocks import Blocks
from mmedit_cli.editors._losses import answer_loss
from mmedit_cli.editors.base import Editor
from mmedit_cli.errors import MmeditError, StateError
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query


@dataclass(frozen=True)
class LoraHparams:
    """See hparams/lora.yaml for what each value means and where it comes from."""

    layers: tuple[int, ...] = (15, 20, 25, 31)
    roles: tuple[Literal["attn_q", "attn_k", "attn_v", "attn_out", "ffn_in", "ffn_out", "ffn_gate"], ...] = (
        "attn_q", "attn_k", "attn_v", "attn_out",
    )  # fmt: skip
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


class Lora(Editor):
    """LoRA as the baseline of Multi-MELO (BruthYU/MELO-V2): every edit trains the same adapter with a new optimiser.

    What lies below the lowest adapted layer is computed once an edit. Undoing one edit makes the others again.
    """

    name = "lora"
    Hparams = LoraHparams

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp, anchors, n = self.hparams, self.backbone.anchors, self.backbone.n_layers
        self._paths = [anchors.path(role, layer) for layer in hp.layers for role in hp.roles]
        self._layer = min(layer % n for layer in hp.layers)
        self._patch = Patch(self.backbone.model)
        self._adapters: nn.ModuleDict | None = None  # peft's layers, each around the linear layer in whose place it is

    @property
    def first_layer(self) -> int:
        """The lowest adapted layer."""
        return self._layer

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        hp, backbone = self.hparams, self.backbone
        batch = backbone.batch(requests)
        with torch.no_grad():
            prefix = backbone.prefix(batch, self._layer)  # lies below every adapter
        if self._adapters is None:
            self._adapt()
        at, right = batch.telling(backbone.end_id)
        if not hp.teach_end:
            at = batch.predicting
        parameters = self._parameters()
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=hp.learning_rate, weight_decay=hp.weight_decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, hp.decay_every, hp.decay)
        losses: list[float] = []
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for _ in range(hp.steps):
                with torch.enable_grad():
                    loss = answer_loss(backbone.resume(prefix, at=at), right[at])
                losses.append(loss.item())
                if not losses[-1] < float("inf"):
                    raise MmeditError(f"lora: the loss became {losses[-1]}", "lower learning_rate")
                if hp.stop_loss is not None and losses[-1] < hp.stop_loss:
                    break
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
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

    def _adapt(self) -> None:
        """Put a new adapter, which changes nothing yet, on the linear layers.

        peft wraps them outside the model, so it leaves no mark on anything but the dictionary they are in.
        """
        from peft import LoraConfig, inject_adapter_in_model

        hp, model = self.hparams, self.backbone.model
        linears = nn.ModuleDict({path.replace(".", "/"): model.get_submodule(path) for path in self._paths})
        config = LoraConfig(
            r=hp.rank, lora_alpha=hp.alpha, lora_dropout=0.0, bias="none", target_modules=list(linears)
        )
        with torch.random.fork_rng(devices=[]):  # peft draws from the global source
            torch.manual_seed(self.seed)  # the same start whichever edit comes first
            inject_adapter_in_model(config, linears)
        self._adapters = linears.eval()
        for parameter in self._parameters():
            parameter.requires_grad_(False)
        for path in self._paths:
            self._patch.replace(path, linears[path.replace(".", "/")])

    def _parameters(self) -> list[nn.Parameter]:
        assert self._adapters is not None
        return [p for name, p in self._adapters.named_parameters() if "lora_" in name]

    def _keep(self, positions: Sequence[int]) -> bool:
        """Return True where nothing goes: a failed edit has put the adapter back itself. No edit can go alone."""
        if not positions:
            self._reset()
        return len(positions) == len(self.requests)

    def _reset(self) -> None:
        self._patch.undo()
        self._adapters = None

    def save_adapters(self, folder: Path) -> dict[Path, tuple[Query, ...]]:
        """Write the adapter that all edits share."""
        if self._adapters is None:
            return {}
        layers = {path: self._adapters[path.replace(".", "/")] for path in self._paths}
        sides = (
            {path: getattr(layer, side)["default"].weight.T[None] for path, layer in layers.items()}
            for side in ("lora_A", "lora_B")
        )
        scale = self.hparams.alpha / self.hparams.rank
        _lora_adapters.write(folder / "lora", Blocks(*sides), scale, self.backbone.name)
        return {folder / "lora": tuple(self.requests)}

    def _tensors(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        if self._adapters is None:
            return {}
        return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(self._adapters).items()}

    def _load_tensors(self, tensors: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        from peft import set_peft_model_state_dict

        if not requests:
            return
        self._adapt()
        expected = {name: tensor.shape for name, tensor in self._tensors().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            self._reset()
            raise StateError(f"the state does not hold an adapter of rank {self.hparams.rank} for these layers")
        set_peft_model_state_dict(self._adapters, dict(tensors))


EDITOR = Lora
