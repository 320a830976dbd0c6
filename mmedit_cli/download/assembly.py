"""Models that are put together of two others and of parts that come along: a folder in the cache, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

from mmedit_cli import assembled
from mmedit_cli.catalog import (
    PARTS,
    Assembly,
    Entry,
    assembled_folder,
    find_model,
    parts_folder,
)
from mmedit_cli.download import receipt
from mmedit_cli.download.install import DownloadError
from mmedit_cli.download.sources import SourceError, check_room
from mmedit_cli.errors import ModelError
from mmedit_cli.runtime import quiet_libraries
from mmedit_cli.storage import read_tensors, sha256_of, staged_folder

_ROOM = 400_000_000  # bytes of a folder with 140 million parameters in float16, and some air


def plan(name: str, entry: Entry) -> dict[str, Any]:
    """Return what `get` would make, and whether it is in the cache already, of the parts that come along."""
    folder = assembled_folder(name)
    here = folder.is_dir()
    return {
        "model": name,
        "source": f"{_recipe(entry).language}, {_recipe(entry).tower} and {name}/{PARTS}",
        "licence": _recipe(entry).licence,
        "files": receipt.listed(folder) if here else (),
        "folder": folder if here else None,
        "bytes": (parts_folder(name) / PARTS).stat().st_size,
        "state": "present" if here else "missing",
    }


def get(name: str, entry: Entry) -> dict[str, Any]:
    """Put the model together in the cache, in float16; its language model has to be there.

    What is on its way is never seen under its final name. Raises DownloadError, or ModelError for parts that do not
    fit.
    """
    folder = assembled_folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return plan(name, entry)
        try:
            check_room(folder.parent, _ROOM)
        except SourceError as error:
            raise DownloadError(f"{name}: {error}", "make room") from error
        with staged_folder(folder) as fresh:
            _make(name, _recipe(entry), fresh)
    return {**plan(name, entry), "state": "downloaded"}


def _recipe(entry: Entry) -> Assembly:
    assert entry.assembly is not None, "asked for a model that is one already"
    return entry.assembly


def _make(name: str, recipe: Assembly, folder: Path) -> None:
    """Write model, tokenizer, processors and parts into a new folder, and the receipt last."""
    quiet_libraries()
    language, tower = find_model(recipe.language), find_model(recipe.tower)
    if language.folder is None or tower.folder is None:
        raise ModelError(f"{name}: cannot be made of a model of random weights")
    parts = parts_folder(name) / PARTS
    model, tokenizer, processor = assembled.build(language.folder, tower.folder)
    tensors, _ = read_tensors(parts)
    assembled.put_in(model, tensors, parts)
    assembled.write(model, tokenizer, processor, folder)
    source = (
        f"{language.name} ({language.fingerprint}), {tower.name} ({tower.fingerprint})"
    )
    receipt.note_model(folder, name, source, sha256_of(parts))
