"""The vector index of Multi-MELO: which edit, if any, answers a query. Radii belong to the edits.

Q queries, N rows (one an edit), D numbers a part of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DUPLICATE = 1e-3  # rows nearer than this ask the same thing: the same picture and the same words
# of two pictures, by the type of the encoder: measured by Multi-MELO's authors on their data
SMALLEST_COSINES = {"dinov2": -0.4940, "clip": -0.0115, "vit": -0.2437}
_CHUNK = 256  # queries compared with all rows at a time


@dataclass(frozen=True)
class Keys:
    """The keys of n queries: a unit vector for each part (question, image, ...); zeros without a picture.

    parts: (n, D) by name; seen: (n,) bool, whether there is a picture.
    """

    parts: dict[str, Tensor]
    seen: Tensor

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Keys:
        parts = {name: part[rows] for name, part in self.parts.items()}
        return Keys(parts, self.seen[rows])

    @classmethod
    def join(cls, many: Sequence[Keys]) -> Keys:
        """Return the keys of several as one."""
        parts: dict[str, Tensor] = {}
        for name in many[0].parts:
            vectors = [keys.parts[name] for keys in many]
            parts[name] = torch.cat(vectors)
        seen = [keys.seen for keys in many]
        return cls(parts, torch.cat(seen))

    def tensors(self) -> list[Tensor]:
        """Return the parts, in the order of their names, and `seen`."""
        # a file that keys are read from lists them in any order
        parts = [self.parts[name] for name in sorted(self.parts)]
        return [*parts, self.seen]


Distance = Callable[[Keys, Keys], Tensor]


def within_reach(reach: Mapping[str, float]) -> Distance:
    """Return the distance max over parts of (1 - cosine) / reach: at most 1 if every part is within its reach.

    An edit without a picture and a query with one (or the other way round) are infinitely far from each other.
    """

    def distance(query: Keys, rows: Keys) -> Tensor:
        farthest = torch.full(
            (len(query), len(rows)),
            float("-inf"),
            device=rows.seen.device,
        )
        for name, width in reach.items():
            cosine = query.parts[name] @ rows.parts[name].T
            apart = (1 - cosine) / width
            if name == "image":
                apart = apart.masked_fill(~rows.seen, float("-inf"))
            farthest = torch.maximum(farthest, apart)
        query_sees = query.seen[:, None]
        differ = query_sees != rows.seen
        return farthest.masked_fill(differ, float("inf")).clamp(min=0)

    return distance


def published_distance(
    query: Keys, rows: Keys, smallest: float = SMALLEST_COSINES["dinov2"]
) -> Tensor:
    """Return 2 - s_t - s_v with the min-max constants in Multi-MELO's code for BGE and an encoder of pictures.

    smallest: the least cosine of two pictures. Without an image s_v is 0. The text score mixes two constants there, so
    the best is 0.9859.
    """
    questions = query.parts["question"]
    pictures = query.parts["image"]
    by_text = questions @ rows.parts["question"].T
    by_image = pictures @ rows.parts["image"].T
    text = (by_text - 0.1047) / (1 - 0.0919)
    image = (by_image - smallest) / (1 - smallest)
    no_image = ~query.seen[:, None] | ~rows.seen
    image = image.masked_fill(no_image, 0.0)
    return 2 - text - image


class VectorIndex:
    """Rows with a key, a label and a radius; a query goes to the row whose ball it is deepest in.

    With `resolve`, rows of different labels do not overlap: the radius of a row is `separation` times the distance to
    the nearest row of another label (at 0.5 no two claim the same query), and at most `radius`. Of two rows that ask
    the same thing (`DUPLICATE`) the newer hides the older. Radii and hidden rows depend only on the rows present, so
    a row can be removed as if it had never been there. Without `resolve` (the published code) every radius is the
    same, and the first of equals wins.
    """

    def __init__(
        self,
        distance: Distance,
        *,
        radius: float = 1.0,
        separation: float = 0.5,
        resolve: bool = True,
    ) -> None:
        self.distance = distance
        self.radius = radius
        self.separation = separation
        self.resolve = resolve
        self.searches = 0
        self.clear()

    def __len__(self) -> int:
        return self._size

    def clear(self) -> None:
        """Remove all rows."""
        self._size = 0
        self._keys: Keys | None = None
        self._numbers: dict[str | int, int] = {}
        self._labels = torch.zeros(0)
        self._radii = torch.zeros(0)
        self._hidden = torch.zeros(0)

    @property
    def radii(self) -> Tensor:
        """(N,) the radius of each row."""
        return self._radii[: self._size]

    @property
    def hidden(self) -> Tensor:
        """(N,) bool: rows that a newer one replaces."""
        return self._hidden[: self._size]

    @property
    def keys(self) -> Keys:
        """The keys of all rows."""
        assert self._keys is not None
        return self._keys[: self._size]

    def insert(
        self, keys: Keys, labels: Sequence[str | int], operations: Sequence[int] = ()
    ) -> None:
        """Append rows; rows of equal labels have the same answer. `operations` is for other indexes."""
        start = self._size
        end = start + len(keys)
        self._size = end
        self._make_room(keys)
        assert self._keys is not None
        pairs = zip(self._keys.tensors(), keys.tensors(), strict=True)
        for mine, theirs in pairs:
            mine[start:end] = theirs
        numbers = [self._number_of(label) for label in labels]
        self._labels[start:end] = torch.tensor(numbers)
        self._radii[start:end] = self.radius
        self._hidden[start:end] = False
        if self.resolve:
            for first in range(start, end, _CHUNK):
                self._finalize(first, min(first + _CHUNK, end))

    def _number_of(self, label: str | int) -> int:
        return self._numbers.setdefault(label, len(self._numbers))

    def _finalize(self, first: int, end: int) -> None:
        """Fit the radii of the rows from `first` to `end`, and of all before `end`, to each other."""
        apart = self.distance(self.keys[first:end], self.keys[:end])
        number = torch.arange(end, device=apart.device)
        labels = self._labels[:end]
        radii = self._radii[:end]
        new_number = number[first:, None]
        new_labels = labels[first:, None]
        new_radii = radii[first:]
        other_label = new_labels != labels
        duplicate = apart < DUPLICATE
        earlier = number < new_number
        # of two that ask the same thing with different answers the newer hides the older
        hidden = other_label & duplicate & earlier
        self._hidden[:end] |= hidden.any(0)
        # rows of different labels share the distance between them
        no_bound = ~other_label | duplicate
        share = apart * self.separation
        share = share.masked_fill(no_bound, float("inf"))
        new_radii.copy_(torch.minimum(new_radii, share.amin(1)))
        radii.copy_(torch.minimum(radii, share.amin(0)))

    def search(self, keys: Keys) -> Tensor:
        """Return the row each query goes to, -1 for none: (Q,). A distance equal to the radius is inside."""
        self.searches += 1
        device = keys.seen.device
        if not self._size:
            return torch.full(
                (len(keys),),
                -1,
                device=device,
            )
        if not len(keys):
            return torch.zeros(
                0,
                dtype=torch.long,
                device=device,
            )
        found: list[Tensor] = []
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK]
            rows = deepest(
                self.distance(chunk, self.keys),
                self.radii,
                self.hidden,
                first=not self.resolve,
            )
            found.append(rows)
        return torch.cat(found)

    def _make_room(self, keys: Keys) -> None:
        """Double the tensors until all rows fit, new ones like `keys`."""
        room = 0 if self._keys is None else len(self._keys)
        if self._size <= room:
            return
        room = max(self._size, 2 * room, 64)
        device = keys.seen.device
        parts: dict[str, Tensor] = {}
        for name, part in keys.parts.items():
            parts[name] = _room_for(part, room)
        seen = _room_for(keys.seen, room)
        larger = Keys(parts, seen)
        labels = torch.zeros(
            room,
            dtype=torch.int64,
            device=device,
        )
        radii = torch.zeros(room, device=device)
        hidden = torch.zeros(
            room,
            dtype=torch.bool,
            device=device,
        )
        if self._keys is not None:
            columns = [self._labels, self._radii, self._hidden]
            old = [*self._keys.tensors(), *columns]
            new = [*larger.tensors(), labels, radii, hidden]
            for mine, before in zip(new, old, strict=True):
                mine[: len(before)] = before
        self._keys = larger
        self._labels = labels
        self._radii = radii
        self._hidden = hidden


def _room_for(rows: Tensor, room: int) -> Tensor:
    """Return zeros for so many rows of the same shape."""
    return rows.new_zeros(room, *rows.shape[1:])


def deepest(
    apart: Tensor, radii: Tensor, hidden: Tensor, *, first: bool = False
) -> Tensor:
    """Return the row in whose ball each query is deepest, -1 for none: (Q, N), (N,), (N,) bool -> (Q,).

    Of equals it is the last, or the `first`.
    """
    number = torch.arange(len(radii), device=apart.device)
    outside = hidden | (apart > radii)
    margin = (apart - radii).masked_fill(outside, float("inf"))
    best = margin.amin(1, keepdim=True)
    at_best = (margin == best) & margin.isfinite()
    last = torch.where(at_best, number, -1).amax(1)
    if not first:
        return last
    none = len(radii)
    earliest = torch.where(at_best, number, none).amin(1)
    return torch.where(last >= 0, earliest, last)


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1 in float32: (..., D)."""
    return F.normalize(vectors.float(), dim=-1)
