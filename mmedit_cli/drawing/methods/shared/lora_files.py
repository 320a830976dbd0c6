"""LoRA files as diffusers and peft read them, for whole adapters and for single blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mmedit_cli.errors import StateError
from mmedit_cli.storage import write_tensors

A, B = ".lora_A.weight", ".lora_B.weight"


def pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A (r, in), B (out, r)) by module path; raise StateError if one of a pair is missing."""
    paths = {key.removesuffix(A).removesuffix(B) for key in tensors}
    found = {}
    for path in sorted(paths):
        if path + A not in tensors or path + B not in tensors:
            raise StateError(f"{path}: half of a LoRA pair is missing")
        found[path] = (tensors[path + A], tensors[path + B])
    return found


def tensors_of(
    blocks: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0
) -> dict[str, Tensor]:
    """Return tensors under the names of a LoRA file; B is multiplied by the scale, so that alpha equals the rank."""
    found = {}
    for path, (down, up) in blocks.items():
        scaled = up.detach() * scale
        found[path + A] = down.detach().cpu().contiguous()
        found[path + B] = scaled.cpu().contiguous()
    return found


def export(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a LoRA file that `load_lora_weights` of diffusers reads."""
    write_tensors(path, tensors, {"format": "pt"})


def _is_pair_for(shape: Sequence[int], down: Tensor, up: Tensor) -> bool:
    if down.dim() < 2 or up.dim() < 2:
        return False
    single = [1] * len(shape[2:])
    rank, *inputs = down.shape
    return inputs == list(shape[1:]) and list(up.shape) == [shape[0], rank, *single]


def check_fits(
    blocks: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    token: str,
) -> None:
    """Raise StateError unless every pair fits the weight (out, in) of its module, and none is missing."""
    for path, shape in shapes.items():
        if path not in blocks:
            raise StateError(
                f"{token}: {path} is missing, so it does not fit this model or rank"
            )
        down, up = blocks[path]
        if not _is_pair_for(shape, down, up):
            raise StateError(
                f"{token}: {path} does not fit a weight of shape {tuple(shape)}"
            )
    unknown = sorted(set(blocks) - set(shapes))
    if unknown:
        raise StateError(
            f"{token}: {unknown[0]} does not fit, there is no such projection"
        )
