"""Blocks as LoRA adapters of peft: `adapter_config.json` and `adapter_model.safetensors` in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mmedit_cli.errors import StateError
from mmedit_cli.knowledge.methods.base import read_state
from mmedit_cli.knowledge.methods.shared.lora_blocks import Blocks
from mmedit_cli.reading import read_json_object

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # of every name in peft's files


def write(folder: Path, block: Blocks, scale: float, model: str) -> None:
    """Write one block; peft's `lora_alpha / r` is its scale. `model` is named as the base model."""
    from peft import LoraConfig
    from safetensors.torch import save

    from mmedit_cli.storage import write_atomic

    rank = next(iter(block.a.values())).shape[-1]
    config = LoraConfig(
        r=rank, lora_alpha=scale * rank, lora_dropout=0.0, bias="none",  # type: ignore[arg-type]
        target_modules=list(block.a), base_model_name_or_path=model, inference_mode=True,
    )  # fmt: skip
    plain = {
        key: sorted(v) if isinstance(v, set) else v
        for key, v in config.to_dict().items()
    }
    tensors = {
        f"{_PREFIX}{name}.lora_A.weight": a[0].T.cpu().contiguous()
        for name, a in block.a.items()
    }
    tensors |= {
        f"{_PREFIX}{name}.lora_B.weight": b[0].T.cpu().contiguous()
        for name, b in block.b.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / _WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomic(folder / _CONFIG, json.dumps(plain, indent=2, default=str).encode())


def read(
    folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int, scale: float
) -> Blocks:
    """Return the one block in a folder; raise StateError if it is no adapter of these layers, rank and scale."""
    config = read_json_object(
        folder / _CONFIG, error=StateError, hint="give the folder of a LoRA adapter"
    )
    found = {
        "peft_type": config.text("peft_type"),
        "r": config.integer("r"),
        "lora_alpha": config.number("lora_alpha"),
    }
    if (
        found["peft_type"] != "LORA"
        or found["r"] != rank
        or abs(found["lora_alpha"] - scale * rank) > 1e-6 * rank
    ):
        wanted = f"LORA with r {rank} and lora_alpha {scale * rank:g}"
        raise StateError(
            f"{folder}: {found['peft_type']} with r {found['r']}, lora_alpha {found['lora_alpha']}",
            wanted,
        )
    tensors, _ = read_state(folder / _WEIGHTS)
    names = {
        f"{_PREFIX}{name}.lora_{side}.weight": (name, side)
        for name in shapes
        for side in "AB"
    }
    if set(tensors) != set(names):
        other = min(set(tensors) ^ set(names))
        raise StateError(
            f"{folder}: does not fit the edited layers: {other}",
            "the hyper-parameters say which they are",
        )
    for key, (name, side) in names.items():
        width, out = shapes[name]
        if tensors[key].shape != ((rank, width) if side == "A" else (out, rank)):
            raise StateError(
                f"{folder}: {key} has the shape {tuple(tensors[key].shape)}"
            )
    a, b = (
        {
            n: tensors[f"{_PREFIX}{n}.lora_{side}.weight"].T.float()[None].contiguous()
            for n in shapes
        }
        for side in "AB"
    )
    return Blocks(a, b)
