"""Edits as rows of tensors, in order; an edit that repeats the picture and the prompt of an earlier one hides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmedit_cli.types import Query


class EditRows:
    """The edits in order: each tensor has a row an edit, of the shape that `shapes` names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.tensors: dict[str, Tensor] = {}
        # picture and prompt -> the newest edit of both
        self._newest: dict[tuple[object, ...], int] = {}
        # (E,) bool: the edits that a later one hides
        self.hidden = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.hidden)

    def add(self, rows: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        """Add edits with a row in each tensor."""
        for name, new in rows.items():
            before = self.tensors.get(name)
            if before is not None:
                new = torch.cat((before, new))
            self.tensors[name] = new
        added = torch.zeros(len(requests), dtype=torch.bool)
        hidden = torch.cat((self.hidden, added))
        for number, query in enumerate(requests, len(self)):
            key = (query.image, query.background, query.prompt)
            earlier = self._newest.get(key)
            if earlier is not None:
                hidden[earlier] = True
            self._newest[key] = number
        self.hidden = hidden

    def taken(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows of some edits."""
        kept = list(positions)
        return {name: tensor[kept] for name, tensor in self.tensors.items()}

    def clear(self) -> None:
        """Forget all edits."""
        self.tensors = {}
        self._newest = {}
        self.hidden = self.hidden[:0]

    def wanted(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors of so many edits, by name."""
        return {name: (count, *shape) for name, shape in self.shapes.items()}
