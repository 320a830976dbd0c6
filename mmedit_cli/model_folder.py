"""What lies in the folder of a model: its config, its settings, its weight files. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedit_cli.errors import MmeditError, ModelError
from mmedit_cli.reading import read_json_object, require_regular

INDEX = "model_index.json"  # of a pipeline
# the parameters that a training has changed, without the frozen ones
CHECKPOINT = "editor.safetensors"
_CONFIGS = ("config.json", INDEX)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# of a text-to-image pipeline
_TRAINED_PARTS = (
    "unet",
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)


def config_file(folder: Path) -> Path | None:
    """Return the config of a model folder or pipeline; None if there is none."""
    for name in _CONFIGS:
        path = folder / name
        if path.is_file():
            return path
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder, or the model_index.json of a pipeline.

    Raises ModelError if there is none.
    """
    hint = "give a folder as save_pretrained writes it"
    if not folder.is_dir():
        raise ModelError(f"{folder}: not a folder", hint)
    path = config_file(folder)
    if path is None:
        raise ModelError(f"{folder}: no config.json, so not a model folder", hint)
    return read_object(path)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the recommended settings in `settings.json` of a model folder; raise ModelError if they are damaged."""
    path = folder / "settings.json"
    if not path.is_file():
        return {}
    settings = read_json_object(path, error=ModelError, hint="copy it again")
    for name in ("guidance", "steps", "text_guidance", "image_guidance"):
        settings.number(name, 0)  # raises for anything else
    return settings.values


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file in a model folder; raise ModelError if it is none."""
    return read_json_object(path, error=ModelError, hint="copy it again").values


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder; raise ModelError if there are none, or if one is missing."""
    check_files(folder)
    files = sorted(folder.glob("*.safetensors"))
    named: set[str] = set()
    for index in sorted(folder.glob("*.safetensors.index.json")):
        named |= _files_of_index(index)
    missing = sorted(named - {file.name for file in files})
    if missing:
        raise ModelError(
            [f"{folder}: {name} is named in the index but missing" for name in missing],
            "copy it there",
        )
    if not files:
        if any(any(folder.glob(pattern)) for pattern in _PICKLED):
            # it may be a part of a pipeline
            is_part = (folder.parent / INDEX).is_file()
            whole = folder.parent if is_part else folder
            problem = f"{folder}: its weights are pickled, and pickles may run code"
            raise ModelError(
                problem,
                f"convert them: mmedit convert safetensors {whole} {whole}-safetensors",
            )
        raise ModelError(
            f"{folder}: no weights (*.safetensors)", "copy model.safetensors there"
        )
    return files


def check_files(folder: Path) -> None:
    """Raise ModelError if a folder holds a FIFO or a device: a library that opens it would wait for ever."""
    for path in folder.iterdir():
        if path.exists() and not path.is_dir():
            require_regular(path, error=ModelError)


def _files_of_index(index: Path) -> set[str]:
    """Return the names of the weight files that an index lists; raise ModelError if it lists none."""
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(
            f"{index}: no weight_map, so it names no weight files", "copy it again"
        )
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(
                f"{index}: {name!r} is not the name of a file beside it",
                "copy it again",
            )
    return set(files.values())


def pipeline_parts(folder: Path) -> list[str]:
    """Return the parts of a pipeline folder that have weights: denoiser, autoencoder and text encoders."""
    index = read_config(folder)
    parts = []
    for name in _TRAINED_PARTS:
        entry = index.get(name)
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            parts.append(name)
    return parts


@contextmanager
def loading(
    place: Path | str,
    *,
    problem: str = "cannot be loaded",
    hint: str = "is the folder complete?",
) -> Iterator[None]:
    """Inside the block a library opens files of a model: whatever it raises becomes a ModelError of one line.

    Libraries raise errors of any kind over a damaged config (KeyError, TypeError, AttributeError), so all are taken.
    """
    try:
        yield
    except (MmeditError, MemoryError, Warning):
        raise
    except ImportError as error:  # a scheduler, a quantized model or a tokenizer needs a package that is absent
        advice = re.search(r"pip install [^`\n]+", str(error))
        way_out = advice[0] if advice else "install the package it needs"
        raise ModelError(f"{place}: {problem}: {reason(error)}", way_out) from error
    except Exception as error:
        raise ModelError(f"{place}: {problem}: {reason(error)}", hint) from error


def reason(error: Exception) -> str:
    """Return what an error of a library says, in one line of at most 200 characters."""
    first = str(error).strip().partition("\n")[0][:200]
    kind = type(error).__name__
    if not first:
        return kind
    return (
        f"{kind} {first}"
        if isinstance(error, KeyError | TypeError | AttributeError | IndexError)
        else first
    )


def check_parts(folder: Path) -> dict[str, Any]:
    """Return the index of a pipeline; raise ModelError if a part leaves it to its own files what class it is.

    diffusers opens such a part without saying that no code of others is run, and transformers then asks on stdout.
    """
    index = read_config(folder)
    for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        check_files(part)
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2:
            continue
        library, kind = entry
        if library == "transformers" and str(kind).startswith("Auto"):
            raise ModelError(
                f"{folder / INDEX}: {name} is a {kind}, which may run code of its own",
                "name its class there",
            )
    return index
