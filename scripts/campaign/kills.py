"""A command that is killed at each change it makes, repeated, and compared with its undisturbed end."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from changes import Watch

Words = (
    Sequence[str] | Callable[[], int]
)  # of the command line, or a function that returns an exit code
Tree = dict[str, tuple[int, bytes | None]]  # path: (mode, content; None for a folder)

COSTS = {
    "time",
    "seconds",
    "peak_memory",
    "cost",
    "seconds_per_subject",
    "seconds_per_edit",
    "loss_seconds",
}
_write = os.write  # as it is before the hooks
SEAL, LINES = "seal.json", "edits.jsonl"  # of a ledger
TEMPORARY = re.compile(
    r"\.[0-9a-f]{6}-\d+-[0-9a-f]{8}-[0-9a-f]{6}(?=\.tmp)|(?<=-)[a-z0-9_]{8}(?=/|$)"
)  # random


@dataclass(frozen=True)
class Scenario:
    """A command and what continues it after a kill.

    `before` is run once to make the start. After a kill the same words are given again, then those of `again`, until
    one ends with a code of `fine`, as an undisturbed command does, or of `done`: the command refuses because nothing
    is left to do. Files whose path matches `allowed` may stay until `tidy`, after which the ends are equal without
    exception.
    """

    name: str
    words: Words
    before: Sequence[Words] = ()
    again: Sequence[Words] = ()
    fine: tuple[int, ...] = (0,)
    done: tuple[int, ...] = ()
    allowed: str = ""
    tidy: Words | None = None
    short: bool = False


@dataclass
class Result:
    """What a campaign found; `states` are the different contents of the folder that the kills left."""

    changes: int = 0
    kills: int = 0
    states: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (None: killed), its changes, and what it said.

    `outside` are changes elsewhere than in the folder; `place` is the change it was killed at; `imported` are the
    modules that it had to import.
    """

    code: int | None
    changes: int
    outside: tuple[str, ...]
    place: str
    imported: tuple[str, ...]
    said: str


class _Undisturbed:
    """What happens before each change of a command: nothing."""

    def before_change(
        self, number: int, what: str, tell: Callable[[str], None]
    ) -> None:
        """Do what comes before a change, in the process of the command."""

    def heard(self, kind: str, what: str) -> None:
        """Take note of what was told, in the process of the campaign."""


class _Killing(_Undisturbed):
    """Kills the command before one of its changes."""

    def __init__(self, at: int) -> None:
        self._at = at

    def before_change(
        self, number: int, what: str, tell: Callable[[str], None]
    ) -> None:
        if number == self._at:
            tell(f"killed {what}")
            os.kill(os.getpid(), signal.SIGKILL)


class _Copying(_Undisturbed):
    """Copies the folder before each change, while the command waits; equal folders are copied once."""

    def __init__(self, home: Path, copies: Path) -> None:
        self._home, self._copies = home, copies
        self._waiting, self._go_on = os.pipe()
        self._seen: set[str] = set()
        self.count = 0
        self.places: dict[int, str] = {}

    def before_change(
        self, number: int, what: str, tell: Callable[[str], None]
    ) -> None:
        tell(f"change {what}")
        os.read(self._waiting, 1)

    def heard(self, kind: str, what: str) -> None:
        if kind != "change":
            return
        self.count += 1
        left = digest(tree(self._home))
        if left not in self._seen:
            self._seen.add(left)
            self.places[self.count] = what
            shutil.copytree(self._home, self._copies / str(self.count), symlinks=True)
        _write(self._go_on, b".")


