"""AlphaEdit: as MEMIT, but matrices change only where the keys of everything else have nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.methods.shared.key_value_editor import (
    KeyValueEditor,
    KeyValueHparams,
)
from mmedit_cli.knowledge.methods.shared.ridge import KeptKeys


@dataclass(frozen=True)
class AlphaeditHparams(KeyValueHparams):
    """See hparams/alphaedit.yaml for what each value means and where it comes from."""

    threshold: float = 2e-2
    relative: bool = False
    ridge: float = 10.0
    expressible: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "ridge"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.expressible < 1:
            raise ValueError(f"expressible must lie from 0 to 1: {self.expressible}")


class Alphaedit(KeyValueEditor):
    """AlphaEdit (Fang et al., ICLR 2025): changes are projected onto the null space of the keys that are kept.

    The published system (P (K'K + C) + L I)^-1 P K'R is not symmetric. The same change is found here in a basis of
    the null space, where it is a ridge regression.
    """

    name = "alphaedit"
    Hparams = AlphaeditHparams
    hparams: AlphaeditHparams
    plain = True

    def _kept_of(self, layer: int, moment: Tensor) -> KeptKeys:
        basis = self._basis(layer, moment)
        _, size = basis.shape
        identity = torch.eye(size).to(basis)
        return KeptKeys.of(self.hparams.ridge * identity)

    def _basis(self, layer: int, moment: Tensor | None = None) -> Tensor:
        """Return the directions (F, r) that the kept keys hardly have, orthonormal; found once."""
        if layer not in self._bases:
            if moment is None:
                moment = self._moments()[layer]
            self._bases[layer] = null_space(
                moment,
                self.hparams.threshold,
                relative=self.hparams.relative,
            )
        return self._bases[layer]

    def _seen(self, layer: int, keys: Tensor) -> Tensor:
        seen = keys @ self._basis(layer)
        shares = seen.square().sum(1) / keys.square().sum(1)
        least = float(shares.min())
        if least <= self.hparams.expressible:
            raise DataError(
                f"alphaedit: edit not expressible: a key in layer {layer} has {least:.1e} outside the preserved space",
                "a larger threshold preserves less, and so do other layers or another position",
            )
        return seen

    def _back(self, layer: int, change: Tensor) -> Tensor:
        return self._basis(layer) @ change


def null_space(moment: Tensor, threshold: float, *, relative: bool = False) -> Tensor:
    """Return the eigenvectors (F, r) of a moment whose eigenvalue is below the threshold, largest value first.

    `relative`: the threshold is a multiple of the mean eigenvalue. Raises DataError if there are none.
    """
    values, vectors = torch.linalg.eigh(moment)
    bound = threshold
    if relative:
        mean = float(values.mean())
        bound = threshold * mean
    chosen: Tensor = vectors[:, values < bound]
    if not chosen.shape[1]:
        raise DataError(
            f"threshold {threshold}: everything is preserved, the smallest eigenvalue is {float(values[0]):.1e}",
            "raise threshold, or set relative=true",
        )
    return chosen


EDITOR = Alphaedit
