"""Questions of one evaluation, shared by several processes: who asks a chunk, and how its lines come together."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedit_cli.errors import MmeditError
from mmedit_cli.knowledge.evaluation.ability import Probe
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.models.shared.batch import ActivationCache
from mmedit_cli.reading import parse_json_object
from mmedit_cli.records import Run
from mmedit_cli.runtime import Processes
from mmedit_cli.storage import dump_json, new_temporary_folder


@dataclass(frozen=True)
class Conditions:
    """Where an evaluation runs, what it also measures, and who is told of it.

    base_folder: keeps the answers of the untouched model for other editors; by default they stay with the run.
    probe: is measured on the untouched model, and after the last edit of the first group (`ability.jsonl` of the run).
    processes: share the questions; all of them make every edit.
    tick(what, n): is told of n more queries that were run through the frozen layers, cases asked `before`, `edits`
    made, or cases asked `after`.
    """

    base_folder: Path | None = None
    probe: Probe | None = None
    processes: Processes = field(default_factory=Processes)
    tick: Callable[[str, int], None] = lambda _what, _n: None


class Sharing:
    """What this process asks, and the lines that the first process has yet to write.

    `cost` is how many questions were asked so far by all processes, and in how many seconds: where several ask at the
    same time, those of the slowest.
    """

    def __init__(self, run: Run, processes: Processes) -> None:
        self.run = run
        self.processes = processes
        self.cost: dict[str, float] = {"questions": 0, "seconds": 0.0}
        for line in run.read("asked"):  # a single one, if any
            self.cost = line["cost"]
        self._lines: list[Mapping[str, Any]] = []
        self._questions = 0
        self._seconds = 0.0
        self._chunks = 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the records."""
        return self.processes.first

    def is_mine(self, number: int) -> bool:
        """Whether this process asks the chunk with this number: all of them are dealt out in turn."""
        return number % self.processes.world == self.processes.rank

    def count(self, questions: int, seconds: float) -> None:
        """Note what this process has asked."""
        self._questions += questions
        self._seconds += seconds
        if self.processes.world == 1:
            self._add_up([{"questions": questions, "seconds": seconds}])

    def keep(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep the lines of a chunk until they are handed over."""
        self._lines.extend(lines)

    def passed(self) -> None:
        """Note that a chunk was asked, by whomever; when each process has asked one, its lines are handed over."""
        self._chunks += 1
        if self._chunks == self.processes.world:
            self.hand_over()

    def hand_over(self) -> None:
        """Write the lines of all processes, in the order of their chunks: all processes call it together."""
        self._chunks = 0
        if self.processes.world == 1:
            self._write(self._lines)
            self._lines = []
            return
        mine = {
            "lines": self._lines,
            "questions": self._questions,
            "seconds": self._seconds,
        }
        given = self.processes.gather(dump_json(mine))
        self._lines = []
        self._questions = 0
        self._seconds = 0.0
        parts = []
        for data in given:
            said = parse_json_object(data, "what a process asked", halves=True)
            parts.append(said.values)
        lines: list[Mapping[str, Any]] = []
        for part in parts:
            lines.extend(part["lines"])
        lines.sort(key=_place)
        self._write(lines)
        self._add_up(parts)

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self.writes and lines:
            self.run.append("cases", lines)

    def _add_up(self, parts: Sequence[Mapping[str, Any]]) -> None:
        questions = [part["questions"] for part in parts]
        seconds = [part["seconds"] for part in parts]
        if not sum(questions):
            return
        self.cost["questions"] += sum(questions)
        self.cost["seconds"] += max(seconds)
        if self.writes:
            line = {"cost": self.cost}
            self.run.rewrite("asked", [line])

    def check_alike(self, editor: Editor) -> None:
        """Raise MmeditError unless all processes have made the same edits, bit for bit."""
        if self.processes.world == 1:
            return
        given = self.processes.gather(_digest(editor))
        if len(set(given)) > 1:
            raise MmeditError(
                f"the processes have made different edits with {editor.name}",
                "share questions between equal machines, with the same OMP_NUM_THREADS, or use one process",
            )

    @contextmanager
    def activations(self, cache: ActivationCache) -> Iterator[None]:
        """Inside the block, what is cached was computed by all processes together."""
        if self.processes.world == 1:
            yield
            return
        folder = self._common_folder()
        try:
            cache.compute_together(folder, self.processes)
            yield
        finally:
            if self.writes:
                shutil.rmtree(folder, ignore_errors=True)

    def _common_folder(self) -> Path:
        """Return a new folder beside the records that all processes see."""
        home = self.run.folder
        name = ""
        if self.writes:
            place = home / "activations"
            made = new_temporary_folder(place)
            name = made.name
        encoded = name.encode()
        first, *_ = self.processes.gather(encoded)
        return home / first.decode()


def _place(line: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return where a line stands among the records of one process."""
    return line["group"], line["edits"], line["index"]


def _digest(editor: Editor) -> bytes:
    """Return a digest of the present edits."""
    import torch

    tensors, _ = editor.state()
    digest = hashlib.sha256()
    for name in sorted(tensors):
        here = tensors[name].detach().cpu()
        flat = here.contiguous().flatten()
        raw = flat.view(torch.uint8)
        values = raw.numpy()
        digest.update(name.encode())
        digest.update(values.tobytes())
    return digest.digest()
