"""Mean and standard deviation of everything seen so far, one column at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningMoments:
    """The number of rows seen, their mean (d,) and the sum of their squared deviations (d,), in float64."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> RunningMoments:
        """Return the moments of no rows."""
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    def add(self, rows: Tensor) -> None:
        """Take rows (n, d) in, exactly, however few there are (Chan et al. 1979, eq. 2.1)."""
        if not len(rows):
            return
        rows = rows.double()
        mean = rows.mean(0)
        deviations = rows - mean
        count = self.count + len(rows)
        delta = mean - self.mean
        between = delta.square() * (self.count * len(rows) / count)
        self.squares = self.squares + deviations.square().sum(0) + between
        self.mean = self.mean + delta * (len(rows) / count)
        self.count = count

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of each column (d,); 0 where fewer than two rows or equal ones were seen."""
        return (self.squares / max(self.count - 1, 1)).sqrt()

    def standardized(self, rows: Tensor) -> Tensor:
        """Return rows (n, d) with mean 0 and deviation 1; columns that never varied are 0."""
        deviation = self.deviation
        varies = deviation > 0
        centred = rows.double() - self.mean
        ones = torch.ones_like(deviation)
        scaled = centred / deviation.where(varies, ones)
        zeros = torch.zeros_like(scaled)
        return scaled.where(varies, zeros)

    def tensors(self) -> dict[str, Tensor]:
        """Return them as tensors; `from_tensors` reads these."""
        count = torch.tensor(self.count, dtype=torch.int64)
        return {"count": count, "mean": self.mean, "squares": self.squares}

    @classmethod
    def from_tensors(
        cls, count: Tensor, mean: Tensor, squares: Tensor
    ) -> RunningMoments:
        """Return what `tensors` wrote."""
        return cls(int(count), mean.clone(), squares.clone())
