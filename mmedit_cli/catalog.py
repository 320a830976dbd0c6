"""Which models there are, and where one given by name, folder or hub id really lies. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli import hub
from mmedit_cli.errors import ModelError, UserError, near_miss
from mmedit_cli.registry import share_dir


@dataclass(frozen=True)
class Entry:
    """A model with a name of its own: its family and, unless it is built from a config, its hub repository."""

    family: str
    repo: str | None
    summary: str


DRAWS = "stable-diffusion"  # the family that makes pictures from text; all others answer questions
_TINY = "random weights, built from a config: for tests and for trying a command"
MODELS = {
    "tiny-blip2": Entry("blip2", None, _TINY),
    "tiny-llava": Entry("llava", None, _TINY),
    "tiny-minigpt4": Entry("minigpt4", None, _TINY),
    "tiny-qwen2-vl": Entry("qwen-vl", None, _TINY),
    "tiny-qwen2.5-vl": Entry("qwen-vl", None, _TINY),
    "tiny-qwen3-vl": Entry("qwen-vl", None, _TINY),
    "tiny-sd": Entry(DRAWS, None, _TINY),
    "tiny-sdxl": Entry(DRAWS, None, _TINY),
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
    "stable-diffusion-v1-4": Entry(DRAWS, "CompVis/stable-diffusion-v1-4", "Stable Diffusion 1.4, 512 px"),
    "stable-diffusion-v1-5": Entry(
        DRAWS, "stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5, 512 px"
    ),
    "stable-diffusion-2-1": Entry(DRAWS, "stabilityai/stable-diffusion-2-1", "SD 2.1, 768 px"),
    "sdxl-1.0": Entry(DRAWS, "stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion XL, 1024 px"),
}

DEFAULTS = ("mini-blip2", "tiny-blip2")  # the first that is there is used where no model is named
DRAWING_DEFAULTS = ("mini-sd", "tiny-sd")  # the same for text-to-image
FAMILIES = {  # config.json: model_type, or model_index.json: _class_name -> backbone module
    "blip-2": "blip2",
    "llava": "llava",
    "minigpt4": "minigpt4",
    "qwen2_vl": "qwen-vl",
    "qwen2_5_vl": "qwen-vl",
    "qwen3_vl": "qwen-vl",
    "StableDiffusionPipeline": DRAWS,
    "StableDiffusionXLPipeline": DRAWS,
}
TINY_VERSION = 1  # raise it when a tiny model changes: old reports are then not taken for new ones

FILES = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
)  # of a hub repository; pickled weights are left there
PIPELINE_FILES = (  # of one that holds a diffusers pipeline: no second copies in float16, no single-file checkpoint
    "model_index.json",
    "*/*.json",
    "*/*.txt",
    "vae/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder*/model.safetensors",
)
INDEX = "model_index.json"  # of a pipeline
CHECKPOINT = "editor.safetensors"  # what a training of mgie left: nothing frozen is in it
_CONFIGS = ("config.json", INDEX)
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
    """Return the trained models that come along, by name: those in data/models that answer or draw."""
    return {name: folder for name, folder in _shipped().items() if _kind(folder) in FAMILIES}


def own_image_editors() -> dict[str, Path]:
    """Return what comes along to change pictures, by name: other pipelines in data/models, and trainings of mgie."""
    left = {name: folder for name, folder in _shipped().items() if _kind(folder) not in FAMILIES}
    return {name: folder for name, folder in left.items() if any((folder / f).is_file() for f in (INDEX, CHECKPOINT))}


def _shipped() -> dict[str, Path]:
    return {path.name: path for path in sorted((share_dir("data") / "models").glob("*")) if path.is_dir()}


def default_model(names: Sequence[str] = DEFAULTS) -> str:
    """Return the model that is used where none is named."""
    return next(name for name in names if name in MODELS or name in bundled())


def patterns(repo: str) -> tuple[str, ...]:
    """Return which files of a hub repository are fetched."""
    pipelines = [entry.repo for entry in MODELS.values() if entry.family == DRAWS]
    return PIPELINE_FILES if repo in pipelines else FILES


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
        return ModelRef(folder.resolve().name, family_of(folder), folder, fingerprint(folder))
    repo = entry.repo if entry is not None and entry.repo else name
    folder = hub_folder(repo, revision)
    short = next((known for known, other in MODELS.items() if other.repo == repo), repo)
    return ModelRef(short, family_of(folder), folder, fingerprint(folder))


def hub_folder(repo: str, revision: str | None, files: Sequence[str] | None = None) -> Path:
    """Return the snapshot folder of a hub repository, downloaded if it is not complete in the cache.

    `files`: patterns of what is taken, if not what a model of its kind needs. Raises ModelError.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = list(files or patterns(repo))
    repository = hub.Repository(repo, revision=revision)
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=wanted))
        if any(folder.rglob("*.safetensors")):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    cache = f"looked in {constants.HF_HUB_CACHE}"
    if hub.is_offline():
        raise ModelError(f"{repo}: not in the cache, and HF_HUB_OFFLINE is set", f"{cache}; unset it to download")
    try:
        return hub.snapshot(repository, patterns=wanted)
    except UserError:  # of a proxy
        raise
    except Exception as error:  # the errors of the transport below differ between releases of the hub client
        found = hub.trouble(error, repository)
        raise ModelError(f"{repo}: cannot be fetched from the hub: {found.problem}", found.hint) from error


