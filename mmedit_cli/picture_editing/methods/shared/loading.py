"""From the name of a diffusion pipeline to its parts on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli import runtime
from mmedit_cli.catalog import bundled, hub_folder, in_cache, own_image_editors
from mmedit_cli.errors import ModelError, near_miss
from mmedit_cli.identity import fingerprint, former_fingerprint
from mmedit_cli.model_folder import INDEX, check_parts, loading, read_settings
from mmedit_cli.not_a_model import (
    check_folder_is_meant,
    check_is_model,
    check_not_a_path,
)
from mmedit_cli.picture_editing.methods.base import EditSettings
from mmedit_cli.picture_editing.methods.shared import tiny
from mmedit_cli.reading import read_json_object
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.vocabulary import cap_length, check_text_encoders, check_vocabulary

REPOS = {  # short names of published pipelines
    "instruct-pix2pix": "timbrooks/instruct-pix2pix",
    "magicbrush": "vinesmsuic/magicbrush-jul7",
    "flux-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
}
# Neither the same weights again, in one file or in half precision, nor pickled files.
_WANTED = (INDEX, "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline, its name, a digest of its content, and the settings that suit it best."""

    pipeline: Any
    name: str
    fingerprint: str
    settings: EditSettings


def find_pipeline(name: str, *, revision: str | None = None) -> tuple[str, Path]:
    """Return (name, folder) of a pipeline: part of this package, a folder, a short name or a hub id.

    Raises ModelError if it is none of these.
    """
    own = {**bundled(), **own_image_editors()}
    check_folder_is_meant(name, [*own, *tiny.NAMES, *REPOS], own.get(name))
    folder = own.get(name, Path(name))
    if folder.exists():
        check_is_model(folder)
        return folder.resolve().name, folder
    if name in REPOS:
        return name, hub_folder(REPOS[name], revision, _WANTED)
    if name.count("/") != 1:
        known = [*own_image_editors(), *tiny.NAMES, *REPOS]
        problem = f"--model {name}: neither a known name, nor a folder, nor a hub id{near_miss(name, known)}"
        raise ModelError(problem, f"known names: {', '.join(known)}")
    if not in_cache(name):
        check_not_a_path(name)
    return name, hub_folder(name, revision, _WANTED)


def load_pipeline(
    name: str, wanted: str | Sequence[str], options: LoadOptions
) -> LoadedPipeline:
    """Load a pipeline of one of the classes `wanted`, without its safety checker and without progress bars.

    Raises ModelError if it is of another class, or if its files cannot be used.
    """
    from diffusers.utils import logging

    classes = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    runtime.quiet_libraries()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = runtime.resolve_device(options.device)
    dtype = runtime.resolve_dtype(options.dtype, device)
    if name in tiny.NAMES:
        pipeline = tiny.build(name)
        _check_class(name, type(pipeline).__name__, classes)
        if not isinstance(dtype, str):
            pipeline.to(dtype)
        version = f"{name}/{tiny.VERSION}"
        return LoadedPipeline(
            pipeline.to(device),
            name,
            version,
            EditSettings(),
        )
    name, folder = find_pipeline(name, revision=options.revision)
    kind = pipeline_class(folder)
    content = digest(folder)
    settings = usual_settings(folder)
    _check_class(name, kind, classes)
    pipeline = _from_folder(folder, kind, dtype)
    check_text_encoders(pipeline, folder)
    return LoadedPipeline(pipeline.to(device), name, content, settings)


def _check_class(name: str, kind: str, wanted: Sequence[str]) -> None:
    if kind not in wanted:
        raise ModelError(
            f"--model {name}: a {kind}, where {' or '.join(wanted)} is needed",
            "name another editor",
        )


def pipeline_class(folder: Path) -> str:
    """Return the class that a pipeline's folder names; raise ModelError if it is no pipeline."""
    path = folder / INDEX
    if not path.exists():
        raise ModelError(
            f"{folder}: no {INDEX}, so not a diffusion pipeline",
            "give a folder of diffusers",
        )
    index = read_json_object(path, error=ModelError, hint="copy it again")
    return index.text("_class_name", empty=False)


def usual_settings(folder: Path) -> EditSettings:
    """Return the settings of a folder's `settings.json`; raise ModelError if the file is invalid."""
    found = read_settings(folder)
    return EditSettings(
        steps=found.get("steps"),
        text_guidance=found.get("text_guidance"),
        image_guidance=found.get("image_guidance"),
    )


def digest(folder: Path, *, former: bool = False) -> str:
    """Return a digest of a pipeline's index and of the weights and configs of its parts.

    With `former`, it is the digest that version 0.1.0 gave to them.
    """
    fingerprint_of = former_fingerprint if former else fingerprint
    index = (folder / INDEX).read_bytes()
    total = hashlib.sha256(index)
    for part in sorted(folder.iterdir()):
        has_config = (part / "config.json").is_file()
        if has_config and any(part.glob("*.safetensors")):
            line = f"{part.name}:{fingerprint_of(part)};"
            total.update(line.encode())
    digits = 16 if former else 32
    return total.hexdigest()[:digits]


def load_text_encoder(name: str) -> tuple[Any, Any]:
    """Return (tokenizer, text encoder in float32) of a Stable Diffusion pipeline, without its other parts.

    Raises ModelError if it cannot be used.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    if name in tiny.NAMES:
        pipeline = tiny.build(name)
        return pipeline.tokenizer, pipeline.text_encoder
    _, folder = find_pipeline(name)
    with loading(folder, problem="the text encoder cannot be loaded"):
        tokenizer = CLIPTokenizer.from_pretrained(
            folder / "tokenizer",
            local_files_only=True,
            trust_remote_code=False,
        )
        encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype="float32",
        )
    embedding: Any = encoder.get_input_embeddings()
    rows = len(embedding.weight)
    check_vocabulary(tokenizer, rows, folder / "tokenizer")
    cap_length(tokenizer, encoder)
    return tokenizer, encoder.eval()


def content_of(name: str, *, former: bool = False) -> str:
    """Return the digest of a pipeline by name, without loading it; raise ModelError if there is none."""
    if name in tiny.NAMES:
        return f"{name}/{tiny.VERSION}"
    _, folder = find_pipeline(name)
    return digest(folder, former=former)


def _from_folder(folder: Path, kind: str, dtype: Any) -> Any:
    import diffusers

    index = check_parts(folder)
    options: dict[str, Any] = {part: None for part in _UNUSED if part in index}
    if "safety_checker" in index:
        options["requires_safety_checker"] = False
    if not isinstance(dtype, str):
        options["dtype"] = dtype
    pipeline = getattr(diffusers, kind)
    with loading(folder):
        return pipeline.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
