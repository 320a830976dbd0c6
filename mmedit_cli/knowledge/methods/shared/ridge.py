"""Ridge regression of one layer's change: keys H (n, in) are to be sent to values V (n, out), with a small change.

The change D (in, out) minimises |H D - V|^2 + tr(D' M D): D = (H'H + M)^-1 H'V, which aggregates the single edits of a
batch (MALMEN, Tan et al. 2024, section 3.2; UltraEdit, Gu et al. 2025, eq. 5; MEMIT, Meng et al. 2023, eq. 14). M says
what must stay: a multiple of the identity, and what other keys have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def ridge(keys: Tensor, values: Tensor, penalty: float | Tensor) -> Tensor:
    """Return D (in, out) for keys (n, in), values (n, out) and M = penalty * identity; differentiable.

    The smaller of the two equivalent systems is solved: of size n, or of size in (Woodbury).
    """
    count, width = keys.shape
    if count < width:
        inner = _added(
            keys @ keys.T,
            penalty,
        )
        weights = torch.linalg.solve(
            inner,
            values,
        )
        by_rows: Tensor = keys.T @ weights
        return by_rows
    gram = _added(
        keys.T @ keys,
        penalty,
    )
    wanted = keys.T @ values
    change: Tensor = torch.linalg.solve(gram, wanted)
    return change


def _added(matrix: Tensor, penalty: float | Tensor) -> Tensor:
    identity = torch.eye(
        len(matrix),
        dtype=matrix.dtype,
        device=matrix.device,
    )
    return matrix + penalty * identity


@dataclass
class KeptKeys:
    """The inverse of M (in, in), float64, where M also holds keys whose outputs are to stay.

    Edits made one after another, each remembering its keys, give the change that all of them give at once
    (recursive least squares).
    """

    inverse: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> KeptKeys:
        """Return it for a positive definite M (in, in)."""
        factor = torch.linalg.cholesky(moment.double())
        return cls(torch.cholesky_inverse(factor))

    def ridge(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return D (in, out) for keys (n, in) and values (n, out), by a system of size n (Woodbury)."""
        spread = self.inverse @ keys.T
        inner = _added(
            keys @ spread,
            1.0,
        )
        weights = torch.linalg.solve(
            inner,
            values,
        )
        change: Tensor = spread @ weights
        return change

    def remember(self, keys: Tensor) -> None:
        """Let what follows keep the outputs for these keys (n, in) too."""
        spread = self.inverse @ keys.T
        inner = _added(
            keys @ spread,
            1.0,
        )
        weights = torch.linalg.solve(
            inner,
            spread.T,
        )
        less = spread @ weights
        # rounding must not add up to a matrix that is not symmetric
        symmetric = (less + less.T) / 2
        self.inverse = self.inverse - symmetric
