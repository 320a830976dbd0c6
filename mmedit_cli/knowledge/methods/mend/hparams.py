"""The hyper-parameters of MEND; hparams/mend.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmedit_cli.knowledge.methods.shared.training_values import check_training
from mmedit_cli.knowledge.models.shared.anchors import FfnRole

_ABOVE_ZERO = ("layers", "rank", "depth", "step_size", "ridge", "batch_size")


@dataclass(frozen=True)
class MendTraining:
    """How the networks are trained."""

    steps: int = 50_000
    batch_size: int = 2
    together: int = 1
    learning_rate: float = 1e-6
    step_size_pace: float = 100.0
    warmup: int = 0
    schedule: Literal["step", "cosine"] = "step"
    decay_at: int = 50_000
    decay: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = 100.0
    reliability: float = 0.0
    generality: float = 0.1
    locality: float = 1.0
    alternatives: int = 0
    others: int = 0
    validate_every: int = 5000
    validation_cases: int = 64
    patience: int | None = None

    def __post_init__(self) -> None:
        above_zero = ("batch_size", "together", "step_size_pace")
        check_training(self, above_zero=above_zero)


@dataclass(frozen=True)
class MendHparams:
    """Which matrices are changed, by what networks, and how the changes of several edits become one."""

    layers: int = 3
    roles: tuple[FfnRole, ...] = ("ffn_in", "ffn_out")
    rank: int = 1920
    depth: int = 2
    step_size: float = 1e-4
    aggregate: Literal["sum", "ridge"] = "sum"
    ridge: float = 1.0
    chain: Literal["current", "base"] = "current"
    teach_end: bool = True
    batch_size: int = 8
    training: MendTraining = field(default_factory=MendTraining)

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not self.roles:
            raise ValueError("roles must name at least one")
