"""Files on disk: digests, writes that are whole or not there, and removal of nothing but what this program wrote.

Whatever is written to stay goes through this module. Two rules hold everywhere:

- A file or folder under its final name is complete. It is written under a temporary name first.
- Nothing is removed that does not have the shape of a name that this program writes, and nothing through a link.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mmedit_cli.errors import RunError, StateError
from mmedit_cli.reading import open_tensors

_CHUNK = 1 << 20
_DAY = 86_400.0
# tells this process from an earlier one that had the same number
_PROCESS = secrets.token_hex(4)
_TEMPORARY = re.compile(
    r".+\.(?P<host>[0-9a-f]{6})-(?P<pid>\d{1,10})-(?P<process>[0-9a-f]{8})-[0-9a-f]{6}\.tmp",
    re.S,
)
_EARLIER = re.compile(r".+\.[0-9a-f]{8}\.tmp", re.S)  # temporary files of mmedit 0.1


# -- digests ----------------------------------------------------------------------------------------------------


def sha256_of(path: Path, tick: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file; `tick(n)` is called after n more bytes. Raises OSError."""
    digest = hashlib.sha256()
    # a FIFO would wait, a device would never end
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if tick is not None:
                tick(len(chunk))
    return digest.hexdigest()


def sha256_json(obj: Any) -> str:
    """Return the SHA-256 of the canonical JSON (sorted keys, no blanks, no NaN): equal content, equal digest."""
    return hashlib.sha256(dump_json(obj, sort=True)).hexdigest()


# -- reading and writing ----------------------------------------------------------------------------------------


