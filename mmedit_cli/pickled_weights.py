"""From pickled weights to safetensors: tensors alone are read, nothing in the files is executed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmedit_cli.errors import ModelError
from mmedit_cli.model_folder import loading, read_config, read_object
from mmedit_cli.storage import staged_folder, write_atomic, write_tensors

# files that are copied as they are
_COPIED = (".json", ".txt", ".model", ".jinja", ".md", ".safetensors")
# of weights; other pickles are states of a training
_STEMS = ("pytorch_model", "diffusion_pytorch_model")


def to_safetensors(folder: Path, out: Path, say: Callable[[str], None]) -> list[str]:
    """Write a model folder or pipeline anew with its pickled weights as safetensors; return the files converted.

    `out` must not exist. Raises ModelError if a file is none of tensors, or if there is nothing to convert.
    """
    read_config(folder)
    if out.exists():
        raise ModelError(f"{out}: exists already", "name a folder that does not")
    files = _files(folder)
    pickled = []
    for path in files:
        if path.suffix == ".bin" and path.stem.startswith(_STEMS):
            pickled.append(path)
    if not pickled:
        raise ModelError(
            f"{folder}: no pickled weights (pytorch_model.bin) to convert",
            "use it as it is",
        )
    with staged_folder(out) as fresh:
        for path in files:
            target = fresh / path.relative_to(folder)
            renamed = target.with_name(_renamed(path.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in pickled:
                say(f"converting {path.relative_to(folder)}")
                write_tensors(renamed, _tensors(path), {"format": "pt"})
            elif path.name.endswith(".bin.index.json"):
                write_atomic(renamed, json.dumps(_index(path), indent=2))
            elif path.suffix in _COPIED:
                shutil.copyfile(path, target)
    return [str(path.relative_to(folder)) for path in pickled]


def _files(folder: Path) -> list[Path]:
    """Return the files of a model folder and of the parts of a pipeline."""
    paths = {*folder.glob("*"), *folder.glob("*/*")}
    return [path for path in sorted(paths) if path.is_file()]


def _renamed(name: str) -> str:
    """Return the name under which transformers or diffusers look for the same weights as safetensors."""
    if name.startswith("pytorch_model"):
        name = "model" + name.removeprefix("pytorch_model")
    return name.replace(".bin", ".safetensors")


def _index(path: Path) -> dict[str, object]:
    content = read_object(path)
    files = content.get("weight_map")
    if not isinstance(files, dict):
        raise ModelError(
            f"{path}: no weight_map, so it names no weight files", "copy it again"
        )
    renamed = {name: _renamed(str(file)) for name, file in files.items()}
    return {**content, "weight_map": renamed}


def _tensors(path: Path) -> dict[str, Tensor]:
    with loading(path, problem="not a file of tensors", hint="get the file again"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        return dict(_own_memory(content))


def _own_memory(content: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that share no memory, as the format wants them: tied weights are written twice."""
    seen: set[int] = set()
    for name, tensor in content.items():
        place = tensor.untyped_storage().data_ptr()
        own = tensor.clone() if place in seen else tensor
        yield name, own.contiguous()
        seen.add(place)
