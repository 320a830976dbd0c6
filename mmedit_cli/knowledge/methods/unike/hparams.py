"""The hyper-parameters of UniKE; hparams/unike.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from mmedit_cli.knowledge.methods.shared.training_values import check_training
from mmedit_cli.layers import Layer, count_above


@dataclass(frozen=True)
class UnikeTraining:
    """How the knowledge is gathered and the encoders are trained."""

    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: Literal["step", "cosine"] = "cosine"
    decay_at: int = 10_000
    decay: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = None
    temperature: float = 0.07
    alternatives: int = 0
    others: int = 0
    validate_every: int = 500
    validation_cases: int = 64
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, not {self.batch_size}: encoders learn by comparison"
            )
        check_training(self, above_zero=("temperature",))


@dataclass(frozen=True)
class UnikeHparams:
    """Both memories, their collaboration, the scope of an edit, and the training."""

    mode: Literal["scoped", "reference"] = "scoped"
    intrinsic: bool = True
    external: bool = True
    collaboration: bool = True
    layers: Layer = 0.125
    neurons: int = 10
    steps: int = 25
    learning_rate: float = 1e-2
    clip: float = 1.0
    stop_loss: float = 0.05
    teach_end: bool = True
    beta: float = 0.1
    knowledge: int = 15_000
    top_k: int = 40
    sharpness: float = 16.0
    share: float = 0.2
    encoder_dim: int = 4096
    truth_dim: int = 1024
    scope_dim: int = 512
    heads: int = 8
    threshold: float = 0.0
    training: UnikeTraining = field(default_factory=UnikeTraining)

    def __post_init__(self) -> None:
        sizes = (
            "layers",
            "neurons",
            "steps",
            "learning_rate",
            "clip",
            "knowledge",
            "top_k",
            "sharpness",
        )
        for name in (*sizes, "encoder_dim", "truth_dim", "scope_dim", "heads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if isinstance(self.layers, float) and self.layers > 1:
            raise ValueError(f"layers {self.layers}: a share is at most 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie between 0 and 1, not {self.share}")
        if self.scope_dim % self.heads:
            raise ValueError(
                f"scope_dim {self.scope_dim} must be a multiple of heads {self.heads}"
            )
        if not (self.intrinsic or self.external):
            raise ValueError(
                "intrinsic and external are both off: nothing is left that could edit"
            )

    def at_depth(self, depth: int) -> UnikeHparams:
        """Return these values for a model with so many decoder layers."""
        return replace(self, layers=count_above(self.layers, depth))
