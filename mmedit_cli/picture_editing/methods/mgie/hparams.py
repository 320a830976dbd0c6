"""The hyper-parameters of MGIE; see hparams/mgie.yaml for what each value means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal


@dataclass(frozen=True)
class TrainingHparams:
    """How MGIE is trained."""

    steps: int = 20_000
    batch_size: int = 128
    micro_batch: int = 4
    learning_rate: float = 5e-4
    unet_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 600
    clip: float | None = 1.0
    edit_weight: float = 0.5
    align_weight: float = 0.0
    drop: float = 0.05
    flip: float = 0.5
    resolution: int = 256
    phase: float = 0.5
    ema: float | None = None
    validate_every: int = 1000
    validation_pairs: int = 64
    schedule: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        check_positive(
            self,
            "steps",
            "batch_size",
            "micro_batch",
            "learning_rate",
            "unet_learning_rate",
            "resolution",
        )
        weights = (self.edit_weight, self.align_weight)
        if min(weights) < 0 or not sum(weights):
            raise ValueError(
                "edit_weight and align_weight must not be below 0, and not both be 0"
            )
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch {self.micro_batch}"
            )
        if not 0 <= self.drop <= 1 / 3:
            raise ValueError(
                f"drop must be from 0 to 1/3 (there are three such shares), not {self.drop}"
            )
        for name in ("flip", "phase"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {value}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(
                f"ema must be above 0 and below 1, or null, not {self.ema}"
            )


@dataclass(frozen=True)
class MgieHparams:
    """The parts of MGIE, and which of them are trained."""

    diffusion: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    train_lm: Literal["reference", "lora", "two_phase", "none"] = "lora"
    lora_rank: int = 16
    train_unet: Literal["full", "lora", "none"] = "full"
    unet_lora_rank: int = 64
    prompt: str = ""
    longest: int = 64
    expressive: Literal["model", "instruction"] = "model"
    d_model: int = 512
    d_feedforward: int = 2048
    layers: int = 4
    heads: int = 4
    training: TrainingHparams = field(default_factory=TrainingHparams)

    def __post_init__(self) -> None:
        check_positive(
            self,
            "lora_rank",
            "unet_lora_rank",
            "longest",
            "d_model",
            "d_feedforward",
            "layers",
            "heads",
        )


def check_positive(hparams: object, *names: str) -> None:
    """Raise ValueError for the first of these values that is not above 0."""
    for name in names:
        value = getattr(hparams, name)
        if value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")
