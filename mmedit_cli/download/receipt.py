"""What was fetched, from where and with which digests: `download.json` in the folder of a group, written last."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmedit_cli import reading
from mmedit_cli.download.catalogue import File, Item, Tree
from mmedit_cli.reading import Record
from mmedit_cli.storage import sha256_of, write_json

NAME = "download.json"
MODEL = "model"  # the item of a folder that is a model
_CHUNK = 1 << 20


def difference(path: Path, known: File) -> str:
    """Return how a file differs from what is known of it, an empty string if it does not (or nothing is known)."""
    size = path.stat().st_size
    if known.bytes is not None and size != known.bytes:
        return f"{size:,} bytes, expected {known.bytes:,}"
    if known.sha256 is not None:
        found = sha256_of(path)
        return (
            ""
            if found == known.sha256
            else f"wrong checksum: sha256 {found}, expected {known.sha256}"
        )
    if known.git_blob is not None:
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                blob.update(chunk)
        return (
            ""
            if blob.hexdigest() == known.git_blob
            else f"wrong checksum: git {blob.hexdigest()}, not {known.git_blob}"
        )
    return ""


def tree_difference(digests: Mapping[str, str], tree: Tree) -> str:
    """Return how the files below a folder differ from the known tree; `digests` maps path -> SHA-256."""
    paths = sorted(
        (path for path in digests if path.startswith(f"{tree.folder}/")),
        key=lambda path: path.encode(),
    )
    lines = "".join(f"{digests[path]}  {path}\n" for path in paths)
    same = hashlib.sha256(lines.encode()).hexdigest() == tree.sha256
    return (
        ""
        if same
        else f"{tree.folder}: its {len(paths):,} files are not the published ones"
    )


def layout_problems(folder: Path, item: Item) -> list[str]:
    """Return what the layout of an item asks for and the folder lacks."""
    problems = []
    for pattern, least in (item.layout or {}).items():
        found = sum(
            1
            for part in pattern.split("|")
            for path in folder.glob(part.strip())
            if path.is_file()
        )
        if found < least:
            problems.append(
                f"{pattern}: {found:,} files, expected {least:,}"
                + (" or more" if least == 1 else "")
            )
    return problems


def read(folder: Path) -> dict[str, Any]:
    """Return the receipt of a folder: item -> source, revision, checked, files; empty where nothing was fetched.

    Raises DataError if it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    hint = "remove it; the next download checks the files anew"
    items = reading.read_json_object(path, halves=True, hint=hint).record("items")
    return {name: _entry(items.record(name)) for name in items.values}


def _entry(found: Record) -> dict[str, Any]:
    files = found.record("files")
    for path in files.values:
        known = files.array(path)
        if (
            len(known) != 2
            or not isinstance(known[0], int)
            or not isinstance(known[1], str)
        ):
            files.fail(
                path, f"expected a size and a digest, got {reading.shown(known)}"
            )
    return {
        "source": found.text("source"),
        "revision": found.text("revision")
        if found.values.get("revision") is not None
        else None,
        "checked": found.text("checked"),
        "files": dict(files.values),
    }


def write(folder: Path, group: str, items: Mapping[str, Any]) -> None:
    """Write the receipt of a folder, all or nothing."""
    write_json(folder / NAME, {"group": group, "items": dict(items)}, indent=1)


def below(folder: Path) -> Iterable[tuple[str, Path]]:
    """Yield the files of a folder with their paths written with slashes, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def listed(folder: Path) -> tuple[File, ...]:
    """Return the files of a model's folder with what was noted of each when it was made."""
    noted = read(folder).get(MODEL, {"files": {}})["files"]
    return tuple(File(path, size, digest) for path, (size, digest) in noted.items())


def note_model(folder: Path, group: str, source: str, revision: str) -> None:
    """Write the receipt of a new model's folder: where it is from, and the digest of each of its files."""
    files = {
        path: [place.stat().st_size, sha256_of(place)] for path, place in below(folder)
    }
    entry = {
        "source": source,
        "revision": revision,
        "checked": "catalogue",
        "files": files,
    }
    write(folder, group, {MODEL: entry})


def damage(folder: Path | None, files: Iterable[File]) -> list[str]:
    """Return how the files of a model's folder differ from what is known of them."""
    if folder is None:
        return ["not in the cache"]
    problems = []
    for file in files:
        path = folder / file.path
        wrong = "missing"
        if path.is_file():
            wrong = difference(path, file)
        if wrong:
            problems.append(f"{file.path}: {wrong}")
    return problems
