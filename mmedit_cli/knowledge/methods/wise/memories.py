"""Side memories of WISE: what each adds to one matrix, how strongly it reacts, and which of them answers.

B rows and T tokens of a pass, I and O the inputs and outputs of the matrix, M memories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NONE = -1  # the memory of a question that the base model answers


@dataclass(frozen=True)
class Memory:
    """What was taught to a copy of the matrix: its difference to the original.

    delta: (O, I) float32, 0 wherever mask (O, I) is not set; weakest: the least reaction that an edit of it reached;
    count: the number of its edits.
    """

    delta: Tensor
    mask: Tensor
    weakest: float
    count: int


def reaction(x: Tensor, delta: Tensor, at: Tensor) -> Tensor:
    """Return how much a memory changes what leaves the matrix, || delta x ||, the mean over marked positions: (B,).

    x: (B, T, I); at: (B, T) bool, at least one a row.
    """
    entering = x.float()
    changes = F.linear(entering, delta)
    sizes = torch.linalg.vector_norm(
        changes,
        dim=-1,
    )
    marked = sizes.masked_fill(~at, 0.0)
    number = at.sum(1)
    mean: Tensor = marked.sum(1) / number
    return mean


def strongest(reactions: Tensor, thresholds: Tensor) -> Tensor:
    """Return the memory that reacts the most above its own threshold, NONE if none does: (B, M), (M,) -> (B,)."""
    margin = reactions / thresholds
    most, memory = margin.max(1)
    return torch.where(most > 1, memory, NONE)


def add_memories(
    x: Tensor, out: Tensor, deltas: Sequence[Tensor], chosen: Tensor
) -> Tensor | None:
    """Add to each row what its memory adds: (B, T, I), (B, T, O) -> (B, T, O); None if no row has one.

    Rows without a memory keep every bit.
    """
    used = sorted(set(chosen.tolist()) - {NONE})
    if not used:
        return None
    changed = out.clone()
    for memory in used:
        here = chosen == memory
        delta = deltas[memory]
        entering = x[here]
        entering = entering.float()
        added = F.linear(entering, delta)
        added = added.to(out.dtype)
        changed[here] = out[here] + added
    return changed


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Return several differences as one (TIES merging, Yadav et al., NeurIPS 2023).

    Of each the largest share `density` of its own entries stays; at each place the sign with the larger sum wins, and
    the entries of that sign are averaged.
    """
    every = []
    for delta in deltas:
        trimmed = _trimmed(delta, density)
        every.append(trimmed)
    stacked = torch.stack(every)
    total = stacked.sum(0)
    same_sign = stacked.sign() == total.sign()
    agreeing = same_sign & (stacked != 0)
    kept = torch.where(
        agreeing,
        stacked,
        0.0,
    )
    number = agreeing.sum(0)
    number = number.clamp(min=1)
    return kept.sum(0) / number


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """Return a difference with the largest share of its entries, the others 0."""
    sizes = delta.abs()
    present = sizes[sizes > 0]
    if not len(present):
        return delta
    share = density * len(present)
    count = max(1, round(share))
    ordered, _ = present.sort(descending=True)
    smallest = ordered[count - 1]
    stays = sizes >= smallest
    return torch.where(
        stays,
        delta,
        0.0,
    )


def merged(memories: Sequence[Memory], density: float) -> Memory:
    """Return several memories as one; the least of their reactions is its own."""
    deltas = []
    every = []
    for memory in memories:
        deltas.append(memory.delta)
        every.append(memory.mask)
    masks = torch.stack(every)
    return Memory(
        delta=ties(deltas, density),
        mask=masks.any(0),
        weakest=min(memory.weakest for memory in memories),
        count=sum(memory.count for memory in memories),
    )
