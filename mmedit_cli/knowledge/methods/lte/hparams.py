"""The hyper-parameters of LTE; hparams/lte.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmedit_cli.knowledge.methods.shared.training_values import check_training
from mmedit_cli.knowledge.models.shared.anchors import LinearRole

FACT, QUESTION = "{fact}", "{question}"
_ABOVE_ZERO = ("rank", "alpha", "hidden_dim", "prompt_dim", "detail_dim")


@dataclass(frozen=True)
class LteTraining:
    """How the follower and the retrieval are trained."""

    steps: int = 20_000
    batch_size: int = 4
    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: Literal["step", "cosine"] = "cosine"
    decay_at: int = 20_000
    decay: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    answers: float = 1.0
    locality: float = 1.0
    scope_loss: Literal["choice", "binary"] = "choice"
    composed: bool = True
    alternatives: int = 3
    others: int = 128
    validate_every: int = 1000
    validation_cases: int = 64
    validation_edits: int = 1000
    patience: int | None = None

    def __post_init__(self) -> None:
        check_training(
            self,
            above_zero=("batch_size",),
        )


@dataclass(frozen=True)
class LteHparams:
    """How a fact is told, what follows it, and by what it is retrieved."""

    template: str = "[Updated Information]:\n{fact}\n\n[Query]:\n{question}"
    roles: tuple[LinearRole, ...] = ("attn_q", "attn_v")
    rank: int = 8
    alpha: float = 16.0
    hidden_dim: int = 768
    prompt_dim: int = 128
    detail_dim: int = 8
    threshold: float = 0.0
    teach_end: bool = True
    training: LteTraining = field(default_factory=LteTraining)

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if not self.roles:
            raise ValueError("roles must name at least one")
        _, _, behind_fact = self.template.partition(FACT)
        once = [self.template.count(part) for part in (FACT, QUESTION)]
        if once != [1, 1] or QUESTION not in behind_fact:
            raise ValueError(
                f"template must have {FACT} and behind it {QUESTION}, each once"
            )
