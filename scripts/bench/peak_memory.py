"""Run a function in a copy of this process, and say what it took: seconds, processor seconds, peak memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.05  # seconds between two looks
_SPARE_GIB = 1.5  # of the machine, which no step may take
_KIB_A_GIB = 1 << 20


@dataclass(frozen=True)
class Spent:
    """What a step took: exit code (minus a signal's number), seconds, and the most memory in GiB.

    `anonymous` counts what the process has for itself (RssAnon of Linux), `resident` mapped files too.
    """

    code: int
    seconds: float
    processor_seconds: float
    anonymous: float
    resident: float


def memory(process: int | str = "self") -> dict[str, float]:
    """Return RssAnon and VmRSS of a process in GiB; nothing of one that has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmRSS"):
            found[name] = int(value.split()[0]) / _KIB_A_GIB
    return found


def available_gib() -> float:
    """Return how much memory the machine can give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) / _KIB_A_GIB
    raise OSError("no MemAvailable in /proc/meminfo")


class Peak:
    """The most memory this process has had inside the block, looked at by a thread of its own."""

    def __init__(self) -> None:
        self.anonymous = 0.0
        self.resident = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        found = memory()
        self.anonymous = max(self.anonymous, found["RssAnon"])
        self.resident = max(self.resident, found["VmRSS"])


def in_a_copy(run: Callable[[], int], log: Path, limit_gib: float) -> Spent:
    """Run a function in a copy of this process, with its output in a file; kill it if it takes more than the limit.

    It is killed as well when the machine has next to no memory left.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _end_as(run, log)
    anonymous = 0.0
    resident = 0.0
    ended = 0
    while not ended:
        found = memory(child)
        anonymous = max(anonymous, found.get("RssAnon", 0.0))
        resident = max(resident, found.get("VmRSS", 0.0))
        if anonymous > limit_gib or available_gib() < _SPARE_GIB:
            os.kill(child, signal.SIGKILL)
        time.sleep(_EVERY)
        ended, status, usage = os.wait4(child, os.WNOHANG)
    return Spent(
        os.waitstatus_to_exitcode(status),
        time.monotonic() - start,
        _processor(usage),
        anonymous,
        resident,
    )


def _processor(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _end_as(run: Callable[[], int], log: Path) -> None:
    code = 70
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            code = run()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
