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
        numbers = list(index)
        return Blocks(_rows(self.a, numbers), _rows(self.b, numbers))

    def detached(self) -> Blocks:
        """Return copies of all blocks, without gradients."""
        return Blocks(_detached(self.a), _detached(self.b))

    def parameters(self) -> list[Tensor]:
        """Return all tensors."""
        return [*self.a.values(), *self.b.values()]

    def write(self, number: int, other: Blocks) -> None:
        """Overwrite one block with the same one of another store of K blocks."""
        pairs = zip(self.parameters(), other.parameters(), strict=True)
        for mine, theirs in pairs:
            block = theirs[number]
            mine[number] = block.detach()


def fresh_blocks(
    shapes: Mapping[str, tuple[int, int]], rank: int, seeds: Sequence[int]
) -> Blocks:
    """Return one new block a seed, which changes nothing yet: A uniform in +-1/sqrt(r), B zero.

    shapes: (in, out) by layer. The published code draws A in +-1/sqrt(n r) and multiplies by n blocks; this is the
    same model with n taken out (A and B times sqrt(n), the learning rate times sqrt(n)).
    """
    count = len(seeds)
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for path, (width, out) in shapes.items():
        a[path] = torch.zeros(count, width, rank)
        b[path] = torch.zeros(count, rank, out)
    for number, seed in enumerate(seeds):
        source = generator(seed)
        for rows in a.values():
            uniform = torch.rand(rows.shape[1:], generator=source)
            within_one = uniform * 2 - 1
            rows[number] = within_one / rank**0.5
    return Blocks(a, b)


def join_blocks(many: Sequence[Blocks]) -> Blocks:
    """Return the blocks of several stores as one."""
    a = [blocks.a for blocks in many]
    b = [blocks.b for blocks in many]
    return Blocks(_joined(a), _joined(b))


def seed_of(request: Query, seed: int) -> int:
    """Return a seed that depends only on what is taught, so that a block does not depend on when it was made."""
    parts = [str(seed), request.prompt, request.target]
    picture = request.image.name if request.image else ""
    text = "\0".join([*parts, picture])
    hashed = hashlib.sha256(text.encode())
    digest = hashed.digest()
    return int.from_bytes(digest[:7], "big")


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
    x = x.reshape(len(index), -1, x.shape[-1])
    changed = out.reshape(len(index), -1, shape[-1]).clone()
    numbers = index[rows]
    a = blocks.a[layer][numbers]
    b = blocks.b[layer][numbers]
    entering = x[rows].to(a.dtype)
    inner = entering @ a
    delta = scale * (inner @ b)
    changed[rows] += delta.to(changed.dtype)
    return changed.reshape(shape)


class BlockBank:
    """Blocks in the order they were made, in tensors that double when full."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, device: torch.device
    ) -> None:
        self.shapes = dict(shapes)
        self.rank = rank
        self.size = 0
        self._device = device
        self.clear()

    def __len__(self) -> int:
        return self.size

    def clear(self) -> None:
        """Remove all blocks and give their memory back."""
        self.size = 0
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for path in self.shapes:
            shape_a, shape_b = self._shapes_of(path)
            a[path] = torch.zeros(0, *shape_a, device=self._device)
            b[path] = torch.zeros(0, *shape_b, device=self._device)
        self.blocks = Blocks(a, b)

    def add(self, blocks: Blocks) -> range:
        """Append blocks; return their numbers."""
        start = self.size
        end = start + len(blocks)
        room = len(self.blocks)
        if end > room:
            room = max(end, 2 * room)
            a = _grown(self.blocks.a, room)
            b = _grown(self.blocks.b, room)
            self.blocks = Blocks(a, b)
        pairs = zip(self.blocks.parameters(), blocks.parameters(), strict=True)
        for mine, theirs in pairs:
            mine[start:end] = theirs
        self.size = end
        return range(start, end)

    def tensors(self) -> dict[str, Tensor]:
        """Return all blocks: `a.<layer>` (K, in, r), `b.<layer>` (K, r, out)."""
        found: dict[str, Tensor] = {}
        named = {"a": self.blocks.a, "b": self.blocks.b}
        for name, tensors in named.items():
            for path, tensor in tensors.items():
                filled = tensor[: self.size]
                found[f"{name}.{path}"] = filled.clone()
        return found

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> Blocks | None:
        """Return the blocks that `tensors` wrote; None if they do not fit these layers and this rank."""
        counts: set[int] = set()
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for path in self.shapes:
            own_a = tensors.get(f"a.{path}")
            own_b = tensors.get(f"b.{path}")
            if own_a is None or own_b is None:
                return None
            if (own_a.shape[1:], own_b.shape[1:]) != self._shapes_of(path):
                return None
            counts |= {len(own_a), len(own_b)}
            a[path] = own_a
            b[path] = own_b
        return Blocks(a, b) if len(counts) == 1 else None

    def _shapes_of(self, path: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B for one layer."""
        width, out = self.shapes[path]
        return (width, self.rank), (self.rank, out)


def _rows(tensors: Mapping[str, Tensor], numbers: list[int]) -> dict[str, Tensor]:
    return {path: tensor[numbers] for path, tensor in tensors.items()}


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: tensor.detach().clone() for path, tensor in tensors.items()}


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {path: torch.cat([part[path] for part in parts]) for path in parts[0]}


def _grown(tensors: Mapping[str, Tensor], room: int) -> dict[str, Tensor]:
    """Return larger tensors that begin with the same rows."""
    grown: dict[str, Tensor] = {}
    for path, tensor in tensors.items():
        larger = tensor.new_zeros(room, *tensor.shape[1:])
        larger[: len(tensor)] = tensor
        grown[path] = larger
    return grown
