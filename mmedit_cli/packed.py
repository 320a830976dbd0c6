"""Folders of many small files. The repository keeps a zip of each; it is unpacked beside it when first needed."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mmedit_cli.errors import MmeditError
from mmedit_cli.storage import remove_temporaries, temporary_folder, write_atomic

T = TypeVar("T")
MARK = ".unpacked"  # in the folder: the zip it was unpacked from, by size and time


def unpack_beside(home: Path) -> None:
    """Unpack every `NAME.zip` of a folder into the folder NAME beside it, unless that is up to date. Other files stay.

    Several processes may do so at once: a file is there as a whole or not at all, and the mark comes last. Where a zip
    is damaged or nothing can be written, nothing happens; `way_out` explains it where a file is missing later.
    """
    remove_temporaries(home)
    for archive in sorted(home.glob("*.zip")):
        folder = archive.with_suffix("")
        state = archive.stat()
        mark = f"{state.st_size} {state.st_mtime_ns}\n"
        with suppress(OSError):
            if (folder / MARK).read_text(encoding="utf-8") == mark:
                continue
        with suppress(OSError, MmeditError):
            _unpack(archive, folder, mark)


def mirror(home: Path, copy: Path) -> None:
    """Copy a folder with its zips to a place where they can be unpacked. Files that exist there are kept.

    Several processes may do so at once. Raises OSError or RunError where nothing can be written.
    """
    for source in loose(home):
        goal = copy / source.relative_to(home)
        size = source.stat().st_size
        if not goal.is_file() or goal.stat().st_size != size:
            goal.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(goal, source.read_bytes())


def way_out(missing: Path) -> str:
    """Return how a missing file can be restored from the zip beside its folder; empty if the zip does not have it."""
    folder = missing.absolute().parent
    archive = folder.parent / f"{folder.name}.zip"
    # never ask anyone to delete a folder of their own
    theirs = folder.is_dir() and not (folder / MARK).is_file()
    if theirs or not archive.is_file():
        return ""
    if not zipfile.is_zipfile(archive):
        return f"{archive} is damaged: git checkout {archive}"
    with zipfile.ZipFile(archive) as file:
        if missing.name not in file.namelist():
            return ""
    if folder.is_dir():
        return f"delete {folder}, which is unpacked anew"
    return f"unpack {archive} as {folder}"


def loose(home: Path) -> list[Path]:
    """Return all files below a folder, sorted, without hidden files and without those that are in one of its zips."""
    packed = {archive.with_suffix("") for archive in home.glob("*.zip")}
    found = [
        path
        for path in home.rglob("*")
        if path.is_file() and not packed & {*path.parents}
    ]
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(home).parts)
    )


def differences(archive: Path) -> list[str]:
    """Return a line for each missing, changed or unexpected file beside a zip; one line if the zip is damaged."""
    folder = archive.with_suffix("")
    if not zipfile.is_zipfile(archive):
        return [f"{archive.name} is damaged: git checkout {archive}"]
    with zipfile.ZipFile(archive) as file:
        wanted = {
            f"{folder.name}/{info.filename}": info.CRC for info in file.infolist()
        }
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != MARK]
    return compare(
        folder.parent,
        found,
        wanted,
        lambda path: zlib.crc32(path.read_bytes()),
        archive.name,
    )


def compare(
    home: Path,
    found: Iterable[Path],
    wanted: Mapping[str, T],
    digest: Callable[[Path], T],
    origin: str,
) -> list[str]:
    """Return a line for each file below `home` that is missing, not in `origin`, or has another digest than wanted."""
    files = {path.relative_to(home).as_posix(): path for path in found}
    missing = sorted(wanted.keys() - files.keys())
    unexpected = sorted(files.keys() - wanted.keys())
    both = sorted(files.keys() & wanted.keys())
    changed = [name for name in both if digest(files[name]) != wanted[name]]
    return [
        *(f"{name} is missing" for name in missing),
        *(f"{name} is not in {origin}" for name in unexpected),
        *(f"{name} has changed" for name in changed),
    ]


def pack(folder: Path) -> Path:
    """Pack a folder into the zip beside it. The same files give the same bytes; PNGs are not compressed again."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix())  # of 1980
            is_png = path.suffix == ".png"
            info.compress_type = zipfile.ZIP_STORED if is_png else zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            file.writestr(info, path.read_bytes())
    return archive


def _unpack(archive: Path, folder: Path, mark: str) -> None:
    from mmedit_cli.download.unpack import unpack

    with temporary_folder(folder.with_name(f".{folder.name}")) as temporary:
        fresh = temporary / folder.name
        unpack(archive, fresh)
        (fresh / MARK).write_text(mark, encoding="utf-8")
        if not folder.is_dir():
            with suppress(OSError):  # another process may come first
                fresh.rename(folder)
                return
        for path in sorted(fresh.rglob("*"), key=lambda path: path.name == MARK):
            if path.is_file():
                goal = folder / path.relative_to(fresh)
                goal.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, goal)
