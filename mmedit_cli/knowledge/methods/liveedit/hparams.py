"""The hyper-parameters of LiveEdit; hparams/liveedit.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from mmedit_cli.knowledge.methods.shared.training_values import check_training
from mmedit_cli.layers import Layer, check_layers, layer_number


@dataclass(frozen=True)
class LiveEditTraining:
    """How the networks are trained."""

    steps: int = 40_000
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: Literal["step", "cosine"] = "step"
    decay_at: int = 10_000
    decay: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = None
    reliability: float = 1.0
    generality: float = 1.0
    locality: float = 1.0
    soft_routing: float = 1.0
    hard_routing: float = 1.0
    teach_end: bool = False
    generality_items: Literal["all", "one"] = "all"
    locality_items: Literal["all", "one"] = "one"
    taught: int | None = None
    alternatives: int = 0
    others: int = 0
    compat: Literal["correct", "reference"] = "correct"
    validate_every: int = 500
    validation_cases: int = 256
    validation_edits: int = 0
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, not {self.batch_size}: routers learn by comparison"
            )
        if self.taught is not None and self.taught < 1:
            raise ValueError(f"taught must be at least 1 or null, not {self.taught}")
        check_training(self)


@dataclass(frozen=True)
class LiveEditHparams:
    """The networks, the routing, and the training."""

    module_dim: int = 1024
    heads: int = 8
    rank: int = 4
    feature_vectors: int = 4
    lora_scale: float = 5.0
    edit_layer: Layer = 0.66
    sentinel_tokens: int = 32
    answer_slots: bool = True
    whole_picture: bool = True
    detail_dim: int = 8
    naming: str | None = None
    variant: Literal["paper", "joint"] = "joint"
    visual_weight: float = 1.0
    top_k: int | None = None
    margin: float = 0.0
    refine: int = 30
    training: LiveEditTraining = field(default_factory=LiveEditTraining)

    def __post_init__(self) -> None:
        check_layers("edit_layer", self.edit_layer)
        for name in (
            "module_dim",
            "heads",
            "rank",
            "feature_vectors",
            "lora_scale",
            "sentinel_tokens",
            "detail_dim",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.naming is not None and not self.naming.strip():
            raise ValueError("naming must be a question or null")
        compares_wholes = self.whole_picture and self.variant == "joint"
        if not compares_wholes:
            # names are compared beside whole pictures alone
            object.__setattr__(self, "naming", None)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or null, not {self.top_k}")
        if self.module_dim % self.heads:
            raise ValueError(
                f"module_dim {self.module_dim} must be a multiple of heads {self.heads}"
            )

    def at_depth(self, depth: int) -> LiveEditHparams:
        """Return these values for a model with so many decoder layers."""
        return replace(self, edit_layer=layer_number(self.edit_layer, depth))
