"""RECE: UCE, and then also what would still bring an erased concept back, found in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.drawing.methods.shared.closed_form import Rows, changed, ridge_change
from mmedit_cli.drawing.methods.shared.concept_editor import (
    ConceptEditor,
    ConceptHparams,
)
from mmedit_cli.drawing.methods.shared.token_pairs import Pairing


@dataclass(frozen=True)
class ReceHparams(ConceptHparams):
    """See hparams/rece.yaml for what each value means and where it comes from."""

    lam: float = 0.1
    keep_scale: float = 0.1
    pairing: Pairing = "all"
    rounds: int = 3
    adversary: float = 0.1
    chained: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest = min(self.rounds, self.adversary)
        if lowest < 0:
            raise ValueError("rounds and adversary must not be below 0")


class Rece(ConceptEditor):
    """Reliable and efficient concept erasure (Gong et al., ECCV 2024, arXiv 2407.12383)."""

    name = "rece"
    Hparams = ReceHparams

    def _solve(
        self, weights: Mapping[str, Tensor], edits: Rows, stays: Rows
    ) -> Mapping[str, Tensor]:
        gram = gram_of(weights.values())
        hp = self.hparams
        change = ridge_change([edits, stays], hp.lam)
        asked = [edits, stays]
        for _ in range(hp.rounds):
            back = adversarial(edits.inputs, gram, change, hp.adversary)
            again = Rows(back, edits.goals, edits.scale)
            if hp.chained:
                change = chain(change, ridge_change([again, stays], hp.lam))
            else:
                asked.append(again)
                change = ridge_change(asked, hp.lam)
        return {path: changed(weight, change) for path, weight in weights.items()}


def gram_of(weights: Iterable[Tensor]) -> Tensor:
    """Return the sum of W'W over projections (O, D): (D, D) in float64."""
    products = []
    for weight in weights:
        base = weight.double()
        products.append(base.T @ base)
    return torch.stack(products).sum(0)


def adversarial(
    encodings: Tensor, gram: Tensor, change: Tensor, penalty: float
) -> Tensor:
    """Return the encodings (n, D) that draw best, in the edited model, what encodings (n, D) drew in the base model.

    They minimise the sum over projections of |V c* - W c|^2 + penalty |c*|^2 for edited weights V = W + W X (eq. 7 of
    the paper); `gram` is the sum of W'W, `change` is X.
    """
    mixed = torch.eye(len(change), dtype=torch.float64) + change
    identity = torch.eye(len(change), dtype=torch.float64)
    left = mixed.T @ gram @ mixed
    right = mixed.T @ gram @ encodings.double().T
    solved: Tensor = torch.linalg.solve(
        left + penalty * identity,
        right,
    )
    return solved.T


def chain(first: Tensor, then: Tensor) -> Tensor:
    """Return the X of an edit `then` that was made on weights which an edit `first` had changed."""
    return first + then + first @ then


CONCEPT_EDITOR = Rece
