"""SPEED: concepts are erased by a change in the null space of what is kept, for many concepts at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmedit_cli.drawing.methods.shared.closed_form import Rows, changed
from mmedit_cli.drawing.methods.shared.concept_editor import (
    ConceptEditor,
    ConceptHparams,
)
from mmedit_cli.runtime import generator

_CENTRES = 3  # of the padding of an empty prompt, whose values stay exactly
_TURNS = 50  # of the search for them, at most


@dataclass(frozen=True)
class SpeedHparams(ConceptHparams):
    """See hparams/speed.yaml for what each value means and where it comes from."""

    lam: float = 1.0
    roles: tuple[Literal["k", "v"], ...] = ("v",)
    threshold: float = 0.1
    copies: int = 10
    influential: bool = True
    mean: bool = True
    noise_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold <= 0:
            raise ValueError("threshold must be above 0")
        if self.copies < 0:
            raise ValueError("copies must not be below 0")


class Speed(ConceptEditor):
    """Scalable, precise and efficient concept erasure (Li et al., ICLR 2026, arXiv 2503.07392)."""

    name = "speed"
    Hparams = SpeedHparams

    def _solve(
        self, weights: Mapping[str, Tensor], edits: Rows, stays: Rows
    ) -> Mapping[str, Tensor]:
        hp = self.hparams
        moment = edits.second_moment()
        gain = edits.gain()
        if hp.mean:
            # as published: over the texts, not the sum, so that many of them weigh no more than one
            count = len(self.present())
            moment = moment / count
            gain = gain / count
        empty = torch.cat([states for _, states in self._encode("")])
        exact = torch.cat([empty[:1], centres(empty[1:], _CENTRES)]).double()
        # the published set of what is kept is the empty prompt where nothing is named
        retained = stays.inputs if len(stays.inputs) else empty[1:]
        solved = {}
        for path, weight in weights.items():
            base = weight.double()
            refined = self._refined(
                base,
                retained.double(),
                moment,
                gain,
            )
            free = null_space(refined, hp.threshold)
            change = constrained_change(
                moment,
                gain,
                free,
                exact,
                hp.lam,
            )
            solved[path] = changed(base, change)
        return solved

    def _refined(
        self, weight: Tensor, retained: Tensor, moment: Tensor, gain: Tensor
    ) -> Tensor:
        """Return what is kept by weights (O, D): the rows of (m, D) that an edit would move most, and noisy copies."""
        hp = self.hparams
        if not hp.copies:
            return retained
        identity = torch.eye(len(moment), dtype=torch.float64)
        inverse = torch.linalg.inv(identity + moment)
        plain = weight @ gain @ inverse
        if hp.influential:
            retained = most_moved(retained, plain)
        _, _, directions = torch.linalg.svd(weight, full_matrices=False)
        least = directions[-1:]
        source = generator(hp.noise_seed)
        shape = (hp.copies, *retained.shape)
        noise = torch.randn(
            shape,
            generator=source,
            dtype=torch.float64,
        )
        moved = retained + noise @ least.T @ least
        noisy = moved.flatten(0, 1)
        copies = most_moved(noisy, plain)
        return torch.cat([retained, copies])


def most_moved(rows: Tensor, change: Tensor) -> Tensor:
    """Return the rows (m, D) that a change (O, D) of the weights moves by the mean over all rows, or more."""
    moved = (rows @ change.T).norm(dim=1)
    # rounding may put the mean of equal numbers above all of them
    least = moved.mean() * (1 - 1e-9)
    return rows[moved >= least]


def null_space(rows: Tensor, threshold: float) -> Tensor:
    """Return the projector (D, D) on what rows (m, D) have little of: eigenvalues of their mean square below this."""
    moment = rows.T @ rows / len(rows)
    values, vectors = torch.linalg.eigh(moment)
    free = vectors[:, values < threshold]
    projector: Tensor = free @ free.T
    return projector


def constrained_change(
    moment: Tensor, gain: Tensor, free: Tensor, exact: Tensor, lam: float
) -> Tensor:
    """Return X (D, D) for which W + W X are the edited weights, in a null space and with some rows as they are.

    `moment` and `gain` (D, D) are the sums of c c' and (g - c) c', `free` is the projector P, and the values of the
    rows `exact` (k, D) stay (eq. 13 of the paper). Where rows of `exact` lie outside of the null space already, the
    pseudo-inverse asks nothing of them; the published code inverts what is singular there.
    """
    width = len(moment)
    identity = torch.eye(width, dtype=torch.float64)
    system = moment @ free + lam * identity
    inner = torch.linalg.inv(system)
    spread = inner @ exact.T
    whole = exact @ spread
    inside = exact @ free
    inverse = torch.linalg.pinv(
        inside @ spread,
        atol=1e-10 * float(whole.norm()),
    )
    bound = identity - spread @ inverse @ inside
    change: Tensor = gain @ free @ bound @ inner
    return change


def centres(rows: Tensor, count: int) -> Tensor:
    """Return k-means centres (count, D) of rows (m, D); they begin at rows far from each other, not by chance."""
    found = rows[:1]
    count = min(count, len(rows))
    while len(found) < count:
        distances = torch.cdist(rows, found)
        farthest = distances.amin(1).argmax()
        chosen = rows[farthest]
        found = torch.cat([found, chosen[None]])
    for _ in range(_TURNS):
        distances = torch.cdist(rows, found)
        nearest = distances.argmin(1)
        moved = found.clone()
        for i in range(len(found)):
            members = rows[nearest == i]
            if len(members):
                moved[i] = members.mean(0)
        if torch.equal(moved, found):
            break
        found = moved
    return found


CONCEPT_EDITOR = Speed
