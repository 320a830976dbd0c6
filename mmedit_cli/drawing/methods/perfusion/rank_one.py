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
    """How n concepts open: `beta` and `tau` (n,); `exact` takes the overlap of concepts into account.

    `normalized` shifts and scales each gate so that it is 0 at similarity 0 and 1 at 1.
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
        return (
            (opened - closed) / (torch.sigmoid((1 - self.beta) / self.tau) - closed)
        ).clamp_min(0)

    def of(self, which: Tensor) -> Gates:
        """Return the gates of some of the concepts."""
        return Gates(self.beta[which], self.tau[which], self.exact, self.normalized)


def dual(factor: Tensor, inputs: Tensor) -> Tensor:
    """Return C^-1 i for inputs (..., D) and the lower Cholesky factor of C, solved in float64."""
    flat = inputs.reshape(-1, inputs.shape[-1]).double()
    return torch.cholesky_solve(flat.T, factor).T.reshape(inputs.shape).to(inputs.dtype)


def similarity(hidden: Tensor, inputs: Tensor, duals: Tensor) -> Tensor:
    """Return r (..., n) of encodings (..., D) to n concepts."""
    return hidden @ duals.T / (inputs * duals).sum(-1)


def mixing(hidden: Tensor, inputs: Tensor, duals: Tensor, gates: Gates) -> Tensor:
    """Return [rho, g] (B, N, 2n) for encodings (B, N, D), inputs and duals (n, D)."""
    alike = similarity(hidden, inputs, duals)
    removed = alike
    if gates.exact and len(inputs) > 1:
        gram = (inputs @ duals.T).double()
        # a pseudo-inverse: two concepts with one and the same input are no reason to fail
        inverse = torch.linalg.pinv((gram + gram.T) / 2, hermitian=True)
        removed = ((hidden @ duals.T).double() @ inverse).to(hidden.dtype)
    return torch.cat([removed, gates(alike)], -1)


def mixing_in_scope(
    hidden: Tensor, inputs: Tensor, duals: Tensor, gates: Gates, scope: Tensor
) -> Tensor:
    """Return [rho, g] (B, N, 2n) where each prompt knows the concepts of `scope` (B, n) only, the others being 0."""
    count = len(inputs)
    whole = hidden.new_zeros(*hidden.shape[:2], 2 * count)
    for pattern in scope.unique(dim=0):
        rows = (scope == pattern).all(1).nonzero()[:, 0]
        which = pattern.nonzero()[:, 0]
        if len(which):
            some = mixing(hidden[rows], inputs[which], duals[which], gates.of(which))
            wide = whole.new_zeros(len(rows), *whole.shape[1:])
            whole = whole.index_copy(
                0, rows, wide.index_copy(-1, torch.cat([which, which + count]), some)
            )
    return whole


def edit_rows(inputs: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    """Return [-W i ; o] (2n, d) for inputs (n, D), a weight (d, D) and target outputs (n, d)."""
    return torch.cat([-F.linear(inputs, weight), outputs])


def add_edit(output: Tensor, mixed: Tensor, rows: Tensor) -> Tensor:
    """Return W e + [rho, g] . [-W i ; o] for outputs (B, N, d) of the layer; in place where no gradient is wanted."""
    flat, factors = output.view(-1, output.shape[-1]), mixed.view(-1, mixed.shape[-1])
    if torch.is_grad_enabled():
        return torch.addmm(flat, factors, rows).view_as(output)
    flat.addmm_(factors, rows)
    return output