def dump_json(obj: Any, *, indent: int | None = None, sort: bool = False) -> bytes:
    """Return an object as JSON in UTF-8; raise ValueError or TypeError for what JSON does not have."""
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(
        obj,
        ensure_ascii=False,
        allow_nan=False,
        sort_keys=sort,
        indent=indent,
        separators=separators,
    )
    # a lone surrogate (an odd path) becomes its own JSON escape
    return text.encode("utf-8", "backslashreplace")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that at any moment, even after a crash, it is either the old or the new one.

    Raises RunError.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, obj: Any, *, indent: int | None = None) -> None:
    """Write an object as JSON with a newline behind it, atomically; raise RunError if that fails."""
    try:
        data = dump_json(obj, indent=indent)
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: cannot be written as JSON: {error}") from error
    write_atomic(path, data + b"\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write tensors and text to one safetensors file, atomically: equal content makes equal bytes.

    Raises RunError if that fails.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {}
    for name, tensor in tensors.items():
        on_cpu[name] = tensor.detach().cpu().contiguous()
    try:
        with replacing(path) as temporary:
            save_file(on_cpu, temporary, dict(metadata) or None)
            _sort_metadata(temporary)
    except SafetensorError as error:  # this is also how a full disk arrives
        raise RunError(f"{path}: cannot write: {error}") from error


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file: the library writes it in another order each time."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            metadata = header["__metadata__"]
            header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
        ordered = text.encode().ljust(size)
        if len(ordered) == size:  # the same characters in another order
            file.seek(8)
            file.write(ordered)


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (tensors on the CPU, metadata) of a safetensors file; raise StateError if it cannot be read."""
    with open_tensors(path, error=StateError) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that takes its place at the end of the block, or vanishes.

    The first time that a process writes into a folder, what killed runs left there is removed. Raises RunError for
    failures of the file system.
    """
    temporary = temporary_beside(path)
    with file_errors(path, "write"):
        _remove_temporaries_once(path.parent.absolute(), os.getpid())
        try:
            temporary.touch(exist_ok=False)
            # what the user's umask gives; safetensors would make it private
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that gets its name at the end of the block, or vanishes.

    `target` must not be there yet, or be an empty folder. Leftovers of killed runs beside it are removed first.
    Raises RunError for failures of the file system.
    """
    with file_errors(target, "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target) as temporary:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    sync_file(path)
                else:
                    sync_folder(path)
            if target.is_dir() and not is_link(target):
                target.rmdir()  # fails where it is not empty
            temporary.rename(target)
            sync_folder(target.parent)


@contextmanager
def temporary_folder(beside: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that vanishes at the end of the block: beside a path, or in the system's place for them.

    Leftovers of killed runs there are removed first. Raises OSError.
    """
    temporary = new_temporary_folder(beside)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def new_temporary_folder(beside: Path | None = None) -> Path:
    """Do as `temporary_folder`, for a caller that removes the folder itself."""
    place = beside or Path(tempfile.gettempdir()) / "mmedit"
    remove_temporaries(place.parent)
    temporary = temporary_beside(place)
    temporary.mkdir(mode=0o777 if beside else 0o700)
    return temporary


def temporary_beside(path: Path) -> Path:
    """Return a new temporary name in the folder of `path`; `remove_temporaries` knows it and whose it is."""
    start = os.fsencode(path.name)[:120].decode("utf-8", "ignore") or "file"
    owner = f"{_host()}-{os.getpid()}-{_PROCESS}"
    return path.with_name(f"{start}.{owner}-{secrets.token_hex(3)}.tmp")


@contextmanager
def file_errors(path: Path, action: str) -> Iterator[None]:
    """Turn the failures of the file system inside the block into a RunError that names the path."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot {action}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine, where the system can do that."""
    with suppress(OSError):  # Windows and some network file systems cannot do this
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- removing ---------------------------------------------------------------------------------------------------


def is_link(path: Path) -> bool:
    """Tell whether a path is a symbolic link, or a junction of Windows."""
    is_junction = getattr(os.path, "isjunction", lambda path: False)  # Python 3.12
    return path.is_symlink() or is_junction(path)


def refuse_link(path: Path) -> None:
    """Raise RunError for a link in the place of a file that is written: what it points to is somebody else's."""
    if is_link(path):
        raise RunError(
            f"{path}: a link, where this program writes a file",
            "replace it by the file itself",
        )


def remove_file(path: Path) -> bool:
    """Remove a regular file and tell whether one was there; a link, a folder or a device stays.

    Raises OSError if it cannot be removed. The caller knows that the name is one of this program.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode) or is_link(path.parent):
        return False
    path.unlink(missing_ok=True)
    return True


def sweep(
    folder: Path, shape: re.Pattern[str], *, keep: Collection[str] = ()
) -> list[Path]:
    """Remove the files of a folder whose whole name has a shape, but those in `keep`; return what was removed.

    Links stay, and in a folder that is a link itself everything does. What cannot be removed stays too.
    """
    removed = []
    for path in unnamed(folder, shape, keep):
        with suppress(OSError):
            if remove_file(path):
                removed.append(path)
    return removed


def unnamed(folder: Path, shape: re.Pattern[str], names: Collection[str]) -> list[Path]:
    """Return the regular files of a folder that have a shape and are not among `names`; none where it is a link."""
    if is_link(folder) or not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if path.name in names or not shape.fullmatch(path.name):
            continue
        if path.is_file() and not is_link(path):
            found.append(path)
    return sorted(found)


def sweep_tree(folder: Path, shape: re.Pattern[str]) -> None:
    """Do `sweep` in a folder and all below it, then remove the folders that are empty; follows no link."""
    if is_link(folder) or not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if path.is_dir() and not is_link(path):
            sweep_tree(path, shape)
    sweep(folder, shape)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def sole_writer(folder: Path, index: str) -> Iterator[None]:
    """Hold the lock of a folder inside the block, made where it is missing, without what killed runs left there.

    `index` is the file that is written last. Raises StateError while another process holds the lock.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    refuse_link(lock)
    refuse_link(folder / index)
    try:
        with FileLock(lock, timeout=0):
            remove_temporaries(folder)
            yield
    except Timeout as error:
        raise StateError(
            f"another process is writing {folder}", "wait for it to end"
        ) from error


def remove_temporaries(folder: Path, *, earlier: bool = False) -> list[Path]:
    """Remove the temporary files and folders that killed runs left in a folder; return what was removed.

    Those of a process that may still run stay; after a day it counts as gone. `earlier`: the files of mmedit 0.1 go
    too, whose names others may use as well, so only in a folder that is the program's own.
    """
    if is_link(folder) or not folder.is_dir():
        return []
    removed = []
    try:
        found = list(folder.iterdir())
    except OSError:  # a folder that may be written to but not listed
        return []
    for path in found:
        if not _is_abandoned(path, earlier):
            continue
        with suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path)
    return removed


@cache
def _remove_temporaries_once(folder: Path, process: int) -> None:
    """Do `remove_temporaries` once in a process: a folder may be large and written to often."""
    remove_temporaries(folder)


def is_temporary(name: str) -> bool:
    """Tell whether a name has the shape of a temporary file or folder of this program."""
    return bool(_TEMPORARY.fullmatch(name) or _EARLIER.fullmatch(name))


def _is_abandoned(path: Path, earlier: bool) -> bool:
    if is_link(path):
        return False
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
        return earlier and _EARLIER.fullmatch(path.name) is not None and path.is_file()
    pid = int(found["pid"])
    if found["host"] == _host():
        if found["process"] == _PROCESS and pid == os.getpid():
            return False  # of this process itself
        if not _may_run(pid):
            return True
    try:
        return time.time() - path.lstat().st_mtime > _DAY
    except OSError:
        return False


def _may_run(pid: int) -> bool:
    """Tell whether the process of a number may still be the one that wrote a file."""
    if pid == os.getpid():
        return False  # an earlier process had the number that is ours now
    if os.name == "nt":
        return True  # there a signal of 0 would end the process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _host() -> str:
    """Return six digits for the machine, and on Linux for the space in which its process numbers count."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:6]


def sync_file(path: Path) -> None:
    """Make what is in a file survive a crash of the machine. Raises OSError."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
