"""The cluster database of MELO (AAAI 2024, ECNU-ICALK/MELO): keys of one hidden state in balls that grow and split.

B samples of a batch, D the width of a key. It is reproduced as published, with its mistakes: a split may drop every
point of the older cluster, and queries that fall into it are then answered by no edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.multi_melo.index import Keys

_SPLIT = 1e-5  # half the gap between two clusters that were split
NOBODY = -1


@dataclass
class Cluster:
    """A ball of keys with one label; each point (key, row) belongs to a row, NOBODY for what a split left behind."""

    centre: Tensor
    radius: float
    label: int
    points: list[tuple[Tensor, int]]


class ClusterIndex:
    """Clusters under the Euclidean distance; a query goes to the nearest point of the nearest cluster, if inside it.

    With `together` a batch is compared with the clusters as they were before it, as published; otherwise each sample
    with those at its turn.
    `conflicts` counts splits, `forgotten` the points they dropped.
    """

    def __init__(self, radius: float, *, together: bool = False) -> None:
        self.radius, self.together = radius, together
        self.searches = 0
        self.clear()

    def __len__(self) -> int:
        return self._size

    def clear(self) -> None:
        """Remove all clusters."""
        self.clusters: list[Cluster] = []
        # their centres, one a row, with room for more
        self._centres = torch.zeros(0, 0)
        self.conflicts = 0
        self.forgotten = 0
        self._size = 0
        self._keys: list[Keys] = []
        self._numbers: dict[str, int] = {}

    @property
    def keys(self) -> Keys:
        """The keys of all rows, those that were forgotten too."""
        return Keys.join(self._keys)

    def insert(
        self, keys: Keys, labels: Sequence[str | int], operations: Sequence[int] = ()
    ) -> None:
        """Append rows; `operations` has a number for each, equal for those that were inserted together."""
        self._keys.append(keys)
        numbers = [self._number_of(label) for label in labels]
        rows = range(self._size, self._size + len(keys))
        self._size = rows.stop
        batches: dict[int, list[int]] = {}
        for i in range(len(keys)):
            batch = operations[i] if self.together and operations else i
            batches.setdefault(batch, []).append(i)
        tokens = keys.parts["token"]
        for members in batches.values():
            self.add(
                tokens[members],
                labels=[numbers[i] for i in members],
                rows=[rows[i] for i in members],
            )

    def _number_of(self, label: str | int) -> int:
        if isinstance(label, int):
            return label
        return self._numbers.setdefault(label, len(self._numbers))

    def add(self, keys: Tensor, labels: Sequence[int], rows: Sequence[int]) -> None:
        """Insert a batch: keys (B, D). Distances are those before it, radii and points those of the moment."""
        distances, nearest = self.nearest(keys) if self.clusters else (None, None)
        for i, (key, label, row) in enumerate(zip(keys, labels, rows, strict=True)):
            new = Cluster(
                key,
                self.radius,
                label,
                [(key, row)],
            )
            if distances is None or nearest is None:
                self._append(new)
                continue
            distance = float(distances[i])
            number = int(nearest[i])
            old = self.clusters[number]
            if distance > old.radius + self.radius:
                self._append(new)
            elif label == old.label:
                old.points.append((key, row))
                self._expand(number)
            else:
                self._append(new)
                self._split(old, new, distance)

    def _append(self, cluster: Cluster) -> None:
        """Add a cluster; the room for centres doubles, so that none is copied at a search."""
        number = len(self.clusters)
        self.clusters.append(cluster)
        if number == len(self._centres):
            size = max(16, 2 * number)
            grown = cluster.centre.new_zeros(size, len(cluster.centre))
            if number:
                grown[:number] = self._centres
            self._centres = grown
        self._centres[number] = cluster.centre

    def _expand(self, number: int) -> None:
        """Move a cluster to the mean of its points, and let it reach all of them."""
        cluster = self.clusters[number]
        points = torch.stack([point for point, _ in cluster.points])
        cluster.centre = points.mean(0)
        self._centres[number] = cluster.centre
        lengths = (points - cluster.centre).norm(dim=1)
        cluster.radius = max(float(lengths.max()), self.radius)

    def _split(self, old: Cluster, new: Cluster, distance: float) -> None:
        """Part two clusters of different labels half way; what the older no longer reaches is forgotten."""
        half = distance / 2
        old.radius = half - _SPLIT
        new.radius = half + _SPLIT
        self.conflicts += 1
        kept: list[tuple[Tensor, int]] = []
        for key, row in old.points:
            length = float((key - old.centre).norm())
            if length <= old.radius:
                kept.append((key, row))
        before = len(old.points)
        old.points = kept or [(old.centre, NOBODY)]
        # one too few where a point of nobody was put in, as published
        self.forgotten += before - len(old.points)

    def nearest(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return (distance, number) of the cluster whose centre is nearest: (B,), (B,)."""
        centres = self._centres[: len(self.clusters)]
        # exact: by a matrix product a key would not be at distance 0 from itself
        apart = torch.cdist(
            keys,
            centres,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        distances, numbers = apart.min(1)
        return distances, numbers

    def search(self, keys: Keys) -> Tensor:
        """Return the row each query goes to, -1 for none: (Q,)."""
        self.searches += 1
        tokens = keys.parts["token"]
        rows = torch.full(
            (len(tokens),),
            NOBODY,
            device=tokens.device,
        )
        if not self.clusters:
            return rows
        distances, numbers = self.nearest(tokens)
        for i, distance in enumerate(distances.tolist()):
            cluster = self.clusters[int(numbers[i])]
            if distance > cluster.radius:
                continue
            points = torch.stack([point for point, _ in cluster.points])
            lengths = (points - tokens[i]).norm(dim=1)
            _, row = cluster.points[int(lengths.argmin())]
            rows[i] = row
        return rows
