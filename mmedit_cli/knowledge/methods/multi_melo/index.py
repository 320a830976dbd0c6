"""The vector index of Multi-MELO: which edit, if any, answers a query. Radii belong to the edits.

Q queries, N rows (one an edit), D numbers a part of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

DUPLICATE = 1e-3  # rows nearer than this ask the same thing: the same picture and the same words
_CHUNK = 256  # queries compared with all rows at a time


@dataclass(frozen=True)
class Keys:
    """What n queries are told apart by: for each part (question, image, ...) a unit vector; zeros without a picture.

    parts: (n, D) by name; seen: (n,) bool, whether there is a picture.
    """

    parts: dict[str, Tensor]
    seen: Tensor

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Keys:
        return Keys(
            {name: part[rows] for name, part in self.parts.items()}, self.seen[rows]
        )

    @classmethod
    def join(cls, many: Sequence[Keys]) -> Keys:
        """Return the keys of several as one."""
        parts = {
            name: torch.cat([keys.parts[name] for keys in many])
            for name in many[0].parts
        }
        return cls(parts, torch.cat([keys.seen for keys in many]))


Distance = Callable[[Keys, Keys], Tensor]


def within_reach(reach: Mapping[str, float]) -> Distance:
    """Return the distance max over parts of (1 - cosine) / reach: at most 1 if every part is within its reach.

    An edit without a picture and a query with one (or the other way round) are infinitely far from each other.
    """

    def distance(query: Keys, rows: Keys) -> Tensor:
        far = torch.full(
            (len(query), len(rows)), float("-inf"), device=rows.seen.device
        )
        for name, width in reach.items():
            apart = (1 - query.parts[name] @ rows.parts[name].T) / width
            if name == "image":
                apart = apart.masked_fill(~rows.seen, float("-inf"))
            far = torch.maximum(far, apart)
        return far.masked_fill(query.seen[:, None] != rows.seen, float("inf")).clamp(
            min=0
        )

    return distance


def published_distance(query: Keys, rows: Keys) -> Tensor:
    """Return 2 - s_t - s_v with the min-max constants in Multi-MELO's code for BGE and DINOv2.

    Without an image s_v is 0. The text score mixes two constants there, so the best is 0.9859.
    """
    text = (query.parts["question"] @ rows.parts["question"].T - 0.1047) / (1 - 0.0919)
    image = (query.parts["image"] @ rows.parts["image"].T + 0.4940) / (1 + 0.4940)
    return 2 - text - image.masked_fill(~query.seen[:, None] | ~rows.seen, 0.0)


class VectorIndex:
    """Rows with a key, a label and a radius; a query goes to the row whose ball it is deepest in.

    With `resolve`, rows of different labels part: a row's radius is `separation` times the distance to the nearest row
    of another label (at 0.5 no two claim the same query), and `radius` at most; of two that ask the same thing
    (`DUPLICATE`) the newer hides the older. Radii and what is hidden depend on the rows present alone: taking one out
    is as if it had never been.
    Without it (the published code) every radius is the same, and of equals the first wins.
    """

    def __init__(
        self,
        distance: Distance,
        *,
        radius: float = 1.0,
        separation: float = 0.5,
        resolve: bool = True,
    ) -> None:
        self.distance, self.radius, self.separation, self.resolve = (
            distance,
            radius,
            separation,
            resolve,
        )
        self.searches = 0
        self.clear()

    def __len__(self) -> int:
        return self._size

    def clear(self) -> None:
        """Remove all rows."""
        self._size = 0
        self._keys: Keys | None = None
        self._numbers: dict[str, int] = {}
        self._labels = self._radii = self._hidden = torch.zeros(0)

    @property
    def radii(self) -> Tensor:
        """(N,) the radius of each row."""
        return self._radii[: self._size]

    @property
    def hidden(self) -> Tensor:
        """(N,) bool: rows that a newer one has taken the place of."""
        return self._hidden[: self._size]

    @property
    def keys(self) -> Keys:
        """The keys of all rows."""
        assert self._keys is not None
        return self._keys[: self._size]

    def insert(
        self, keys: Keys, labels: Sequence[str], operations: Sequence[int] = ()
    ) -> None:
        """Append rows; labels are compared as text. `operations` is for other indexes."""
        start, self._size = self._size, self._size + len(keys)
        self._make_room(keys)
        numbers = [
            self._numbers.setdefault(label, len(self._numbers)) for label in labels
        ]
        assert self._keys is not None
        for mine, theirs in zip(_tensors(self._keys), _tensors(keys), strict=True):
            mine[start : self._size] = theirs
        self._labels[start : self._size] = torch.tensor(numbers)
        self._radii[start : self._size] = self.radius
        self._hidden[start : self._size] = False
        if self.resolve:
            for first in range(start, self._size, _CHUNK):
                self._finalize(first, min(first + _CHUNK, self._size))

    def _finalize(self, first: int, end: int) -> None:
        """Fit the radii of the rows from `first` to `end`, and of all before `end`, to each other."""
        apart = self.distance(self.keys[first:end], self.keys[:end])
        new, every = (
            torch.arange(first, end, device=apart.device)[:, None],
            torch.arange(end, device=apart.device),
        )
        other = self._labels[first:end, None] != self._labels[:end]
        self._hidden[:end] |= (other & (apart < DUPLICATE) & (every < new)).any(0)
        share = (apart * self.separation).masked_fill(
            ~other | (apart < DUPLICATE), float("inf")
        )
        self._radii[first:end] = torch.minimum(self._radii[first:end], share.amin(1))
        self._radii[:end] = torch.minimum(self._radii[:end], share.amin(0))

    def search(self, keys: Keys) -> Tensor:
        """Return the row each query goes to, -1 for none: (Q,). A distance equal to the radius is inside."""
        self.searches += 1
        if not self._size:
            return torch.full((len(keys),), -1, device=keys.seen.device)
        found = []
        for start in range(0, len(keys), _CHUNK):
            apart = self.distance(keys[start : start + _CHUNK], self.keys)
            found.append(
                deepest(apart, self.radii, self.hidden, first=not self.resolve)
            )
        return (
            torch.cat(found)
            if found
            else torch.zeros(0, dtype=torch.long, device=keys.seen.device)
        )

    def _make_room(self, keys: Keys) -> None:
        room = 0 if self._keys is None else len(self._keys)
        if self._size <= room:
            return
        room = max(self._size, 2 * room, 64)
        old, size = self._keys, room
        device = keys.seen.device
        parts = {
            name: torch.zeros(size, part.shape[1], device=device)
            for name, part in keys.parts.items()
        }
        self._keys = Keys(parts, torch.zeros(size, dtype=torch.bool, device=device))
        grown = [
            torch.zeros(size, dtype=kind, device=device)
            for kind in (torch.int64, torch.float32, torch.bool)
        ]  # labels, radii, hidden
        if old is not None:
            pairs = zip(
                [*_tensors(self._keys), *grown],
                [*_tensors(old), *self._columns()],
                strict=True,
            )
            for new, before in pairs:
                new[: len(before)] = before
        self._labels, self._radii, self._hidden = grown

    def _columns(self) -> list[Tensor]:
        return [self._labels, self._radii, self._hidden]


def deepest(
    apart: Tensor, radii: Tensor, hidden: Tensor, *, first: bool = False
) -> Tensor:
    """Return the row in whose ball each query is deepest, -1 for none: (Q, N), (N,), (N,) bool -> (Q,).

    Of equals it is the last, or the `first`.
    """
    number = torch.arange(len(radii), device=apart.device)
    margin = (apart - radii).masked_fill(hidden | (apart > radii), float("inf"))
    best = margin.amin(1, keepdim=True)
    at_best = (margin == best) & margin.isfinite()
    row = torch.where(at_best, number, -1).amax(1)
    return (
        torch.where(row >= 0, torch.where(at_best, number, len(radii)).amin(1), row)
        if first
        else row
    )


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1 in float32: (..., D)."""
    return F.normalize(vectors.float(), dim=-1)


def _tensors(keys: Keys) -> list[Tensor]:
    assert [field.name for field in fields(keys)] == ["parts", "seen"]
    return [*keys.parts.values(), keys.seen]
