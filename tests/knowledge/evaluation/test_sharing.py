"""Several processes share the questions of an evaluation: the records are those of one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHAPES

from mmedit_cli.errors import MmeditError
from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.protocol import Protocol, evaluate_edits
from mmedit_cli.knowledge.evaluation.sharing import Conditions, Sharing
from mmedit_cli.knowledge.methods.ft import Ft, FtHparams
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.records import Run, shared_run
from mmedit_cli.runtime import Processes, is_first_process

CASES = load_cases(SHAPES)[:5]
PROTOCOL = Protocol(sequential=3, report_at=(1,), protocols=("tf_em",), chunk=1)
FT = FtHparams(learning_rate=1e-2, steps=2)


class Group:
    """Threads in the place of processes: sums and meetings, as a library for several machines has them."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._meeting = threading.Barrier(world, timeout=60)
        self._given: list[torch.Tensor] = [torch.zeros(0)] * world

    def member(self, rank: int) -> Processes:
        def add(tensor: torch.Tensor) -> torch.Tensor:
            self._given[rank] = tensor
            self._meeting.wait()
            total = torch.stack(self._given).sum(0).to(tensor.dtype)
            self._meeting.wait()
            return total

        def wait() -> None:
            self._meeting.wait()

        return Processes(rank, self.world, "cpu", add, wait)

    def all(self, run) -> list:
        """Return what `run(processes)` returns in each of them."""
        with ThreadPoolExecutor(self.world) as pool:
            members = [self.member(rank) for rank in range(self.world)]
            return list(pool.map(run, members))


@pytest.fixture(scope="module")
def models() -> list:
    """A model for each of two threads: made one after the other, as random weights come from one source."""
    return [load_backbone("tiny-blip2", device="cpu") for _ in range(2)]


def share(folder: Path, editor: Ft, processes: Processes) -> None:
    """Evaluate in `folder` as one of several processes."""
    with shared_run(folder, {}, {}, processes) as run:
        how = Conditions(processes=processes)
        evaluate_edits(editor, CASES, run, PROTOCOL, how)
        processes.wait()


def test_several_processes_write_what_one_does(tmp_path, models):
    one, two = tmp_path / "one", tmp_path / "two"
    editors = [Ft(model, FT) for model in models]
    share(one, editors[0], Processes())
    Group(2).all(lambda group: share(two, editors[group.rank], group))
    assert (one / "cases.jsonl").read_bytes() == (two / "cases.jsonl").read_bytes()
    for name in ("edits", "asked"):
        ours, theirs = (Run.view(folder).read(name) for folder in (one, two))
        assert without_seconds(ours) == without_seconds(theirs)
    assert [path.name for path in two.iterdir() if path.is_dir()] == ["base"]


def without_seconds(lines: list[dict]) -> list[dict]:
    found = json.loads(json.dumps(lines))
    for line in found:
        line.get("cost", line).pop("seconds")
    return found


def test_each_process_asks_its_own_part(tmp_path):
    shared = [Sharing(Run.view(tmp_path), Group(3).member(rank)) for rank in range(3)]
    for number in range(7):
        assert [part.is_mine(number) for part in shared].count(True) == 1
    assert [sum(part.is_mine(n) for n in range(6)) for part in shared] == [2, 2, 2]


def test_processes_that_edit_differently_are_told(tmp_path, models):
    editors = [
        Ft(model, replace(FT, steps=1 + rank)) for rank, model in enumerate(models)
    ]
    with pytest.raises(MmeditError, match="different edits"):
        Group(2).all(lambda group: share(tmp_path, editors[group.rank], group))
    for editor in editors:
        editor.undo()


def test_what_is_given_comes_to_all_in_order():
    group = Group(3)
    texts = [b"", b"second", "dritt\u00e4 \x00".encode()]
    found = group.all(lambda processes: processes.gather(texts[processes.rank]))
    assert found == [texts] * 3


@pytest.mark.parametrize(
    ("world", "rank", "first"), [("2", "0", True), ("2", "1", False), ("1", "1", True)]
)
def test_only_the_first_process_prints(monkeypatch, world, rank, first):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", rank)
    assert is_first_process() is first


@pytest.mark.slow
def test_two_processes_of_accelerate_report_what_one_reports(tmp_path):
    words = ["-m", "mmedit_cli", "eval", "ft", "--model", "tiny-blip2"]
    words += ["--data", SHAPES, "--sequential", "4", "--limit", "6", "--json"]
    words += ["--protocols", "tf_em", "--set", "steps=2"]
    launch = "-m accelerate.commands.launch --num_processes 2 --num_machines 1 --cpu"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0"
    reports = []
    for name, started in (("one", ""), ("two", launch)):
        command = [sys.executable, *started.split(), *map(str, words)]
        command += ["--records", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)  # once, not once a process
        assert report.pop("cost")["asked"]["questions"] > 0
        reports.append(json.dumps(report).replace(str(tmp_path / name), "records"))
    assert reports[0] == reports[1]
