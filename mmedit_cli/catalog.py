"""Which models there are, and where one given by name, folder or hub id really lies. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli.errors import ModelError, near_miss
from mmedit_cli.registry import share_dir


@dataclass(frozen=True)
class Entry:
    """A model with a name of its own: its family and, unless it is built from a config, its hub repository."""

    family: str
    repo: str | None
    summary: str


_TINY = "random weights, built from a config: for tests and for trying a command"
MODELS = {
    "tiny-blip2": Entry("blip2", None, _TINY),
    "tiny-llava": Entry("llava", None, _TINY),
    "tiny-minigpt4": Entry("minigpt4", None, _TINY),
    "tiny-qwen2-vl": Entry("qwen-vl", None, _TINY),
    "tiny-qwen2.5-vl": Entry("qwen-vl", None, _TINY),
    "tiny-qwen3-vl": Entry("qwen-vl", None, _TINY),
    "blip2-opt-2.7b": Entry("blip2", "Salesforce/blip2-opt-2.7b", "BLIP-2 with OPT-2.7B (32 layers)"),
    "blip2-opt-6.7b": Entry("blip2", "Salesforce/blip2-opt-6.7b", "BLIP-2 with OPT-6.7B (32 layers)"),
    "llava-1.5-7b": Entry("llava", "llava-hf/llava-1.5-7b-hf", "LLaVA-1.5 with Vicuna-7B (32 layers)"),
    "llava-1.5-13b": Entry("llava", "llava-hf/llava-1.5-13b-hf", "LLaVA-1.5 with Vicuna-13B (40 layers)"),
    "qwen2-vl-2b": Entry("qwen-vl", "Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL 2B (28 layers)"),
    "qwen2-vl-7b": Entry("qwen-vl", "Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL 7B (28 layers)"),
    "qwen2.5-vl-3b": Entry("qwen-vl", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL 3B (36 layers)"),
    "qwen2.5-vl-7b": Entry("qwen-vl", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL 7B (28 layers)"),
    "qwen3-vl-2b": Entry("qwen-vl", "Qwen/Qwen3-VL-2B-Instruct", "Qwen3-VL 2B (28 layers)"),
    "qwen3-vl-4b": Entry("qwen-vl", "Qwen/Qwen3-VL-4B-Instruct", "Qwen3-VL 4B (36 layers)"),
    "qwen3-vl-8b": Entry("qwen-vl", "Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL 8B (36 layers)"),
    "qwen3-vl-32b": Entry("qwen-vl", "Qwen/Qwen3-VL-32B-Instruct", "Qwen3-VL 32B (64 layers)"),
}

DEFAULTS = ("mini-blip2", "tiny-blip2")  # the first that is there is used where no model is named
FAMILIES = {  # config.json: model_type -> backbone module
    "blip-2": "blip2",
    "llava": "llava",
    "minigpt4": "minigpt4",
    "qwen2_vl": "qwen-vl",
    "qwen2_5_vl": "qwen-vl",
    "qwen3_vl": "qwen-vl",
}
TINY_VERSION = 1  # raise it when a tiny model changes: old reports are then not taken for new ones

FILES = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
)  # of a hub repository; pickled weights are left there
_STRIDE, _CHUNK = 16 << 20, 64 << 10


@dataclass(frozen=True)
class ModelRef:
    """A model that was found.

    `name` is that of the catalogue, else the hub id or the name of the folder; `folder` holds the files (None: built
    from a config); `fingerprint` stands for the content.
    """

    name: str
    family: str
    folder: Path | None
    fingerprint: str


def bundled() -> dict[str, Path]:
    """Return the trained models that come along, by name: the folders of data/models with a config.json."""
    return {path.parent.name: path.parent for path in sorted((share_dir("data") / "models").glob("*/config.json"))}


def default_model() -> str:
    """Return the model that is used where none is named."""
    return next(name for name in DEFAULTS if name in MODELS or name in bundled())


def find_model(name: str, *, revision: str | None = None) -> ModelRef:
    """Return where a model lies: a name of the catalogue, a local folder, or a hub id `owner/name`.

    A folder wins over the hub cache, the cache over the network. Raises ModelError with what was tried.
    """
    entry = MODELS.get(name)
    if entry is not None and entry.repo is None:
        return ModelRef(name, entry.family, None, hashlib.sha256(f"{name}/{TINY_VERSION}".encode()).hexdigest()[:16])
    folder = bundled().get(name, Path(name))
    if entry is None and not folder.exists() and name.count("/") != 1:
        known = [*bundled(), *MODELS]
        problem = f"--model {name}: neither a known name, nor a folder, nor a hub id{near_miss(name, known)}"
        raise ModelError(problem, f"known names: {', '.join(known)}")
    if entry is None and folder.exists():
        return ModelRef(folder.resolve().name, _family(folder), folder, fingerprint_folder(folder))
    repo = entry.repo if entry is not None and entry.repo else name
    folder = from_hub(repo, revision)
    short = next((known for known, other in MODELS.items() if other.repo == repo), repo)
    return ModelRef(short, _family(folder), folder, fingerprint_folder(folder))


def from_hub(repo: str, revision: str | None, files: Sequence[str] = FILES) -> Path:
    """Return the snapshot folder of a hub repository, downloaded if it is not complete in the cache.

    `files` are patterns of what is taken. Raises ModelError.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = list(files)
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=patterns))
        if any(folder.rglob("*.safetensors")):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    cache = f"looked in {constants.HF_HUB_CACHE}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise ModelError(f"{repo}: not in the cache, and HF_HUB_OFFLINE is set", f"{cache}; unset it to download")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"{repo}: cannot be fetched from the hub: {reason}", f"{cache}; check the name") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder; raise ModelError if there is none that can be read."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder}: not a folder", "give a folder as save_pretrained writes it")
    if not path.is_file():
        raise ModelError(
            f"{folder}: no config.json, so not a model folder", "give a folder as save_pretrained writes it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


def _family(folder: Path) -> str:
    model_type = str(read_config(folder).get("model_type"))
    if model_type not in FAMILIES:
        problem = f"{folder}: model_type {model_type!r} is not supported{near_miss(model_type, FAMILIES)}"
        raise ModelError(problem, f"supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder; raise ModelError if there are none, or if one is missing."""
    files = sorted(folder.glob("*.safetensors"))
    named: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(named - {file.name for file in files})
    if missing:
        raise ModelError([f"{folder}: {name} is named in the index but missing" for name in missing], "copy it there")
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        hint = "convert the pickled weights to safetensors first" if pickled else "copy model.safetensors there"
        raise ModelError(f"{folder}: no weights (*.safetensors)", hint)
    return files


def fingerprint_folder(folder: Path) -> str:
    """Digest the config and, of each weight file, the size, the header and a 64 KiB sample of every 16 MiB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            head = int.from_bytes(stream.read(8), "little")
            if size < 8 or head > size - 8:
                raise ModelError(f"{file}: not a complete safetensors file", "copy it again")
            digest.update(stream.read(head))
            for chunk in _samples(size, head + 8):
                stream.seek(chunk)
                digest.update(stream.read(_CHUNK))
    return digest.hexdigest()[:16]


def _samples(size: int, start: int) -> Iterator[int]:
    yield from range(start, size, _STRIDE)
    yield max(start, size - _CHUNK)
