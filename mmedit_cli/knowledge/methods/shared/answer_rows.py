"""What linear layers read where an answer is predicted, and the gradient of the loss at their outputs there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.patch import Patch


@dataclass(frozen=True)
class AnswerRows:
    """Rows of one linear layer, one a position of a sequence: inputs (n, in) and gradients (n, out)."""

    inputs: Tensor
    gradients: Tensor


def joined(parts: Sequence[AnswerRows]) -> AnswerRows:
    """Return the rows of several parts of a batch as one, in order."""
    inputs = []
    gradients = []
    for part in parts:
        inputs.append(part.inputs)
        gradients.append(part.gradients)
    return AnswerRows(
        torch.cat(inputs),
        torch.cat(gradients),
    )


@dataclass(frozen=True)
class Answered:
    """A pass over a batch: the mean loss, whether every token is right, and the rows of each layer."""

    loss: float
    right: bool
    rows: dict[str, AnswerRows]


def answer_rows(
    backbone: VisionLanguageModel,
    prefix: Prefix,
    at: Tensor,
    answers: Tensor,
    paths: Sequence[str],
    *,
    where: Tensor | None = None,
) -> Answered:
    """Return the rows of the linear layers `paths` for the mean cross entropy of `answers` (n,) at `at` (B, T) bool.

    There is a row for each position of `where`, (B, T) bool, by default of `at`. All layers share one backward pass;
    no parameter gets a gradient.
    """
    count = len(prefix.batch.queries)
    kept = at if where is None else where
    inputs: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}

    def probe(path: str) -> Callable[[Tensor, Tensor], Tensor]:
        def record(entering: Tensor, leaving: Tensor) -> Tensor:
            nothing = torch.zeros_like(leaving).requires_grad_(True)
            inputs[path] = _at(entering.detach(), kept, count)
            probes[path] = nothing
            return leaving + nothing

        return record

    with torch.enable_grad(), Patch(backbone.model) as patch:
        for path in paths:
            patch.hook_call(path, probe(path))
        logits = backbone.resume(prefix, at)
        loss = answer_loss(logits, answers)
        found = torch.autograd.grad(loss, [probes[path] for path in paths])
    rows = {}
    for path, gradient in zip(paths, found, strict=True):
        rows[path] = AnswerRows(inputs[path], _at(gradient, kept, count))
    return Answered(loss.item(), says(logits, answers), rows)


def says(logits: Tensor, answers: Tensor) -> bool:
    """Whether the likeliest token is right at every position: logits (n, V), answers (n,)."""
    return bool((logits.argmax(-1) == answers).all())


def layer_inputs(
    backbone: VisionLanguageModel, prefix: Prefix, at: Tensor, paths: Sequence[str]
) -> dict[str, Tensor]:
    """Return what each of the modules `paths` reads at `at` (B, T) bool: (n, in) each."""
    count = len(prefix.batch.queries)
    inputs: dict[str, Tensor] = {}

    def record(path: str) -> Callable[[Tensor], None]:
        def keep(entering: Tensor) -> None:
            inputs[path] = _at(
                entering,
                at,
                count,
            )

        return keep

    with torch.no_grad(), Patch(backbone.model) as patch:
        for path in paths:
            patch.hook_input(path, record(path))
        backbone.advance(prefix, backbone.n_layers)
    return inputs


def _at(rows: Tensor, at: Tensor, count: int) -> Tensor:
    """Return what stands at `at`; OPT gives its FFN one row for all tokens of a batch."""
    by_sequence = rows.reshape(count, -1, rows.shape[-1])
    return by_sequence[at.to(rows.device)]
