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
from mmedit_cli.picture_editing.methods.base import Settings
from mmedit_cli.picture_editing.methods.shared import tiny
from mmedit_cli.reading import read_json_object
from mmedit_cli.vocabulary import cap_length, check_text_encoders, check_vocabulary

REPOS = {  # short names of published pipelines
    "instruct-pix2pix": "timbrooks/instruct-pix2pix",
    "magicbrush": "vinesmsuic/magicbrush-jul7",
    "flux-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
}
# not the same weights a second time, in one file or in half precision, and nothing that is pickled
_WANTED = (INDEX, "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")
_UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


@dataclass(frozen=True)
class LoadOptions:
    """Where and how a model is loaded; the values mean what they mean in transformers."""

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None


@dataclass(frozen=True)
class Found:
    """A pipeline that was loaded, its name, a digest of its content, and how it is best used."""

    pipeline: Any
    name: str
    fingerprint: str
    settings: Settings


def find_pipeline(name: str, *, revision: str | None = None) -> tuple[str, Path]:
    """Return (name, folder) of a pipeline: one that comes along, a folder, a short name or a hub id.

    Raises ModelError if it is none.
    """
    own = {**bundled(), **own_image_editors()}
    check_folder_is_meant(name, [*own, *tiny.NAMES, *REPOS], own.get(name))
    folder = own.get(name, Path(name))
    if folder.exists():
        check_is_model(folder)
        return folder.resolve().name, folder
    if name not in REPOS and name.count("/") != 1:
        known = [*own_image_editors(), *tiny.NAMES, *REPOS]
        problem = f"--model {name}: neither a known name, nor a folder, nor a hub id{near_miss(name, known)}"
        raise ModelError(problem, f"known names: {', '.join(known)}")
    if name not in REPOS and not in_cache(name):
        check_not_a_path(name)
    return name, hub_folder(REPOS.get(name, name), revision, _WANTED)


def load_pipeline(
    name: str, wanted: str | Sequence[str], options: LoadOptions
) -> Found:
    """Load a pipeline of one of the classes `wanted`, without its safety checker and with no bars.

    Raises ModelError if it is of another class, or if its files cannot be used.
    """
    import diffusers

    classes = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    runtime.quiet_libraries()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    device = runtime.resolve_device(options.device)
    number = runtime.resolve_dtype(options.dtype, device)
    if name in tiny.NAMES:
        pipeline, fingerprint, settings = (
            tiny.build(name),
            f"{name}/{tiny.VERSION}",
            Settings(),
        )
        kind = type(pipeline).__name__
        if kind in classes and not isinstance(number, str):
            pipeline.to(number)
    else:
        name, folder = find_pipeline(name, revision=options.revision)
        kind, fingerprint, settings = (
            pipeline_class(folder),
            digest(folder),
            usual_settings(folder),
        )
    if kind not in classes:
        raise ModelError(
            f"--model {name}: a {kind}, where {' or '.join(classes)} is needed",
            "name another editor",
        )
    if name not in tiny.NAMES:
        pipeline = _from_folder(folder, kind, number)
        check_text_encoders(pipeline, folder)
    return Found(pipeline.to(device), name, fingerprint, settings)


def pipeline_class(folder: Path) -> str:
    """Return the class that a pipeline's folder names; raise ModelError if it is no pipeline."""
    path = folder / INDEX
    if not path.exists():
        raise ModelError(
            f"{folder}: no {INDEX}, so not a diffusion pipeline",
            "give a folder of diffusers",
        )
    return read_json_object(path, error=ModelError, hint="copy it again").text(
        "_class_name", empty=False
    )


def usual_settings(folder: Path) -> Settings:
    """Return how the model of a folder is best used, as far as its `settings.json` says; raise ModelError."""
    found = read_settings(folder)
    return Settings(
        **{
            name: found[name]
            for name in ("steps", "text_guidance", "image_guidance")
            if name in found
        }
    )


def digest(folder: Path, *, former: bool = False) -> str:
    """Return a digest of a pipeline's index and of the weights and configs of its parts.

    `former`: the one that version 0.1.0 gave to them.
    """
    of_part, digits = (former_fingerprint, 16) if former else (fingerprint, 32)
    found = hashlib.sha256((folder / INDEX).read_bytes())
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (part / "config.json").is_file() and any(part.glob("*.safetensors")):
            found.update(f"{part.name}:{of_part(part)};".encode())
    return found.hexdigest()[:digits]


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
            folder / "tokenizer", local_files_only=True, trust_remote_code=False
        )
        encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype="float32",
        )
    rows = encoder.get_input_embeddings().weight.shape[0]
    check_vocabulary(tokenizer, rows, folder / "tokenizer")
    cap_length(tokenizer, encoder)
    return tokenizer, encoder.eval()


def content_of(name: str, *, former: bool = False) -> str:
    """Return the digest of a pipeline by name, without loading it; raise ModelError if there is none."""
    if name in tiny.NAMES:
        return f"{name}/{tiny.VERSION}"
    return digest(find_pipeline(name)[1], former=former)


def _from_folder(folder: Path, kind: str, number: Any) -> Any:
    import diffusers

    index = check_parts(folder)
    without = {name: None for name in _UNUSED if name in index}
    more = {"requires_safety_checker": False} if "safety_checker" in index else {}
    more |= {} if isinstance(number, str) else {"dtype": number}
    with loading(folder):
        return getattr(diffusers, kind).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **without,
            **more,
        )
