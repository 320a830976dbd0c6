"""A ridge regression for all projections of the text at once: encodings are to give the keys and values of others.

An edit asks that an encoding c (D,) give what the encoding g gives to the base weights W (O, D): v* = W g. So

    W' = (sum v* c' + lam W + sum W k k') (sum c c' + lam I + sum k k')^-1 = W + W (sum (g - c) c') (...)^-1

and the factor behind W is the same for every projection (TIME, Orgad et al. 2023, eq. 3; UCE, Gandikota et al. 2024,
eq. 7). It is always computed for all edits that are present, so taking one out is the same as never having made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Encodings `inputs` (n, D) that are to give what `goals` (n, D) give now, counted `scale` times."""

    inputs: Tensor
    goals: Tensor
    scale: float = 1.0

    def second_moment(self) -> Tensor:
        """Return the sum of c c', (D, D) in float64."""
        inputs = self.inputs.double()
        product: Tensor = inputs.T @ inputs
        weighted = self.scale * product
        return weighted

    def gain(self) -> Tensor:
        """Return the sum of (g - c) c', (D, D) in float64."""
        inputs = self.inputs.double()
        goals = self.goals.double()
        difference = goals - inputs
        product: Tensor = difference.T @ inputs
        weighted = self.scale * product
        return weighted


def kept(encodings: Tensor, scale: float = 1.0) -> Rows:
    """Return rows that ask for what is there: encodings (n, D) whose keys and values are to stay."""
    return Rows(encodings, encodings, scale)


def ridge_change(rows: Sequence[Rows], lam: float) -> Tensor:
    """Return X (D, D) in float64 for which W + W X are the edited weights, for every W (O, D).

    Rows of encodings that are to stay add to the system alone. `lam` is above 0, so the system is positive definite.
    """
    width = rows[0].inputs.shape[1]
    system = lam * torch.eye(width, dtype=torch.float64)
    gain = torch.zeros(width, width, dtype=torch.float64)
    for some in rows:
        system = system + some.second_moment()
        gain = gain + some.gain()
    solved: Tensor = torch.linalg.solve(system, gain.T)
    return solved.T


def ridge_edit(weight: Tensor, rows: Sequence[Rows], lam: float) -> Tensor:
    """Return the edited weights (O, D) in float64 of one projection."""
    return changed(weight, ridge_change(rows, lam))


def changed(weight: Tensor, change: Tensor) -> Tensor:
    """Return W + W X (O, D) in float64 for weights W (O, D) and X (D, D)."""
    base = weight.double()
    moved: Tensor = base @ change
    return base + moved
