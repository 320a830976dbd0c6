"""The hyper-parameters of WISE; hparams/wise.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mmedit_cli.layers import Layer, check_layers, layer_number


@dataclass(frozen=True)
class WiseHparams:
    """Where the side memory is, how it is taught, how it is divided, and when it answers."""

    layer: Layer = 0.85
    steps: int = 70
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 1.0
    norm_constraint: float | None = 1.0
    stop_loss: float | None = 1e-2
    teach_end: bool = True
    mask_ratio: float = 0.2
    edits_per_memory: int = 500
    mode: Literal["retrieve", "merge"] = "retrieve"
    density: float = 0.53
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    act_ratio: float = 0.88
    positions: Literal["question", "last"] = "question"
    replay: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "learning_rate",
            "edits_per_memory",
            "beta",
            "act_ratio",
            "batch_size",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("alpha", "gamma", "replay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0: {getattr(self, name)}")
        for name in ("mask_ratio", "density"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must lie between 0 and 1, not be {getattr(self, name)}"
                )
        if self.norm_constraint is not None and self.norm_constraint <= 0:
            raise ValueError(
                f"norm_constraint must be above 0 or null, not {self.norm_constraint}"
            )
        check_layers("layer", self.layer)

    def at_depth(self, depth: int) -> WiseHparams:
        """Return these values for a model with so many decoder layers."""
        return replace(self, layer=layer_number(self.layer, depth))
