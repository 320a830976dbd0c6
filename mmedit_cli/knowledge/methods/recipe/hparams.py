"""The hyper-parameters of RECIPE; hparams/recipe.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmedit_cli.knowledge.methods.shared.training_values import check_training

_ABOVE_ZERO = (
    "hidden_dim",
    "key_dim",
    "soft_tokens",
    "prototype_tokens",
    "answer_tokens",
)


@dataclass(frozen=True)
class RecipeTraining:
    """How the networks are trained."""

    steps: int = 20_000
    batch_size: int = 8
    learning_rate: float = 1e-5
    warmup: int = 0
    schedule: Literal["step", "cosine"] = "step"
    decay_at: int = 20_000
    decay: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = None
    hinge: float | None = 1.2
    answers: float = 1.0
    locality: float = 1.0
    routing: float = 1.0
    alternatives: int = 0
    others: int = 0
    validate_every: int = 1000
    validation_cases: int = 64
    validation_edits: int = 0
    patience: int | None = None

    def __post_init__(self) -> None:
        check_training(self, above_zero=("batch_size",))
        if self.hinge is not None and self.hinge < 1:
            raise ValueError(f"hinge must be at least 1 or null, not {self.hinge}")


@dataclass(frozen=True)
class RecipeHparams:
    """What a question is compared by, what an edit becomes, and the training."""

    hidden_dim: int = 4096
    key_dim: int = 4096
    soft_tokens: int = 3
    prototype_tokens: int = 10
    answer_tokens: int = 32
    margin: float = 0.0
    teach_end: bool = True
    training: RecipeTraining = field(default_factory=RecipeTraining)

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
