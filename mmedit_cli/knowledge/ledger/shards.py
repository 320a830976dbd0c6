"""Tensors of edits on disk, in files that are named after what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mmedit_cli.errors import StateError
from mmedit_cli.reading import parse_json_object
from mmedit_cli.storage import (
    file_errors,
    remove_file,
    remove_temporaries,
    sha256_of,
    sync_file,
    sync_folder,
    temporary_beside,
)

T = TypeVar("T")
SHARD_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
_EDITS = "edits"  # the key of the metadata that says whose tensors they are


class Shards:
    """The files `shards/<sha256>.safetensors` of a ledger.

    `write` gives a file a temporary name only; `finalize` gives it its own after the line that names it is on disk. So
    a kill leaves either a temporary file that no line names, which the next writer removes, or one that a line names,
    which readers find and the next writer settles.
    """

    def __init__(self, ledger: Path) -> None:
        self.folder = ledger / "shards"
        self._pending: dict[str, Path] = {}
        self._hint = f"`mmedit edits compact {ledger} --remake` makes the edits again from their requests"

    def write(self, tensors: Mapping[str, Any], edits: Mapping[str, Any]) -> str:
        """Write tensors under a temporary name and return the digest that names them.

        `edits` says in plain values whose tensors they are, so that they can be taken up should the lines be lost.
        """
        from safetensors.torch import save

        plain = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
        }
        data = save(plain, {_EDITS: json.dumps(edits, ensure_ascii=False)})
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if digest in self._pending or self._is_whole(path, digest):
            return digest
        temporary = temporary_beside(path)
        with file_errors(path, "write"):
            try:
                temporary.write_bytes(data)
                sync_file(temporary)
                sync_folder(self.folder)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        self._pending[digest] = temporary
        return digest

    def finalize(self) -> None:
        """Give the files that were written their names."""
        for digest, temporary in self._pending.items():
            with file_errors(temporary, "rename"):
                os.replace(temporary, self._path(digest))
        self._pending.clear()

    def drop(self) -> None:
        """Remove the files that were written and have no name yet."""
        for temporary in self._pending.values():
            with suppress(OSError):
                remove_file(temporary)
        self._pending.clear()

    def recover(self, named: Collection[str]) -> None:
        """Rename the files of a killed writer that a line names, and remove its other temporary files."""
        for digest in named:
            path = self._path(digest)
            if path.exists():
                continue
            for temporary in self._temporaries(digest):
                if self._is_whole(temporary, digest):
                    with file_errors(temporary, "rename"):
                        os.replace(temporary, path)
                    break
        remove_temporaries(self.folder)

    def read(self, digest: str) -> dict[str, Any]:
        """Return the tensors of a digest, on the CPU; raise StateError if they are not what was written."""
        from safetensors.torch import load

        path = self._path(digest)
        data = self._bytes(digest)
        if hashlib.sha256(data).hexdigest() != digest:
            raise StateError(f"{path}: damaged: it is not what was written", self._hint)
        return load(data)

    def whose(self, digest: str) -> dict[str, Any]:
        """Return the `edits` that `write` got with a file, empty for a file of mmedit 0.1.

        Raises StateError for a damaged file.
        """
        data = self._bytes(digest)
        if hashlib.sha256(data).hexdigest() != digest:
            raise StateError(
                f"{self._path(digest)}: damaged: it is not what was written", self._hint
            )
        size = int.from_bytes(data[:8], "little")
        header = parse_json_object(
            data[8 : 8 + size], str(self._path(digest)), error=StateError
        )
        text = header.record("__metadata__", {}).text(_EDITS, "{}")
        return parse_json_object(
            text,
            str(self._path(digest)),
            error=StateError,
        ).values

    def remove(self, digest: str) -> bool:
        """Remove one file and tell whether it was there."""
        return remove_file(self._path(digest))

    def time(self, digest: str) -> float:
        """Return when a file was written, in seconds since 1970."""
        return self._path(digest).stat().st_mtime

    def _bytes(self, digest: str) -> bytes:
        path = self._path(digest)
        # the writer may be about to rename it, or was killed before it could
        for place in (path, *self._temporaries(digest), path):
            with suppress(FileNotFoundError):
                try:
                    return place.read_bytes()
                except FileNotFoundError:
                    raise
                except OSError as error:
                    raise StateError(
                        f"{path}: cannot be read: {error.strerror}", self._hint
                    ) from error
        raise StateError(f"{path}: cannot be read: there is no such file", self._hint)

    def _temporaries(self, digest: str) -> list[Path]:
        return (
            sorted(self.folder.glob(f"{digest}.safetensors.*.tmp"))
            if self.folder.is_dir()
            else []
        )

    def _is_whole(self, path: Path, digest: str) -> bool:
        try:
            return sha256_of(path) == digest
        except OSError:
            return False

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"


def grouped(operations: Sequence[list[T]], most: int) -> list[list[list[T]]]:
    """Return operations in groups of at most `most` edits, in order; one operation stays together."""
    groups: list[list[list[T]]] = []
    size = most
    for edits in operations:
        if size + len(edits) > most:
            groups.append([])
            size = 0
        groups[-1].append(edits)
        size += len(edits)
    return groups
