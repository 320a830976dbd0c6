"""The codebook of GRACE: keys, how far each reaches, and which of them a question falls to.

Q questions, N keys (one an edit), D their width, B rows and T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1  # the key of a question that is outside all radii
_SAME = 1e-3  # keys nearer than this share of their radii belong to the same question
_CHUNK = 256  # keys that are compared with all at a time


def distances(some: Tensor, others: Tensor) -> Tensor:
    """Return the Euclidean distance between rows: (Q, D), (N, D) -> (Q, N)."""
    # exact: by a matrix product a key would not be at distance 0 from itself
    return torch.cdist(
        some,
        others,
        compute_mode="donot_use_mm_for_euclid_dist",
    )


def nearest(apart: Tensor, radii: Tensor, hidden: Tensor) -> Tensor:
    """Return the nearest key whose ball a question lies in, NONE outside all: (Q, N), (N,), (N,) bool -> (Q,).

    On the border is inside; of keys that are equally near it is the last.
    """
    outside = hidden | (apart > radii)
    reached = apart.masked_fill(outside, float("inf"))
    best = reached.amin(1, keepdim=True)
    at_best = (reached == best) & best.isfinite()
    number = torch.arange(len(radii), device=apart.device)
    numbered = torch.where(at_best, number, NONE)
    return numbered.amax(1)


@dataclass(frozen=True)
class Choice:
    """Which key each question of a batch fell to, decided when it was read and kept until it is answered.

    chosen: (B,), NONE for none; ends: (B,), the position of the last token of the question; length: T at that time.
    """

    chosen: Tensor
    ends: Tensor
    length: int

    def replace(self, leaving: Tensor, values: Tensor) -> Tensor | None:
        """Put the values (N, D) from the end of the questions on: (B, T, D) -> (B, T, D); None if no row has one."""
        hit = self.chosen != NONE
        if not bool(hit.any()):
            return None
        length = leaving.shape[1]
        positions = torch.arange(length, device=leaving.device)
        starts = self.ends
        if length < self.length:  # a part of an answer is all behind the question
            starts = torch.zeros_like(starts)
        starts = starts[:, None]
        behind = positions >= starts
        at = hit[:, None] & behind
        given = values[self.chosen].to(leaving.dtype)
        return torch.where(
            at[..., None],
            given[:, None],
            leaving,
        )


class Codebook:
    """Keys with a value, a label and a radius; keys of one label have the same answer.

    With `split`, keys of different labels never claim the same question: each reaches half way to the other at most
    (GRACE splits the two nearest only). Of two keys in one place with different labels, the newer hides the older.
    Radii depend on the set of keys alone, so a key can be taken out as if it had never been there.
    """

    def __init__(self, *, split: bool) -> None:
        self.split = split
        self.clear()

    def __len__(self) -> int:
        return self._size

    def clear(self) -> None:
        """Remove all keys."""
        self._size = 0
        self._tensors: dict[str, Tensor] = {}
        # of each distinct label
        self._numbers: dict[tuple[int, ...], int] = {}

    def tensors(self, start: int = 0) -> dict[str, Tensor]:
        """Return what was inserted from row `start` on: keys, values, and the radii they were inserted with."""
        return {name: self._rows(name)[start:] for name in ("key", "value", "start")}

    @property
    def keys(self) -> Tensor:
        """(N, D)."""
        return self._rows("key")

    @property
    def values(self) -> Tensor:
        """(N, D')."""
        return self._rows("value")

    @property
    def radii(self) -> Tensor:
        """(N,): how far each key reaches among the others."""
        return self._rows("radius")

    @property
    def hidden(self) -> Tensor:
        """(N,) bool: keys that a newer one with another answer replaces."""
        return self._rows("hidden")

    def insert(
        self, rows: dict[str, Tensor], labels: Sequence[tuple[int, ...]]
    ) -> None:
        """Append keys: `key` (n, D), `value` (n, D'), `start` (n,), the radius of each where nothing is near."""
        first = self._size
        end = first + len(labels)
        starts = rows["start"]
        numbers = []
        for label in labels:
            number = self._number_of(label)
            numbers.append(number)
        more = {
            "radius": starts,
            "hidden": torch.zeros_like(
                starts,
                dtype=torch.bool,
            ),
            "label": torch.tensor(numbers, device=starts.device),
        }
        self._append({**rows, **more}, first)
        self._size = end
        for at in range(first, end, _CHUNK):
            last = min(at + _CHUNK, end)
            self._settle(at, last)

    def search(self, keys: Tensor) -> Tensor:
        """Return the row each question falls to, NONE for none: (Q, D) -> (Q,)."""
        if not self._size:
            return torch.full((len(keys),), NONE, device=keys.device)
        apart = distances(keys, self.keys)
        return nearest(apart, self.radii, self.hidden)

    def _settle(self, first: int, end: int) -> None:
        """Fit the keys from `first` to `end`, and all before `end`, to each other."""
        apart = distances(self.keys[first:end], self.keys[:end])
        number = torch.arange(end, device=apart.device)
        starts = self._rows("start")[:end]
        labels = self._rows("label")[:end]
        new_starts = starts[first:, None]
        new_labels = labels[first:, None]
        new_number = number[first:, None]
        smaller = torch.minimum(new_starts, starts)
        same = apart <= _SAME * smaller
        conflict = new_labels != labels
        earlier = number < new_number
        replaced = conflict & same & earlier
        self.hidden[:end] |= replaced.any(0)
        if self.split:
            self._part(apart, conflict & ~same, first)

    def _part(self, apart: Tensor, conflict: Tensor, first: int) -> None:
        """Let the keys from `first` on, and those before, reach half way to those they are in conflict with."""
        half = apart / 2
        half = half.masked_fill(~conflict, float("inf"))
        radii = self.radii[: apart.shape[1]]
        new = radii[first:]
        nearest_old = half.amin(1)
        nearest_new = half.amin(0)
        new.copy_(torch.minimum(new, nearest_old))
        radii.copy_(torch.minimum(radii, nearest_new))

    def _number_of(self, label: tuple[int, ...]) -> int:
        return self._numbers.setdefault(label, len(self._numbers))

    def _rows(self, name: str) -> Tensor:
        return self._tensors[name][: self._size]

    def _append(self, rows: dict[str, Tensor], first: int) -> None:
        """Write rows behind the first ones; the room doubles as it fills, so that adding stays cheap."""
        for name, new in rows.items():
            end = first + len(new)
            old = self._tensors.get(name, new[:0])
            if len(old) < end:
                size = max(end, 2 * first, 64)
                room = new.new_zeros(size, *new.shape[1:])
                room[:first] = old[:first]
                self._tensors[name] = room
            rows_of_name = self._tensors[name]
            rows_of_name[first:end] = new
