"""LoRA blocks: one slice of low rank in each of several linear layers, many of them in one store (Multi-MELO).

K blocks, r their rank, R rows of a batch, T tokens. A block is A (in, r) and B (r, out) for every layer; a row that
has it gets scale * x A B added to the output of the layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.runtime import generator
from mmedit_cli.types import Query

NONE = -1  # the number of "no block"


@dataclass(frozen=True)
class Blocks:
    """K blocks, by the path of the linear layer: a (K, in, r), b (K, r, out), float32."""

    a: dict[str, Tensor]
    b: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.a.values())))

    def select(self, index: Sequence[int]) -> Blocks:
        """Return the blocks with these numbers, as copies."""
        return Blocks(
            {n: t[list(index)] for n, t in self.a.items()},
            {n: t[list(index)] for n, t in self.b.items()},
        )

    def detached(self) -> Blocks:
        """Return copies of all blocks, without gradients."""
        return Blocks(
            {n: t.detach().clone() for n, t in self.a.items()},
            {n: t.detach().clone() for n, t in self.b.items()},
        )

    def parameters(self) -> list[Tensor]:
        """Return all tensors."""
        return [*self.a.values(), *self.b.values()]

    def write(self, number: int, other: Blocks) -> None:
        """Overwrite one block with the same one of another store of K blocks."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine[number] = theirs[number].detach()


def fresh_blocks(
    shapes: Mapping[str, tuple[int, int]], rank: int, seeds: Sequence[int]
) -> Blocks:
    """Return one new block a seed, which changes nothing yet: A uniform in +-1/sqrt(r), B zero.

    shapes: (in, out) by layer. The published code draws A in +-1/sqrt(n r) and multiplies by n blocks; this is the
    same model with n taken out (A and B times sqrt(n), the learning rate times sqrt(n)).
    """
    drawn: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for seed in seeds:
        source = generator(seed)
        for name, (width, _) in shapes.items():
            drawn[name].append(
                (torch.rand(width, rank, generator=source) * 2 - 1) / rank**0.5
            )
    a = {name: torch.stack(rows) for name, rows in drawn.items()}
    return Blocks(
        a,
        {name: torch.zeros(len(seeds), rank, out) for name, (_, out) in shapes.items()},
    )


def join_blocks(many: Sequence[Blocks]) -> Blocks:
    """Return the blocks of several stores as one."""
    a = {name: torch.cat([blocks.a[name] for blocks in many]) for name in many[0].a}
    return Blocks(
        a, {name: torch.cat([blocks.b[name] for blocks in many]) for name in many[0].b}
    )


def seed_of(request: Query, seed: int) -> int:
    """Return a seed that depends on what is taught alone: so a block does not depend on when it was made."""
    text = "\0".join(
        (
            str(seed),
            request.prompt,
            request.target,
            request.image.name if request.image else "",
        )
    )
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def add_blocks(
    x: Tensor, out: Tensor, blocks: Blocks, layer: str, index: Tensor, scale: float
) -> Tensor | None:
    """Return the output of a linear layer with each row's block added, or None where no row has one.

    x: (R, T, in), out: (R, T, out), or both with R and T in one (R * T, ...) as OPT's feed-forward has them; index:
    (R,) block numbers, -1 for none. Rows without a block stay bit for bit.
    """
    rows = (index != NONE).nonzero()[:, 0]
    if not len(rows):
        return None
    shape = out.shape
    x, changed = (
        x.reshape(len(index), -1, x.shape[-1]),
        out.reshape(len(index), -1, shape[-1]).clone(),
    )
    a, b = blocks.a[layer][index[rows]], blocks.b[layer][index[rows]]
    delta = scale * ((x[rows].to(a.dtype) @ a) @ b)
    changed[rows] += delta.to(changed.dtype)
    return changed.reshape(shape)


class BlockBank:
    """Blocks in the order they were made, in tensors that double when full."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, device: torch.device
    ) -> None:
        self.shapes, self.rank, self.size = dict(shapes), rank, 0
        self._device = device
        self.clear()

    def __len__(self) -> int:
        return self.size

    def clear(self) -> None:
        """Remove all blocks and give their memory back."""
        self.size = 0
        empty = {
            name: torch.zeros(0, *shape, device=self._device)
            for name, shape in self._layout()
        }
        self.blocks = Blocks(
            *({n: empty[f"{side}.{n}"] for n in self.shapes} for side in "ab")
        )

    def add(self, blocks: Blocks) -> range:
        """Append blocks; return their numbers."""
        numbers = range(self.size, self.size + len(blocks))
        room = len(self.blocks)
        if numbers.stop > room:
            room = max(numbers.stop, 2 * room)
            self.blocks = Blocks(
                _grown(self.blocks.a, room), _grown(self.blocks.b, room)
            )
        for mine, theirs in zip(
            self.blocks.parameters(), blocks.parameters(), strict=True
        ):
            mine[numbers.start : numbers.stop] = theirs
        self.size = numbers.stop
        return numbers

    def tensors(self) -> dict[str, Tensor]:
        """Return all blocks: `a.<layer>` (K, in, r), `b.<layer>` (K, r, out)."""
        found = {
            f"a.{name}": tensor[: self.size].clone()
            for name, tensor in self.blocks.a.items()
        }
        return found | {
            f"b.{name}": tensor[: self.size].clone()
            for name, tensor in self.blocks.b.items()
        }

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> Blocks | None:
        """Return the blocks that `tensors` wrote; None if they do not fit these layers and this rank."""
        if any(
            name not in tensors or tensors[name].shape[1:] != shape
            for name, shape in self._layout()
        ):
            return None
        if len({len(tensors[name]) for name, _ in self._layout()}) != 1:
            return None
        return Blocks(
            *({n: tensors[f"{side}.{n}"] for n in self.shapes} for side in "ab")
        )

    def _layout(self) -> list[tuple[str, tuple[int, int]]]:
        a = [
            (f"a.{name}", (width, self.rank))
            for name, (width, _) in self.shapes.items()
        ]
        return a + [
            (f"b.{name}", (self.rank, out)) for name, (_, out) in self.shapes.items()
        ]


def _grown(tensors: Mapping[str, Tensor], room: int) -> dict[str, Tensor]:
    grown = {}
    for name, tensor in tensors.items():
        grown[name] = tensor.new_zeros(room, *tensor.shape[1:])
        grown[name][: len(tensor)] = tensor
    return grown
