"""Blocks as LoRA adapters of peft: `adapter_config.json` and `adapter_model.safetensors` in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmedit_cli.adapters import is_transposed
from mmedit_cli.errors import StateError
from mmedit_cli.knowledge.methods.base import read_state
from mmedit_cli.knowledge.methods.shared.lora_blocks import Blocks
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.reading import read_json_object

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # of every name in peft's files


def write(
    folder: Path, block: Blocks, scale: float, backbone: VisionLanguageModel
) -> None:
    """Write one block; peft's `lora_alpha / r` is its scale. The backbone is named as the base model."""
    from peft import LoraConfig
    from safetensors.torch import save

    from mmedit_cli.storage import write_atomic

    rank = next(iter(block.a.values())).shape[-1]
    linears = [backbone.model.get_submodule(path) for path in block.a]
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules=list(block.a),
        fan_in_fan_out=any(is_transposed(linear) for linear in linears),
        base_model_name_or_path=backbone.name,
        inference_mode=True,
    )
    settings: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    for key, value in settings.items():
        if isinstance(value, set):
            settings[key] = sorted(value)
    text = json.dumps(
        settings,
        indent=2,
        default=str,
    )
    tensors: dict[str, Tensor] = {}
    for path, a in block.a.items():
        tensors[_name(path, "A")] = a[0].T.cpu().contiguous()
    for path, b in block.b.items():
        tensors[_name(path, "B")] = b[0].T.cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / _WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomic(folder / _CONFIG, text.encode())


def read(
    folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int, scale: float
) -> Blocks:
    """Return the one block in a folder; raise StateError if it is no adapter of these layers, rank and scale."""
    config = read_json_object(
        folder / _CONFIG, error=StateError, hint="give the folder of a LoRA adapter"
    )
    kind = config.text("peft_type")
    own_rank = config.integer("r")
    alpha = config.number("lora_alpha")
    wanted_alpha = scale * rank
    same_alpha = abs(alpha - wanted_alpha) <= 1e-6 * rank
    if kind != "LORA" or own_rank != rank or not same_alpha:
        raise StateError(
            f"{folder}: {kind} with r {own_rank}, lora_alpha {alpha}",
            f"LORA with r {rank} and lora_alpha {wanted_alpha:g}",
        )
    tensors, _ = read_state(folder / _WEIGHTS)
    wanted: dict[str, tuple[int, int]] = {}
    for path, (width, out) in shapes.items():
        wanted[_name(path, "A")] = (rank, width)
        wanted[_name(path, "B")] = (out, rank)
    if set(tensors) != set(wanted):
        other = min(set(tensors) ^ set(wanted))
        raise StateError(
            f"{folder}: does not fit the edited layers: {other}",
            "the hyper-parameters say which they are",
        )
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise StateError(f"{folder}: {name} has the shape {found}")
    a = {path: _from_peft(tensors[_name(path, "A")]) for path in shapes}
    b = {path: _from_peft(tensors[_name(path, "B")]) for path in shapes}
    return Blocks(a, b)


def _name(path: str, matrix: str) -> str:
    """Return peft's name for matrix A or B of a layer."""
    return f"{_PREFIX}{path}.lora_{matrix}.weight"


def _from_peft(tensor: Tensor) -> Tensor:
    """Return a matrix of peft's as that of one block: its transpose, (1, ...), float32."""
    transposed = tensor.T.float()
    return transposed[None].contiguous()
