"""The hyper-parameters of Perfusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmedit_cli.drawing.methods.shared.variants import check_coloured

TEMPLATES = (
    "a photo of a {}",
    "a good photo of a {}",
    "the photo of a {}",
    "a good photo of the {}",
    "image of a {}",
    "image of the {}",
    "A photograph of {}",
    "A {} shown in a photo",
    "A photo of {}",
)

_POSITIVE = (
    "steps",
    "batch_size",
    "accumulate",
    "learning_rate_embedding",
    "learning_rate_values",
    "train_tau",
    "tau",
    "vectors",
    "mask_power",
)


@dataclass(frozen=True)
class PerfusionHparams:
    """See hparams/perfusion.yaml for what each value means and where it comes from."""

    steps: int = 400
    batch_size: int = 4
    accumulate: int = 4
    learning_rate_embedding: float = 0.006
    learning_rate_values: float = 0.03
    weight_decay: float = 0.0
    clip: float | None = 1.0
    decay: float = 0.99
    straight_through: bool = True
    train_beta: float = 0.75
    train_tau: float = 0.10
    beta: float = 0.70
    tau: float = 0.15
    key_lock: Literal["local", "global", "global_gated", "none"] = "local"
    gate: Literal["paper", "normalized"] = "paper"
    gate_scope: Literal["tokens", "places", "paper"] = "tokens"
    overlap: Literal["exact", "ignore"] = "exact"
    edit_uncond: bool = False
    vectors: int = 1
    initializer: Literal["superclass", "random"] = "superclass"
    input_from: Literal["concept", "superclass"] = "concept"
    outputs_from: Literal["concept", "superclass"] = "superclass"
    mask: Literal["none", "file", "clipseg"] = "none"
    mask_model: str = "CIDAS/clipseg-rd64-refined"
    mask_power: int = 1
    side: int | None = None
    center_crop: bool = True
    flip: float = 0.5
    coloured: float = 0.0
    colours: tuple[str, ...] = ()
    ridge: float | None = None
    file_dtype: Literal["float16", "float32"] = "float16"
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        for name in ("decay", "flip"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {value}")
        check_coloured(self.coloured, self.colours)
        if self.coloured and self.mask != "none":
            raise ValueError("coloured shows what a mask leaves out: one of them")
        if self.several_edits and self.outputs_from == "superclass":
            raise ValueError(
                "several vectors that start from one output stay equal: outputs_from=concept"
            )
        nouns = [template.count("{}") for template in self.templates]
        if not nouns or any(count != 1 for count in nouns):
            raise ValueError("templates must each have one {} where the concept stands")

    @property
    def several_edits(self) -> bool:
        """Whether each of several vectors of a concept has an edit of its own; else the last one has."""
        return self.gate_scope == "places" and self.vectors > 1