def in_cache(repo: str) -> bool:
    """Whether a model of the hub lies in its cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, "config.json"), str)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder, or the model_index.json of a pipeline; raise ModelError without."""
    hint = "give a folder as save_pretrained writes it"
    if not folder.is_dir():
        raise ModelError(f"{folder}: not a folder", hint)
    path = _config_file(folder)
    if path is None:
        raise ModelError(f"{folder}: no config.json, so not a model folder", hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


def read_settings(folder: Path) -> dict[str, Any]:
    """Return how a model is best used, as the `settings.json` of its folder says; raise ModelError if it is none."""
    path = folder / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})", "copy it again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: not a JSON object", "copy it again")
    return settings


def _config_file(folder: Path) -> Path | None:
    return next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)


def _kind(folder: Path) -> str:
    """Return what a model calls itself, empty where there is no config."""
    if _config_file(folder) is None:
        return ""
    config = read_config(folder)
    return str(config.get("model_type", config.get("_class_name")))


def family_of(folder: Path) -> str:
    """Return the family of a model folder by its config; raise ModelError for one that is not supported."""
    read_config(folder)
    kind = _kind(folder)
    if kind not in FAMILIES:
        problem = f"{folder}: a model of type {kind!r} is not supported{near_miss(kind, FAMILIES)}"
        raise ModelError(problem, f"supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


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


def pipeline_parts(folder: Path) -> list[str]:
    """Return the parts of a pipeline folder that have weights: `unet`, `vae`, `text_encoder`, and its second one."""
    parts = {key: value for key, value in read_config(folder).items() if not key.startswith("_")}
    trained = ("unet", "vae", "text_encoder", "text_encoder_2")
    return [part for part in trained if isinstance(parts.get(part), list) and parts[part][1] is not None]


def fingerprint(folder: Path) -> str:
    """Return a digest that stands for the content of a model folder, or of a part of a pipeline."""
    config = _config_file(folder)
    pipeline = config is not None and config.name == INDEX
    parts = [folder / part for part in pipeline_parts(folder)] if pipeline else [folder]
    digest = hashlib.sha256(config.read_bytes() if config is not None else b"")
    for part in parts:
        if part != folder:
            digest.update((part / "config.json").read_bytes() if (part / "config.json").is_file() else b"")
        _digest_weights(digest, part)
    return digest.hexdigest()[:16]


def _digest_weights(digest: Any, folder: Path) -> None:
    """Add, of each weight file, the size, the header and a 64 KiB sample of every 16 MiB."""
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


def _samples(size: int, start: int) -> Iterator[int]:
    yield from range(start, size, _STRIDE)
    yield max(start, size - _CHUNK)
