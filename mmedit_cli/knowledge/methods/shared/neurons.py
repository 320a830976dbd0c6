"""Neurons beside the feed-forward part (FFN) of a decoder layer (T-Patcher, Huang et al. 2023; UniKE, eq. 1 and 3).

Adding them is the same as making the two matrices of the FFN larger, without copying either. A set of n neurons is a
dictionary: keys (..., n, D), bias (..., n), values (..., n, D), and in a gated FFN up (..., n, D), up_bias (..., n).
What stands in front of n may be a batch: then every row has neurons of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.patch import Patch

Neurons = Mapping[str, Tensor]


def fields(width: int, *, gated: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of one neuron by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "keys": (width,),
        "bias": (),
        "values": (width,),
    }
    return shapes | ({"up": (width,), "up_bias": ()} if gated else {})


def preactivation(inputs: Tensor, neurons: Neurons, name: str = "keys") -> Tensor:
    """Return what neurons read: (..., T, D) -> (..., T, n); `name` is keys, or up in a gated FFN."""
    bias = neurons["bias" if name == "keys" else "up_bias"]
    return inputs @ neurons[name].transpose(-1, -2) + bias.unsqueeze(-2)


def respond(
    inputs: Tensor, neurons: Neurons, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return what neurons add to the output of the FFN: (..., T, D) -> (..., T, D)."""
    active = act(preactivation(inputs, neurons))
    if "up" in neurons:
        active = active * preactivation(inputs, neurons, "up")
    return active @ neurons["values"]


@dataclass(frozen=True)
class Site:
    """The FFN of one decoder layer: where neurons are added.

    paths: the modules that are entered and left; gated: whether it multiplies two inner products (SwiGLU); act: its
    activation; rows: says how many sequences the pass under way has.
    """

    paths: tuple[str, str]
    gated: bool
    act: Callable[[Tensor], Tensor]
    rows: Callable[[], int]

    def hook(self, patch: Patch, adds: Callable[[Tensor], Tensor | None]) -> None:
        """Add `adds(what enters the FFN)` to what leaves it: float32 (B, T, D) -> (B, T, D); None: not a bit changes.

        OPT gives its FFN one row for all tokens of a batch; `adds` gets them by sequence all the same.
        """
        seen: list[Tensor] = []

        def keep(entering: Tensor) -> None:
            seen[:] = [entering]

        def add(leaving: Tensor) -> Tensor | None:
            entering = seen.pop()
            by_sequence = entering.reshape(
                self.rows(),
                -1,
                entering.shape[-1],
            )
            added = adds(by_sequence.float())
            if added is None:
                return None
            added = added.reshape(leaving.shape)
            return leaving + added.to(leaving.dtype)

        patch.hook_input(self.paths[0], keep)
        patch.hook(self.paths[1], add)


def site_of(backbone: VisionLanguageModel, layer: int) -> Site:
    """Return the FFN of a decoder layer; negative layers count from the end."""
    anchors = backbone.anchors

    def rows() -> int:
        batch = backbone.current_batch
        return 1 if batch is None else len(batch.queries)

    return Site(
        paths=(anchors.path("ffn_in", layer), anchors.path("ffn_out", layer)),
        gated="ffn_gate" in anchors.roles,
        act=anchors.module("ffn_act", layer),
        rows=rows,
    )


def fit(parameters: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return copies to be trained."""
    return {
        name: nn.Parameter(tensor.detach().clone())
        for name, tensor in parameters.items()
    }


def joined(sets: list[Neurons]) -> dict[str, Tensor]:
    """Return several sets as one, in order."""
    together: dict[str, Tensor] = {}
    for name in sets[0]:
        dim = -1 if name.endswith("bias") else -2
        parts = [neurons[name] for neurons in sets]
        together[name] = torch.cat(parts, dim=dim)
    return together
