"""Fine-tuning: gradient descent on the last FFN matrix of the language model, or on the connector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.errors import DataError, MmeditError, StateError
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.layers import Layer, check_layers, layer_numbers
from mmedit_cli.patch import Patch, trainable
from mmedit_cli.types import Query


@dataclass(frozen=True)
class FtHparams:
    """See hparams/ft.yaml for what each value means and where it comes from."""

    target: Literal["lm", "connector"] = "lm"
    layers: tuple[Layer, ...] = (-1,)
    steps: int = 25
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    norm_constraint: float | None = None
    batch_size: int = 1
    stop_loss: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.norm_constraint is not None and self.norm_constraint <= 0:
            raise ValueError(
                f"norm_constraint must be above 0 or null, not {self.norm_constraint}"
            )
        if not self.layers:
            raise ValueError("layers must name at least one layer")
        check_layers("layers", *self.layers)

    def at_depth(self, depth: int) -> FtHparams:
        """Return these values for a model with so many decoder layers."""
        return replace(self, layers=layer_numbers(self.layers, depth))


class Ft(Editor):
    """FT-L and FT-M as published with LiveEdit (Chen et al. 2025): AdamW on the cross entropy of the target.

    A pass takes one step for each chunk of `batch_size` requests. A step whose loss is below `stop_loss` is skipped.
    The edit ends with the pass whose mean loss is below it. The layers below the edited matrices run once an edit.
    """

    name = "ft"
    encoder_decoder = True
    Hparams = FtHparams
    hparams: FtHparams
    plain = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        anchors = self.backbone.anchors
        self._patch = Patch(self.backbone.model)
        if hp.target == "lm":
            depth = self.backbone.n_layers
            layers = layer_numbers(hp.layers, depth)
            self._layers = sorted({layer % depth for layer in layers})
            paths = [anchors.path("ffn_out", layer) for layer in layers]
            self._names = [f"{path}.weight" for path in paths]
        else:
            path = anchors.path("connector")
            parameters = dict(anchors.module("connector").named_parameters())
            self._names = [f"{path}.{name}" for name in parameters]

    @property
    def first_layer(self) -> int | None:
        """The lowest edited layer; None for the connector, whose output is the image features."""
        return self._layers[0] if self.hparams.target == "lm" else None

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        hp = self.hparams
        no_image = any(request.image is None for request in requests)
        if hp.target == "connector" and no_image:
            raise DataError(
                "ft on the connector needs an image in every request",
                "use target: lm for text-only edits",
            )
        losses_of = [self._prepare(part) for part in chunks(requests, hp.batch_size)]
        weights = [self._patch.parameter(name) for name in self._names]
        # steps are taken on float32 copies: in bfloat16 a step of 1e-3 would mostly round to nothing
        copies = [weight.detach().float().clone() for weight in weights]
        start = [copy.clone() for copy in copies]
        optimizer = torch.optim.AdamW(
            copies, lr=hp.learning_rate, weight_decay=hp.weight_decay
        )
        losses: list[float] = []
        for _ in range(hp.steps):
            for loss_of in losses_of:
                loss = self._step(
                    loss_of,
                    weights,
                    copies,
                    start,
                    optimizer,
                )
                losses.append(loss)
            latest = losses[-len(losses_of) :]
            if sum(latest) / len(latest) < hp.stop_loss:
                break
        return {"losses": losses}

    def _step(
        self,
        loss_of: Callable[[], Tensor],
        weights: list[nn.Parameter],
        copies: list[Tensor],
        start: list[Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> float:
        """Take one step unless the loss is small already; return the loss before it."""
        with trainable(weights):
            loss = loss_of()
            value = loss.item()
            if not value < float("inf"):
                raise MmeditError(f"ft: the loss became {value}", "lower learning_rate")
            if value < self.hparams.stop_loss:
                return value
            gradients = torch.autograd.grad(
                loss,
                weights,
                allow_unused=True,
            )
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = None if gradient is None else gradient.float()
        optimizer.step()
        bound = self.hparams.norm_constraint
        with torch.no_grad():
            for weight, copy, origin in zip(weights, copies, start, strict=True):
                if bound is not None:
                    copy.copy_(
                        torch.clamp(
                            copy,
                            origin - bound,
                            origin + bound,
                        )
                    )
                weight.copy_(copy)
        return value

    def _prepare(self, requests: Sequence[Query]) -> Callable[[], Tensor]:
        """Compute what stays frozen during the edit; return a function for the loss with the present weights."""
        backbone = self.backbone
        batch = backbone.batch(requests)
        if self.first_layer is not None:
            with torch.no_grad():
                prefix = backbone.prefix(batch, self.first_layer)

            def loss_above() -> Tensor:
                logits = backbone.resume(prefix, at=batch.predicting)
                return answer_loss(logits, batch.answers)

            return loss_above

        below: dict[str, _Recorded] = {}
        for path in backbone.anchors.below_connector:
            module = backbone.model.get_submodule(path)
            below[path] = _Recorded(module)

        def recorded(run: Callable[[], Tensor]) -> Tensor:
            with Patch(backbone.model) as patch:
                for path, module in below.items():
                    patch.replace(path, module)
                return run()

        def loss() -> Tensor:
            logits = backbone.logits(batch)
            return answer_loss(logits[batch.predicting], batch.answers)

        with torch.no_grad():
            recorded(lambda: backbone.embed(batch))
        return lambda: recorded(loss)

    def _reset(self) -> None:
        self._patch.undo()

    def _tensors(self) -> dict[str, Tensor]:
        return self._patch.changed()

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        others = set(tensors) - set(self._names)
        if others:
            raise StateError(f"the state changes {min(others)}, this editor does not")
        for name, tensor in tensors.items():
            self._patch.set_(name, tensor)


class _Recorded(nn.Module):
    """A module that runs once and then repeats its output: the frozen part of an edit of the connector."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # in a list, so that it is no child of the model it stands in
        self._module = [module]
        self._output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._output is None:
            self._output = self._module[0](*args, **kwargs)
        return self._output


EDITOR = Ft
