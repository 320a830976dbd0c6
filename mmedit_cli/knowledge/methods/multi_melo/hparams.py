"""The hyper-parameters of Multi-MELO; hparams/multi_melo.yaml says what each means and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from mmedit_cli.knowledge.models.shared.anchors import LinearRole
from mmedit_cli.layers import Layer, check_layers, layer_numbers


@dataclass(frozen=True)
class Reach:
    """How far (1 - cosine) each part of a query's key may be from that of an edit."""

    question: float = 0.305
    image: float = 0.502
    state: float = 0.4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")


@dataclass(frozen=True)
class MultiMeloHparams:
    """Where the blocks are, how they are trained, and how a query finds its own."""

    layers: tuple[Layer, ...] = (0.47, 0.63, 0.79, 0.97)
    roles: tuple[LinearRole, ...] = ("attn_q", "attn_k", "attn_v", "attn_out")
    rank: int = 8
    scale: float = 1.0
    learning_rate: float = 2.8e-4
    weight_decay: float = 0.0
    decay_every: int = 20
    decay: float = 0.5
    steps: int = 100
    stop_loss: float | None = 1e-2
    teach_end: bool = True
    jitter: float = 0.0
    edits_per_block: int = 1
    parallel: int = 16
    router: Literal["backbone", "hub", "melo"] = "backbone"
    mode: Literal["correct", "reference"] = "correct"
    reach: Reach = field(default_factory=Reach)
    separation: float = 0.5
    cluster_radius: float = 75.0
    text_encoder: str = "BAAI/bge-large-en-v1.5"
    image_encoder: str = "facebook/dinov2-large-imagenet1k-1-layer"
    leaky_keys: bool = False

    def __post_init__(self) -> None:
        check_layers("layers", *self.layers)
        for name in (
            "rank",
            "scale",
            "learning_rate",
            "decay_every",
            "decay",
            "steps",
            "edits_per_block",
            "parallel",
            "cluster_radius",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.separation < 1:
            raise ValueError(
                f"separation must lie between 0 and 1, not be {self.separation}: else edits hide edits"
            )
        if self.jitter < 0:
            raise ValueError(f"jitter must not be below 0: {self.jitter}")
        for name in ("layers", "roles"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        if self.mode == "reference" and self.router == "backbone":
            raise ValueError(
                "mode: reference has the constants of its encoders: use router: hub, or melo"
            )
        if self.leaky_keys and (self.mode, self.router) != ("reference", "hub"):
            raise ValueError(
                "leaky_keys puts the answer into the key: only for mode: reference with router: hub"
            )

    def at_depth(self, depth: int) -> MultiMeloHparams:
        """Return these values for a model with so many decoder layers; a fraction never names the first of them."""
        return replace(self, layers=layer_numbers(self.layers, depth, lowest=1))