class Campaign:
    """Runs scenarios in one folder, always at the same path.

    With `copies` no process is killed: what a kill before a change leaves is what lies there before that change, and
    that is copied, all of it from one run of the command. So a command that computes for long is run once only.
    """

    def __init__(
        self,
        root: Path,
        watch: Watch,
        main: Callable[[list[str]], int],
        *,
        copies: bool = False,
    ) -> None:
        self.root, self.home, self.start = root, root / "home", root / "start"
        self._watch, self._main, self.copies = watch, main, copies

    def run(self, scenario: Scenario, say: Callable[[str], None]) -> Result:
        """Kill a command at each of its changes and return what was found."""
        began, result = time.monotonic(), Result()
        self._prepare(scenario)
        whole = self._must_run(scenario.words, scenario.fine)
        if whole.imported:  # once more, as some packages write when they are imported
            self._reset(self.start)
            whole = self._must_run(scenario.words, scenario.fine)
        result.changes = whole.changes
        result.differences += [f"undisturbed: {line}" for line in whole.outside]
        wanted = [tree(self.home)]
        if scenario.tidy is not None:
            self._must_run(scenario.tidy)
            wanted.append(tree(self.home))
        left = (
            self._copied(scenario, result)
            if self.copies
            else self._killed(scenario, result)
        )
        for place, outside in left:
            found = [
                *outside,
                *self._continue(scenario),
                *self._compare(scenario, wanted),
            ]
            if found:
                result.differences.append(f"{place}: {'; '.join(found)}")
            say(f"  {scenario.name}: {place}: {'; '.join(found) or 'ends equal'}")
        found = self._compare(scenario, wanted)
        result.differences += [f"undisturbed: {line}" for line in found]
        result.seconds = time.monotonic() - began
        return result

    def _killed(
        self, scenario: Scenario, result: Result
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Kill the command at each change, and leave in the folder what each kill left, if no other left the same.

        Yields (where it was killed, changes outside), and leaves the end of an undisturbed command at last.
        """
        seen: set[str] = set()
        while True:
            self._reset(self.start)
            killed = self._process(scenario.words, _Killing(result.kills + 1))
            if killed.code is not None:  # it has no more changes, and ran undisturbed
                return
            result.kills += 1
            left = digest(tree(self.home))
            if left in seen and not killed.outside:
                continue
            seen.add(left)
            result.states = len(seen)
            yield f"killed at change {result.kills} ({killed.place})", killed.outside

    def _copied(
        self, scenario: Scenario, result: Result
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Do as `_killed`, from one run of the command that waits before each change until the folder is copied."""
        shutil.rmtree(self.root / "copies", ignore_errors=True)
        self._reset(self.start)
        copying = _Copying(self.home, self.root / "copies")
        ended = self._process(scenario.words, copying)
        shutil.copytree(self.home, self.root / "copies" / "end", symlinks=True)
        result.kills, result.states = copying.count, len(copying.places)
        for number, place in copying.places.items():
            self._reset(self.root / "copies" / str(number))
            yield f"killed at change {number} ({place})", ended.outside
        self._reset(self.root / "copies" / "end")

    def _prepare(self, scenario: Scenario) -> None:
        """Make the start of a scenario, and begin there."""
        for folder in (self.home, self.start):
            shutil.rmtree(folder, ignore_errors=True)
        (self.home / "tmp").mkdir(parents=True)
        for words in scenario.before:
            self._must_run(words)
        shutil.copytree(self.home, self.start, symlinks=True)

    def _reset(self, begin: Path) -> None:
        shutil.rmtree(self.home)
        shutil.copytree(begin, self.home, symlinks=True)

    def _continue(self, scenario: Scenario) -> list[str]:
        """Give the command again; return what went wrong."""
        for words in (scenario.words, *scenario.again):
            ended = self._process(words)
            if ended.outside or ended.code in (*scenario.fine, *scenario.done):
                return list(ended.outside)
        return [
            f"the repeated command ended with {ended.code}: {' '.join(ended.said.split())[-300:]}"
        ]

    def _compare(self, scenario: Scenario, wanted: Sequence[Tree]) -> list[str]:
        """Return how the folder differs from the wanted end, then from that after `tidy`."""
        found = differences(tree(self.home), wanted[0], scenario.allowed)
        if scenario.tidy is None:
            return found
        ended = self._process(scenario.tidy)
        if ended.code != 0:
            return [*found, f"tidying ended with {ended.code}: {ended.said[-300:]}"]
        return found + [
            f"after tidying: {line}" for line in differences(tree(self.home), wanted[1])
        ]

    def _must_run(self, words: Words, fine: Sequence[int] = (0,)) -> Ended:
        ended = self._process(words)
        if ended.code not in fine:
            raise SystemExit(
                f"{words}: ended with {ended.code}, undisturbed:\n{ended.said}"
            )
        for module in ended.imported:  # so that the processes to come need not
            with suppress(ImportError):
                importlib.import_module(module)
        return ended

    def _process(self, words: Words, disturbing: _Undisturbed | None = None) -> Ended:
        """Run a command in a process of its own."""
        disturbing = disturbing or _Undisturbed()
        reader, writer = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._become(words, disturbing, writer)
        os.close(writer)
        told = []
        with os.fdopen(reader, encoding="utf-8") as pipe:
            for line in pipe:
                told.append(line.rstrip("\n").partition(" "))
                disturbing.heard(*told[-1][::2])
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        places = [what for kind, _, what in told if kind == "killed"]
        counts = [int(what) for kind, _, what in told if kind == "count"]
        outside = dict.fromkeys(
            f"outside: {what}" for kind, _, what in told if kind == "outside"
        )
        said = (self.root / "said.txt").read_text(encoding="utf-8", errors="replace")
        code = None if status == -signal.SIGKILL else status
        imported = tuple(what for kind, _, what in told if kind == "imported")
        return Ended(code, sum(counts), tuple(outside), "".join(places), imported, said)

    def _become(self, words: Words, disturbing: _Undisturbed, writer: int) -> None:
        """Be the process that runs the command; never returns."""
        code = 70
        write, known = os.write, set(sys.modules)
        try:
            said = os.open(
                self.root / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            )
            for descriptor in (1, 2):
                os.dup2(said, descriptor)
            os.chdir(self.home)
            for name, folder in (
                ("CACHE", "cache"),
                ("DATA", "data"),
                ("RECORDS", "records"),
            ):
                os.environ[f"MMEDIT_{name}"] = str(self.home / folder)
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.home / "tmp")

            def tell(line: str) -> None:
                write(writer, f"{line}\n".encode())

            self._watch.begin(
                self.home,
                lambda number, what: disturbing.before_change(number, what, tell),
                tell,
            )
            code = words() if callable(words) else self._main(list(words))
            sys.stdout.flush()
            sys.stderr.flush()
            lines = [
                f"count {self._watch.count}",
                *(f"imported {name}" for name in [*sys.modules] if name not in known),
            ]
            write(writer, "".join(f"{line}\n" for line in lines).encode())
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)


