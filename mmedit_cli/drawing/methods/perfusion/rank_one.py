"""The gated rank-one edit of a linear layer (Tewel et al. 2023, Perfusion, equations 3, 6 and 10).

For concepts c with target inputs i_c (D,), duals b_c = C^-1 i_c and target outputs o_c, an encoding e is mapped to

    h(e) = W (e - sum_c rho_c(e) i_c) + sum_c g_c(e) o_c
    r_c(e) = e.b_c / i_c.b_c,   g_c = sigmoid((r_c - beta_c) / tau_c),   rho(e) = G^-1 (e.b_1, e.b_2, ...)

with the Gram matrix G of the inputs under C^-1: a plain W e plus a product of rank 2n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Gates:
    """The gates of n concepts: bias `beta` and temperature `tau` (n,) of a sigmoid (equation 3).

    `exact` takes the overlap of concepts into account. `normalized` shifts and scales each gate so that it is 0 at
    similarity 0 and 1 at similarity 1.
    """

    beta: Tensor
    tau: Tensor
    exact: bool = True
    normalized: bool = False

    def __call__(self, similarity: Tensor) -> Tensor:
        """Return the gates (..., n) for similarities (..., n)."""
        opened = torch.sigmoid((similarity - self.beta) / self.tau)
        if not self.normalized:
            return opened
        closed = torch.sigmoid(-self.beta / self.tau)
        fully_open = torch.sigmoid((1 - self.beta) / self.tau)
        scaled = (opened - closed) / (fully_open - closed)
        return scaled.clamp_min(0)

    def of(self, which: Tensor) -> Gates:
        """Return the gates of some of the concepts."""
        return Gates(
            beta=self.beta[which],
            tau=self.tau[which],
            exact=self.exact,
            normalized=self.normalized,
        )


def dual(factor: Tensor, inputs: Tensor) -> Tensor:
    """Return C^-1 i for inputs (..., D) and the lower Cholesky factor of C, solved in float64."""
    width = inputs.shape[-1]
    rows = inputs.reshape(-1, width)
    columns = rows.double().T
    solved = torch.cholesky_solve(columns, factor)
    duals = solved.T.reshape(inputs.shape)
    return duals.to(inputs.dtype)


def similarity(hidden: Tensor, inputs: Tensor, duals: Tensor) -> Tensor:
    """Return r (..., n) of encodings (..., D) to n concepts."""
    return hidden @ duals.T / (inputs * duals).sum(-1)


def mixing(hidden: Tensor, inputs: Tensor, duals: Tensor, gates: Gates) -> Tensor:
    """Return [rho, g] (B, N, 2n) for encodings (B, N, D), inputs and duals (n, D).

    rho is the share of each concept's input that is removed from an encoding, g its gate (equations 6 and 10).
    """
    similarities = similarity(hidden, inputs, duals)
    removed = similarities
    if gates.exact and len(inputs) > 1:
        # Concepts overlap (appendix B). A pseudo-inverse also works for two concepts with the same input.
        products = inputs @ duals.T
        gram = products.double()
        symmetric = (gram + gram.T) / 2
        inverse = torch.linalg.pinv(symmetric, hermitian=True)
        projections = hidden @ duals.T
        solved = projections.double() @ inverse
        removed = solved.to(hidden.dtype)
    opened = gates(similarities)
    return torch.cat([removed, opened], -1)


def mixing_in_scope(
    hidden: Tensor, inputs: Tensor, duals: Tensor, gates: Gates, scope: Tensor
) -> Tensor:
    """Return [rho, g] (B, N, 2n) where prompt b only knows the concepts of scope[b], (B, n); the others are 0."""
    count = len(inputs)
    batch, length, _ = hidden.shape
    mixed = hidden.new_zeros(batch, length, 2 * count)
    for pattern in scope.unique(dim=0):
        same = (scope == pattern).all(1)
        rows = same.nonzero()[:, 0]
        known = pattern.nonzero()[:, 0]
        if not len(known):
            continue
        some = mixing(
            hidden[rows],
            inputs[known],
            duals[known],
            gates.of(known),
        )
        columns = torch.cat([known, known + count])
        empty = mixed.new_zeros(len(rows), length, 2 * count)
        filled = empty.index_copy(-1, columns, some)
        mixed = mixed.index_copy(0, rows, filled)
    return mixed


def mixing_at_places(
    hidden: Tensor, inputs: Tensor, duals: Tensor, gates: Gates, standing: Tensor
) -> Tensor:
    """Return [rho, g] (B, N, 2n) where each input counts at its own places alone, standing (B, N, n); else 0 (ours).

    No two inputs meet at a place, so there is no overlap to take into account.
    """
    similarities = similarity(hidden, inputs, duals)
    opened = gates(similarities)
    here = standing.to(hidden.dtype)
    return torch.cat([similarities * here, opened * here], -1)


def edit_rows(inputs: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    """Return [-W i ; o] (2n, d) for inputs (n, D), a weight (d, D) and target outputs (n, d)."""
    return torch.cat([-F.linear(inputs, weight), outputs])


def add_edit(output: Tensor, mixed: Tensor, rows: Tensor) -> Tensor:
    """Return W e + [rho, g] . [-W i ; o] for outputs W e (B, N, d) of the layer; in place if no gradient is wanted."""
    flat = output.view(-1, output.shape[-1])
    factors = mixed.view(-1, mixed.shape[-1])
    if torch.is_grad_enabled():
        edited = torch.addmm(flat, factors, rows)
        return edited.view_as(output)
    flat.addmm_(factors, rows)
    return output
