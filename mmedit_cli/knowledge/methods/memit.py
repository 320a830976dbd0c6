"""MEMIT: states that give the new answers are written into feed-forward matrices of several layers at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.shared.key_value_editor import (
    KeyValueEditor,
    KeyValueHparams,
)
from mmedit_cli.knowledge.methods.shared.ridge import KeptKeys

_RIDGE = 1e-6  # of the mean of the diagonal, where the moment alone has no inverse


@dataclass(frozen=True)
class MemitHparams(KeyValueHparams):
    """See hparams/memit.yaml for what each value means and where it comes from."""

    remember: bool = False
    keep: float = 15000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep <= 0:
            raise ValueError(f"keep must be above 0, not {self.keep}")


class Memit(KeyValueEditor):
    """MEMIT (Meng et al., ICLR 2023): M is a multiple of the second moment of the keys of other questions.

    With one layer it is ROME's update for several facts, with `keep` in the place of an exact constraint.
    """

    name = "memit"
    Hparams = MemitHparams
    hparams: MemitHparams
    plain = True

    def _kept_of(self, layer: int, moment: Tensor) -> KeptKeys:
        identity = torch.eye(len(moment)).to(moment)
        ridge = _RIDGE * moment.diagonal().mean()
        kept = moment + ridge * identity
        return KeptKeys.of(self.hparams.keep * kept)


EDITOR = Memit
