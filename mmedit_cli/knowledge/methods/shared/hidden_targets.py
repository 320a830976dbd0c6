"""Hidden states that make the model give an answer, learned at some positions of each question.

Published is one position (Meng et al. 2022, ROME, section 3.1); several of a question are learned together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.patch import Patch


@dataclass(frozen=True)
class TargetTraining:
    """How a target is learned: Adam steps, and how far from the present state it may lie."""

    steps: int = 25
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 0.75
    stop_loss: float = 5e-2

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clamp"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "stop_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0: {getattr(self, name)}")


@dataclass(frozen=True)
class Lesson:
    """Requests on entering the lowest edited layer; where keys are read, and what is said where: (B, T) each.

    Positions that are marked by `places` or `at` are counted row by row: n keys, m tokens of answers.
    """

    prefix: Prefix
    places: Tensor
    at: Tensor
    labels: Tensor


def hidden_targets(
    backbone: VisionLanguageModel, lesson: Lesson, layer: int, training: TargetTraining
) -> tuple[Tensor, list[list[float]]]:
    """Return what is to leave `layer` at the places of the keys, (n, D) float32, and the losses of each request.

    Each request is learned on its own, all its places together: its loss is the mean cross entropy of its answer, and
    `weight_decay` times the mean over its places of the length of the change over the squared length of the state. A
    change is at most `clamp` of the state's length. A request whose cross entropy is below `stop_loss` rests.
    """
    start = states_at(backbone, lesson, layer)
    size = start.norm(dim=1, keepdim=True)
    delta = nn.Parameter(torch.zeros_like(start))
    optimizer = torch.optim.Adam(
        [delta],
        lr=training.learning_rate,
    )
    of_request = _rows_of(lesson.places)
    losses: list[list[float]] = [[] for _ in lesson.places]
    learning = torch.ones(len(losses), dtype=torch.bool, device=start.device)
    for _ in range(training.steps):
        with torch.enable_grad():
            answer = _answer_losses(backbone, lesson, layer, delta)
            changes = delta.norm(dim=1) / size[:, 0].square()
            change = _mean_by_row(changes, lesson.places)
            total = answer + training.weight_decay * change
        for row in learning.nonzero()[:, 0].tolist():
            losses[row].append(total[row].item())
        learning = learning & (answer.detach() >= training.stop_loss)
        if not learning.any():
            break
        optimizer.zero_grad()
        total.sum().backward()
        moving = learning[of_request]
        _step(optimizer, delta, moving, training.clamp * size)
    return start + delta.detach(), losses


def _step(
    optimizer: torch.optim.Optimizer,
    delta: nn.Parameter,
    learning: Tensor,
    most: Tensor,
) -> None:
    """Take a step with the places that are still learning, and shorten the changes that went too far."""
    before = delta.detach().clone()
    optimizer.step()
    with torch.no_grad():
        length = delta.norm(dim=1, keepdim=True).clamp_min(1e-12)
        shortened = delta * (most / length).clamp_max(1.0)
        delta.copy_(torch.where(learning[:, None], shortened, before))


def _answer_losses(
    backbone: VisionLanguageModel, lesson: Lesson, layer: int, delta: Tensor
) -> Tensor:
    """Return the mean cross entropy of each row's answer with `delta` (n, D) added to what leaves `layer`: (B,)."""

    def add(leaving: Tensor) -> Tensor:
        changed = leaving.clone()
        places = lesson.places.to(leaving.device)
        changed[places] = leaving[places] + delta.to(leaving.dtype)
        return changed

    with Patch(backbone.model) as patch:
        patch.hook(backbone.anchors.path("layer", layer), add)
        logits = backbone.resume(lesson.prefix, lesson.at)
    each = F.cross_entropy(
        logits.float(),
        lesson.labels[lesson.at],
        reduction="none",
    )
    return _mean_by_row(each, lesson.at)


def _rows_of(marked: Tensor) -> Tensor:
    """Return the row in which each marked position stands: (B, T) bool -> (n,)."""
    return marked.nonzero()[:, 0]


def _mean_by_row(values: Tensor, marked: Tensor) -> Tensor:
    """Return the mean of each row over its marked positions: (n,), (B, T) bool -> (B,)."""
    sums = values.new_zeros(len(marked)).index_add(0, _rows_of(marked), values)
    means: Tensor = sums / marked.sum(1)
    return means


@torch.no_grad()
def states_at(backbone: VisionLanguageModel, lesson: Lesson, layer: int) -> Tensor:
    """Return what leaves `layer` now at the places of the keys: (n, D) float32."""
    hidden = backbone.advance(lesson.prefix, layer + 1).hidden
    states: Tensor = hidden[lesson.places.to(hidden.device)]
    return states.float()
