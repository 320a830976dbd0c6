"""The hyper-parameters of SERAC; hparams/serac.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmedit_cli.knowledge.methods.shared.training_values import check_training

_ABOVE_ZERO = ("hidden_dim", "prompt_dim", "detail_dim", "answer_dim", "answer_tokens")


@dataclass(frozen=True)
class SeracTraining:
    """How both networks are trained."""

    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: Literal["step", "cosine"] = "cosine"
    decay_at: int = 10_000
    decay: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = None
    scope_loss: Literal["choice", "binary"] = "choice"
    composed: bool = True
    alternatives: int = 3
    others: int = 128
    validate_every: int = 1000
    validation_cases: int = 64
    validation_edits: int = 1000
    patience: int | None = None

    def __post_init__(self) -> None:
        check_training(self, above_zero=("batch_size",))


@dataclass(frozen=True)
class SeracHparams:
    """The scope classifier, the counterfactual model, and their training."""

    hidden_dim: int = 768
    prompt_dim: int = 128
    detail_dim: int = 8
    answer_dim: int = 512
    answer_tokens: int = 32
    threshold: float = 0.0
    teach_end: bool = True
    training: SeracTraining = field(default_factory=SeracTraining)

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
