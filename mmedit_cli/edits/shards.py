"""Tensors of edits on disk, in files that are named after what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mmedit_cli.errors import StateError
from mmedit_cli.storage import write_atomic

T = TypeVar("T")


class Shards:
    """The files `shards/<sha256>.safetensors` of a ledger."""

    def __init__(self, ledger: Path) -> None:
        self.folder = ledger / "shards"
        self._hint = f"`mmedit edits compact {ledger} --remake` makes the edits again from their requests"

    def write(self, tensors: Mapping[str, Any]) -> str:
        """Write tensors, atomically, and return the digest that names them."""
        from safetensors.torch import save

        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        digest = hashlib.sha256(data).hexdigest()
        write_atomic(self._path(digest), data)
        return digest

    def read(self, digest: str) -> dict[str, Any]:
        """Return the tensors of a digest, on the CPU; raise StateError if they are not what was written."""
        from safetensors.torch import load

        path = self._path(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StateError(f"{path}: cannot be read: {error.strerror}", self._hint) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StateError(f"{path}: damaged: it is not what was written", self._hint)
        return load(data)

    def remove(self, digest: str) -> None:
        """Remove one file, if it is there."""
        self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"


def sweep(folder: Path, names: Collection[str]) -> None:
    """Remove all files of a folder but these."""
    for path in folder.iterdir():
        if path.name not in names:
            with suppress(OSError):
                path.unlink()


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
