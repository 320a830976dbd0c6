"""What stands for the content of a model: digests of its weights. No torch here.

A fingerprint has 32 digits. Those of version 0.1.0 have 16: they read samples of the weights only, so another model
could have the same one. Files that hold such a former fingerprint still open; `same_model` compares both.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmedit_cli.errors import ModelError
from mmedit_cli.model_folder import INDEX, config_file, pipeline_parts, weight_files
from mmedit_cli.reading import open_regular, read_tensor_header
from mmedit_cli.registry import cache_dir
from mmedit_cli.storage import sha256_of, write_atomic

_DIGITS = 32
_FORMER_DIGITS = 16
# of a former fingerprint, in bytes
_STRIDE = 16 << 20
_SAMPLE = 64 << 10
# seconds; a younger file may be written again within one tick of the clock of its file system
_SETTLED = 2.0


def fingerprint(folder: Path) -> str:
    """Return a digest of the configs and of every byte of the weights of a model folder, or of a pipeline's parts.

    The digest of a weight file is computed once and kept in the cache folder. Raises ModelError.
    """
    return _digest_folder(folder, _add_weights)[:_DIGITS]


def former_fingerprint(folder: Path) -> str:
    """Return the fingerprint that version 0.1.0 gave to a folder: of the headers and of samples of the weights."""
    return _digest_folder(folder, _add_samples)[:_FORMER_DIGITS]


def same_model(known: object, fingerprint: str, former: str) -> bool:
    """Whether a fingerprint in a file is that of a model, or its former one (empty: it has none)."""
    return known == fingerprint or is_former(known, former)


def is_former(known: object, former: str) -> bool:
    """Whether a fingerprint in a file is a model's former one."""
    return bool(former) and known == former


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits, from the cache folder if the file was read before.

    What is kept belongs to a device, inode, size and time of change; a file that is replaced or written to is read
    again.
    """
    status = path.stat()
    numbers = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    key = "-".join(f"{number:x}" for number in numbers)
    kept = cache_dir() / "digests" / key
    with suppress(OSError, ValueError):
        found = kept.read_text(encoding="ascii").strip()
        if len(found) == 64:
            return found
    found = sha256_of(path)
    newest = max(status.st_mtime, status.st_ctime)
    if time.time() - newest > _SETTLED:
        # without a cache folder it is computed again the next time
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, found)
    return found


def _digest_folder(folder: Path, add_weights: Callable[[Any, Path], None]) -> str:
    """Return the SHA-256 of a model folder, or of a pipeline's parts, in hex digits."""
    digest = hashlib.sha256()
    config = config_file(folder)
    if config is not None:
        digest.update(config.read_bytes())
    if config is None or config.name != INDEX:
        add_weights(digest, folder)
        return digest.hexdigest()
    for name in pipeline_parts(folder):
        part = folder / name
        part_config = part / "config.json"
        if part_config.is_file():
            digest.update(part_config.read_bytes())
        add_weights(digest, part)
    return digest.hexdigest()


def _add_weights(digest: Any, folder: Path) -> None:
    """Add, of each weight file, the name, the header as it is now, and the digest of all its bytes."""
    for file in weight_files(folder):
        header = read_header(file)
        digest.update(f"{file.name}:{len(header)}:{file_digest(file)};".encode())
        digest.update(header)


def _add_samples(digest: Any, folder: Path) -> None:
    """Add, of each weight file, the size, the header and a 64 KiB sample of every 16 MiB, as version 0.1.0 did."""
    for file in weight_files(folder):
        size = file.stat().st_size
        header = read_header(file)
        digest.update(f"{file.name}:{size};".encode())
        digest.update(header)
        with file.open("rb") as stream:
            for place in _samples(size, len(header) + 8):
                stream.seek(place)
                digest.update(stream.read(_SAMPLE))


def _samples(size: int, start: int) -> Iterator[int]:
    yield from range(start, size, _STRIDE)
    yield max(start, size - _SAMPLE)


def read_header(file: Path) -> bytes:
    """Return the header of a safetensors file; raise ModelError if it is damaged, or the file cut off."""
    hint = "copy it again"
    tensors, _ = read_tensor_header(file, error=ModelError, hint=hint)
    with open_regular(file, error=ModelError, hint=hint) as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
        size = os.fstat(stream.fileno()).st_size
    for name in tensors.values:
        offsets = tensors.record(name).array("data_offsets", int)
        if not offsets or offsets[-1] > size - 8 - length:
            raise ModelError(
                f"{file}: not a complete safetensors file: {name} ends behind it", hint
            )
    return header
