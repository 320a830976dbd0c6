"""Tensors in eight bits, for files that come along: whole numbers, and one scale a row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LEVELS = 127  # of an 8-bit integer, on either side of 0
_SCALE = ".scale"


def to_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file: matrices (and larger) as int8 with a scale a row, vectors in float16."""
    small = {}
    for name, value in tensors.items():
        if value.dim() < 2:
            small[name] = value.half()
            continue
        columns = tuple(range(1, value.dim()))
        largest = value.abs().amax(columns, keepdim=True)
        scale = largest.float().clamp(min=1e-12) / _LEVELS
        rounded = (value / scale).round()
        small[name] = rounded.to(torch.int8)
        small[name + _SCALE] = scale
    return small


def from_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under their own names: those in eight bits in float32, all others as they are."""
    packed = [name for name, value in tensors.items() if value.dtype == torch.int8]
    scales = {name + _SCALE for name in packed} & tensors.keys()
    values = {name: value for name, value in tensors.items() if name not in scales}
    for name in packed:
        value = values[name]
        scale = tensors.get(name + _SCALE)
        values[name] = value if scale is None else value.float() * scale
    return values
