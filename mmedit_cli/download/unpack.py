"""Zip and tar files from strangers: unpacked below one folder, within limits, or refused with the entry named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmedit_cli.download.catalogue import is_inside
from mmedit_cli.errors import MmeditError
from mmedit_cli.output import TransferTick

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_CHUNK = 1 << 20
_ENCRYPTED = 0x1  # bit of a zip entry's flags
_KNOWN = (
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
    zipfile.ZIP_BZIP2,
)  # the memory that LZMA takes is in its header
_ONE_READ = (
    32 << 20
)  # bytes that are read at once: the list of a zip file is, and so is a header of a tar file
_XZ_MEMORY = 128 << 20
_MAGIC = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    MemoryError,  # of xz, when it would need more than it may
    NotImplementedError,
    RecursionError,  # of tarfile, where headers follow headers
    ValueError,
)


class ArchiveError(MmeditError):
    """An archive is damaged, too large, or reaches out of its folder."""


@dataclass(frozen=True)
class Limits:
    """How much an archive may hold: entries, bytes in all, and bytes for each byte of the archive (zip bombs)."""

    entries: int = 300_000
    bytes: int = 2 << 40
    ratio: int = 200
    # below this size any ratio is fine: annotations compress well
    free_ratio_bytes: int = 1 << 30


class _Budget:
    """Counts what really comes out of an archive; sizes in headers may lie."""

    def __init__(self, archive: Path, folder: Path, limits: Limits) -> None:
        self.archive = archive
        self.limits = limits
        by_ratio = archive.stat().st_size * limits.ratio
        self.most = min(limits.bytes, max(limits.free_ratio_bytes, by_ratio))
        self.free = shutil.disk_usage(folder).free
        self.entries = 0
        self.bytes = 0

    def entry(self) -> None:
        self.entries += 1
        if self.entries > self.limits.entries:
            raise ArchiveError(
                f"{self.archive.name}: more than {self.limits.entries:,} entries"
            )

    def take(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self.most:
            raise ArchiveError(
                f"{self.archive.name}: unpacks to more than {self.most:,} bytes"
            )
        if self.bytes > self.free:
            raise ArchiveError(
                f"{self.archive.name}: does not fit on the disk ({self.free:,} bytes free)"
            )


class _Bounded(io.RawIOBase):
    """A file that never gives more than `_ONE_READ` bytes at once.

    The headers in an archive say how much of it is to be read at once, and they may say gigabytes.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        super().__init__()
        self._file, self._name = file, name

    def read(self, size: int | None = -1) -> bytes:
        """Return up to `size` bytes; raise ArchiveError if they are too many."""
        if size is None or size < 0:
            found = self._file.read(_ONE_READ + 1)
        else:
            found = self._file.read(min(size, _ONE_READ + 1))
        if len(found) > _ONE_READ:
            raise ArchiveError(
                f"{self._name}: a header of more than {_ONE_READ >> 20} MiB"
            )
        return found

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to another place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Tell that places can be moved to."""
        return True

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True


@contextmanager
def _opened(path: Path) -> Iterator[_Bounded]:
    """Open a file, unpacked if it is gzip, bzip2 or xz."""
    with path.open("rb") as plain:
        start = plain.read(_CHUNK)
        plain.seek(0)
        way = next(
            (way for magic, way in _MAGIC.items() if start.startswith(magic)), None
        )
        if way is lzma.open:  # fails if the first block needs more memory
            lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(start, max_length=1)
        if way is None:
            yield _Bounded(plain, path.name)
            return
        with way(plain) as stream:  # type: ignore[operator]
            yield _Bounded(stream, path.name)


def is_archive(path: Path) -> bool:
    """Tell whether a file is a zip or a tar file, by its content."""
    return path.is_file() and (zipfile.is_zipfile(path) or _is_tar(path))


def _is_tar(path: Path) -> bool:
    """Tell whether a file begins as a tar file does; a header of it that is too large is not read."""
    try:
        with _opened(path) as file:
            tarfile.TarInfo.frombuf(
                file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape"
            )
            return True
    except (*_DAMAGED, OSError):
        return False


def unpack(
    archive: Path,
    folder: Path,
    limits: Limits = Limits(),
    tick: TransferTick | None = None,
) -> None:
    """Unpack a zip or tar file into a new folder; on any refusal the folder is gone again.

    Refused: absolute paths, `..`, links that lead out or to anything but a file of the archive, devices, passwords,
    two entries of one name, and more than the limits.

    Raises ArchiveError.
    """
    folder.mkdir(parents=True)
    budget = _Budget(archive, folder, limits)
    try:
        if zipfile.is_zipfile(archive):
            _unzip(archive, folder, budget, tick)
        elif _is_tar(archive):
            _untar(archive, folder, budget, tick)
        else:
            raise ArchiveError(
                f"{archive.name}: neither a zip nor a tar file, or damaged at its start or end"
            )
    except _DAMAGED as error:
        shutil.rmtree(folder)
        raise ArchiveError(f"{archive.name}: damaged or cut off: {error}") from error
    except BaseException:
        shutil.rmtree(folder)
        raise


def _unzip(
    archive: Path, folder: Path, budget: _Budget, tick: TransferTick | None
) -> None:
    with (
        archive.open("rb") as plain,
        zipfile.ZipFile(_Bounded(plain, archive.name)) as file,
    ):
        for info in file.infolist():
            budget.entry()
            _check_name(archive, info.filename.rstrip("/"))
            mode = info.external_attr >> 16
            if stat.S_ISLNK(mode):
                raise ArchiveError(
                    f"{archive.name}: {info.filename}: a link in a zip file"
                )
            if info.flag_bits & _ENCRYPTED:
                raise ArchiveError(
                    f"{archive.name}: {info.filename}: locked with a password",
                    "unpack it by hand",
                )
            if info.compress_type not in _KNOWN:
                raise ArchiveError(
                    f"{archive.name}: {info.filename}: packed in a way that is not known here",
                    "unpack it by hand",
                )
            target = folder / info.filename
            if info.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            with file.open(info) as stream:
                _write(archive, stream, target, budget, tick)


def _untar(
    archive: Path, folder: Path, budget: _Budget, tick: TransferTick | None
) -> None:
    links: list[tarfile.TarInfo] = []
    with _opened(archive) as plain, tarfile.open(fileobj=plain, mode="r:") as file:
        for info in _members(archive, file, folder):
            budget.entry()
            _check_name(archive, info.name)
            if info.isdir():
                (folder / info.name).mkdir(parents=True, exist_ok=True)
            elif info.issym() or info.islnk():
                links.append(info)
            else:
                stream = file.extractfile(info)
                assert (
                    stream is not None
                )  # the filter has refused what is neither a file, a folder nor a link
                with stream:
                    _write(archive, stream, folder / info.name, budget, tick)
    for info in links:
        # a link becomes a copy of the file it leads to: nothing in the folder can lead anywhere
        base = folder if info.islnk() else (folder / info.name).parent
        goal = (base / info.linkname).resolve()
        if not goal.is_relative_to(folder.resolve()) or not goal.is_file():
            raise ArchiveError(
                f"{archive.name}: {info.name}: a link to {info.linkname}, which is no file of the archive"
            )
        with goal.open("rb") as stream:
            _write(archive, stream, folder / info.name, budget, None)


def _members(
    archive: Path, file: tarfile.TarFile, folder: Path
) -> Iterator[tarfile.TarInfo]:
    """Yield the entries that Python's data filter lets through; a leading `./` is dropped."""
    if not hasattr(tarfile, "data_filter"):
        raise ArchiveError(
            "this Python cannot unpack tar files safely",
            "update to 3.11.4 or newer, or unpack by hand",
        )
    for info in file:
        if info.name in (".", "./"):
            continue
        try:
            _check_name(archive, info.name.removeprefix("./").rstrip("/"))
            checked = tarfile.data_filter(info, str(folder))
        except tarfile.FilterError as error:
            raise ArchiveError(f"{archive.name}: {info.name}: {error}") from error
        yield checked.replace(
            name=checked.name.removeprefix("./").rstrip("/"), deep=False
        )


def _check_name(archive: Path, name: str) -> None:
    if not is_inside(name):
        raise ArchiveError(f"{archive.name}: {name}: does not stay in the folder")


def _write(
    archive: Path,
    stream: IO[bytes],
    target: Path,
    budget: _Budget,
    tick: TransferTick | None,
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("xb") as out:
            while chunk := stream.read(_CHUNK):
                budget.take(len(chunk))
                out.write(chunk)
                if tick is not None:
                    tick(f"unpack {archive.name}", len(chunk), None)
    except (FileExistsError, IsADirectoryError) as error:
        raise ArchiveError(
            f"{archive.name}: {target.name}: two entries of one name"
        ) from error