def tree(folder: Path) -> Tree:
    """Return everything below a folder, without costs and times."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        plain = path.is_file() and not path.is_symlink()
        found[name] = mode, _timeless(path) if plain else None
    return found


def differences(found: Tree, wanted: Tree, allowed: str = "") -> list[str]:
    """Return in a line each how a folder differs from another; more files that match `allowed` do not count."""
    lines = [f"{name} is missing" for name in wanted if name not in found]
    more = [name for name in found if name not in wanted]
    more = [
        name for name in more if os.path.dirname(name) not in more
    ]  # a folder stands for what is in it
    lines += [
        f"{name} is left over"
        for name in more
        if not (allowed and re.fullmatch(allowed, name))
    ]
    both = [name for name in found if name in wanted]
    lines += [
        f"{name} has another content"
        for name in both
        if found[name][1] != wanted[name][1]
    ]
    return lines + [
        f"{name} has another mode" for name in both if found[name][0] != wanted[name][0]
    ]


def digest(found: Tree) -> str:
    """Return a digest of what a folder holds; the random part of temporary names does not count."""
    hashed = hashlib.sha256()
    for name, (mode, content) in sorted(
        (TEMPORARY.sub("", name), value) for name, value in found.items()
    ):
        hashed.update(
            f"{name}\0{mode}\0{'' if content is None else len(content)}\0".encode()
        )
        hashed.update(content or b"")
    return hashed.hexdigest()


def _timeless(path: Path) -> bytes:
    """Return the content of a file; in JSON without the keys of costs and times."""
    data = path.read_bytes()
    if path.name == SEAL:
        return _judged(data, path.with_name(LINES))
    if path.suffix == ".safetensors":
        return _tensors_without_costs(data)
    if path.suffix not in (".json", ".jsonl"):
        return data
    lines = data.split(b"\n") if path.suffix == ".jsonl" else [data]
    try:
        return b"\n".join(
            json.dumps(_without_costs(json.loads(line))).encode() if line else b""
            for line in lines
        )
    except ValueError:
        return data


def _judged(seal: bytes, path: Path) -> bytes:
    """Return in place of the seal of a ledger whether it is that of the lines, whose times make another one each."""
    lines = path.read_bytes() if path.exists() else b""
    found = hashlib.sha256(lines).hexdigest()
    try:
        accepted = [
            one["sha256"] for one in json.loads(seal)["accepted"] if not one["torn"]
        ]
    except (ValueError, KeyError, TypeError):
        return b"damaged"
    return b"whole" if accepted == [found] else b"not of these lines"


def _tensors_without_costs(data: bytes) -> bytes:
    """Return a file of tensors without the costs among its metadata; a damaged one as it is."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] = _without_costs(header["__metadata__"])
    except (ValueError, KeyError, TypeError):
        return data
    return json.dumps(header).encode() + data[8 + length :]


def _without_costs(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_costs(item) for item in value]
    if isinstance(value, Mapping):
        return {
            key: _without_costs(item) for key, item in value.items() if key not in COSTS
        }
    return value
