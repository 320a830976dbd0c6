"""The hyper-parameters of GRACE; hparams/grace.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mmedit_cli.layers import Layer, check_layers, layer_number


@dataclass(frozen=True)
class GraceHparams:
    """Where the codebook is, how far a key reaches, and how a value is learned."""

    layer: Layer = 0.66
    radius: Literal["fixed", "split", "balanced"] = "split"
    reach: float = 0.5
    balance: float = 0.5
    rewordings: tuple[str, ...] = ()
    start: Literal["warm", "cold"] = "warm"
    learning_rate: float = 1.0
    steps: int = 100
    stop_loss: float | None = 1e-2
    teach_end: bool = True
    parallel: int = 16

    def __post_init__(self) -> None:
        for name in ("reach", "learning_rate", "steps", "parallel"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance must lie between 0 and 1, not be {self.balance}")
        for wording in self.rewordings:
            if wording.count("{}") != 1:
                raise ValueError(
                    f"rewordings: {wording!r} needs {{}} once, where the question stands"
                )
        if self.radius == "balanced" and not self.rewordings:
            raise ValueError("radius: balanced needs rewordings of a question")
        check_layers("layer", self.layer)

    def at_depth(self, depth: int) -> GraceHparams:
        """Return these values for a model with so many decoder layers."""
        return replace(self, layer=layer_number(self.layer, depth))
