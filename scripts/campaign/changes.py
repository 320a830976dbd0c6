"""Sees every change that this process makes to the file system, just before it is made."""

from __future__ import annotations

import io
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NOT_FILES = ("/dev/", "/proc/", "/sys/")


class Watch:
    """Counts the changes below `home` from `begin` on, and calls `before_change(number, what)` before each.

    A change is: a file opened for writing, a write, half a write, a rename, a removal, a new folder, a new length,
    a new mode or time, and an fsync. Changes elsewhere are told to `tell`.
    Writes of libraries that do not go through Python are seen by what surrounds them.
    """

    def __init__(self) -> None:
        self._home = ""
        self._before_change: Callable[[int, str], None] = lambda number, what: None
        self._tell: Callable[[str], None] = print
        self._lock = threading.RLock()
        self.count = 0

    def install(self) -> None:
        """Put the hooks in place; they do nothing until `begin`."""
        sys.addaudithook(self._audited)
        io.open = sys.modules["builtins"].open = self._open  # type: ignore[assignment, attr-defined]
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]  # so that copies are written by Python
        for name in ("fsync", "fdatasync", "write"):
            setattr(os, name, self._of_descriptor(name, getattr(os, name)))

    def begin(
        self,
        home: Path,
        before_change: Callable[[int, str], None],
        tell: Callable[[str], None],
    ) -> None:
        """Count from here."""
        self._home, self._before_change, self._tell = (
            f"{home}{os.sep}",
            before_change,
            tell,
        )

    def change(self, kind: str, path: str) -> None:
        """Take note of a change that comes next, or die."""
        if not self._home or path.startswith(_NOT_FILES) or not path.startswith("/"):
            return
        with self._lock:
            if not f"{path}{os.sep}".startswith(self._home):
                self._tell(f"outside {kind} {path}")
                return
            self.count += 1
            self._before_change(self.count, f"{kind} {path.removeprefix(self._home)}")

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of what Python says that it is going to do."""
        if not self._home:
            return
        if event == "open":
            path, _, flags = arguments
            if (
                isinstance(path, str | bytes | os.PathLike)
                and isinstance(flags, int)
                and flags & _WRITING
            ):
                self.change("open", _absolute(path))
        elif event in _EVENTS:
            kind, needs_it = _EVENTS[event]
            path = _absolute(
                arguments[event in _TWO_PATHS], _folder_of(event, arguments)
            )
            if needs_it is None or os.path.lexists(path) == needs_it:
                self.change(kind, path)

    def _of_descriptor(
        self, name: str, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        def watched(descriptor: int, *arguments: Any) -> Any:
            if self._home:
                self.change(name, _absolute(descriptor))
            return function(descriptor, *arguments)

        return watched

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """Open a file as the built-in does, with writes that are seen."""
        reading = not set(mode) & set("wax+")
        if reading or not self._home:
            return _OPEN(
                file, mode, buffering, encoding, errors, newline, closefd, opener
            )
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return (
            buffered
            if "b" in mode
            else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
        )


class _Raw(io.FileIO):
    """A file whose writes and cuts are changes."""

    def __init__(
        self, watch: Watch, file: Any, mode: str, closefd: bool, opener: Any
    ) -> None:
        self._watch = watch
        super().__init__(file, mode, closefd, opener)

    def write(self, data: Any, /) -> int:
        path = _absolute(self.fileno())
        self._watch.change("write", path)
        view = memoryview(data).cast("B")
        written = super().write(view[: len(view) // 2]) if len(view) > 1 else 0
        if written:
            self._watch.change("rest of write", path)
        return written + super().write(view[written:])

    def truncate(self, size: int | None = None, /) -> int:
        self._watch.change("truncate", _absolute(self.fileno()))
        return super().truncate(size)


_OPEN = open
_EVENTS: dict[
    str, tuple[str, bool | None]
] = {  # audit event: (kind, whether the path is there for it to change)
    "os.chmod": ("chmod", True),
    "os.link": ("link", True),
    "os.mkdir": ("mkdir", False),
    "os.remove": ("unlink", True),
    "os.rename": ("rename", None),
    "os.rmdir": ("rmdir", True),
    "os.symlink": ("symlink", None),
    "os.truncate": ("truncate", None),
    "os.utime": ("utime", True),
}
_TWO_PATHS = ("os.link", "os.rename", "os.symlink")  # the second is what comes to be
_DIR_FD = {"os.chmod": 2, "os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.utime": 3}


def _folder_of(event: str, arguments: tuple[Any, ...]) -> int:
    """Return the descriptor of the folder that a path is relative to, -1 for none."""
    place = _DIR_FD.get(event)
    found = arguments[place] if place is not None and place < len(arguments) else -1
    return found if isinstance(found, int) else -1


def _absolute(path: Any, folder: int = -1) -> str:
    """Return where a path or a descriptor is."""
    if isinstance(path, int):
        try:
            return os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return ""
    base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    return os.path.normpath(os.path.join(base, os.fsdecode(path)))
