"""The hyper-parameters of UltraEdit; hparams/ultraedit.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mmedit_cli.knowledge.models.shared.anchors import FfnRole
from mmedit_cli.layers import Layer, check_layers, layer_numbers

_ABOVE_ZERO = (
    "steps",
    "step_size",
    "trials",
    "ridge",
    "kl_cap",
    "unrelated",
    "watched",
    "batch_size",
)


@dataclass(frozen=True)
class UltraeditHparams:
    """Which matrices are changed, towards what, how far, and what is kept."""

    layers: tuple[Layer, ...] = (0.93, 0.96)
    roles: tuple[FfnRole, ...] = ("ffn_out",)
    values: Literal["normalized", "raw"] = "normalized"
    warm: bool = True
    steps: int = 1
    step_size: float = 1e-6
    search: bool = True
    trials: int = 12
    stop_loss: float = 0.1
    kl_cap: float = 0.05
    ridge: float = 1.0
    remember: bool = False
    keep: float = 0.0
    replay: int = 0
    unrelated: int = 64
    watched: int = 32
    teach_end: bool = True
    batch_size: int = 10

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("stop_loss", "keep", "replay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0: {getattr(self, name)}")
        for name in ("layers", "roles"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        check_layers("layers", *self.layers)

    def at_depth(self, depth: int) -> UltraeditHparams:
        """Return these values for a model with so many decoder layers."""
        return replace(self, layers=layer_numbers(self.layers, depth))
