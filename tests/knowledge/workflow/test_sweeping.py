"""Sweeps: which runs a file means, what becomes of those that fail, and engines whose workers die."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import SHAPES

from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.knowledge.evaluation.protocol import Protocol
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.knowledge.workflow import sweeping
from mmedit_cli.knowledge.workflow.engines import (
    Engine,
    InThisProcess,
    OnRay,
    OnSlurm,
    Resources,
)
from mmedit_cli.knowledge.workflow.evaluation import EvalOptions
from mmedit_cli.knowledge.workflow.options_in_a_file import from_run_file
from mmedit_cli.knowledge.workflow.run_file import as_run_file
from mmedit_cli.output import Output
from mmedit_cli.reports.sweeps import raise_failures

QUICK = {"data": str(SHAPES), "limit": 2, "protocols": ["tf_em"], "set": ["steps=1"]}
SWEEP = {"editors": ["ft"], "models": ["tiny-blip2"], "options": QUICK}


def write(folder: Path, **changed: object) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**SWEEP, **changed}))
    return file


def test_a_run_file_is_read_as_it_was_written():
    options = EvalOptions(
        "ft",
        ModelOptions("tiny-blip2", dtype="bfloat16"),
        "evqa",
        Protocol(20, (1, 20), batch_size=4),
        overrides=("steps=3",),
        hparams=Path("ft.yaml"),
        limit=7,
        ability=True,
    )
    values = as_run_file(options)
    again = from_run_file(values, "here", Path("records"))
    assert as_run_file(again) == values
    assert again.protocol == options.protocol
    assert again.model == options.model


def test_every_combination_is_a_run_like_that_of_eval(cli, tmp_path):
    other = {"editor": "ft", "set": ["steps=1", "learning_rate=1e-4"]}
    file = write(tmp_path, editors=["ft", other], seeds=[0, 3], orders=2)
    plan = sweeping.plan_sweep(file, tmp_path / "records")
    assert len(plan.jobs) == len({job.folder for job in plan.jobs}) == 8
    assert plan.jobs[1].name == "ft on tiny-blip2, seed 3, order 0"
    words = ("--model", "tiny-blip2", "--data", SHAPES, "--limit", 2, "--seed", 3)
    words += ("--protocols", "tf_em", "--set", "steps=1", "--dry-run", "--json")
    code, out, err = cli("eval", "ft", *words)
    assert code == 0, err
    named = Path(json.loads(out)["run"]).name
    assert named == Path(plan.jobs[1].folder).name
    code, out, _ = cli("sweep", file, "--dry-run", "--json")
    assert code == 0
    assert len(json.loads(out)["runs"]) == 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"editors": []}, "editors: an empty list"),
        ({"editors": [3]}, "editors[0]: neither a name nor a mapping with editor"),
        ({"editor": ["ft"]}, "unknown key 'editor' (did you mean editors?)"),
        ({"editors": ["fx"]}, "fx on tiny-blip2: unknown editor 'fx'"),
        ({"options": {"limti": 3}}, "unknown key 'limti' (did you mean limit?)"),
        ({"options": {"seed": 3}}, "options: seed has a list of its own: seeds"),
        ({"options": {"limit": "3"}}, "limit: expected a whole number, got '3'"),
        ({"seeds": [1, 1]}, "--seeds 1,1: 1 stands there twice"),
        ({"models": ["tiny-blip"]}, "--model tiny-blip: neither a known name"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(cli, tmp_path, changed, message):
    code, _, err = cli("sweep", write(tmp_path, **changed))
    assert code == 2
    assert message in err
    assert not (tmp_path / "records").exists()


def test_resources_make_sense():
    with pytest.raises(UserError, match="--workers 0: must be at least 1"):
        Resources(workers=0)


def test_what_fails_is_made_again_and_the_rest_is_left_alone(tmp_path, monkeypatch):
    """A run that fails once is made again; one that always fails is told at the end, and tried by the next sweep."""
    file = write(tmp_path, seeds=[0, 1])
    plan = sweeping.plan_sweep(file, tmp_path / "records")
    real, calls, broken = sweeping.run_evaluation, [], {0: 1, 1: 2}

    def run_evaluation(run, out, backbone):
        seed = run.options.seed
        calls.append(seed)
        if broken[seed]:
            broken[seed] -= 1
            raise RuntimeError("the disk is on fire")
        return real(run, out, backbone)

    monkeypatch.setattr(sweeping, "run_evaluation", run_evaluation)
    out = Output(quiet=True)
    report = sweeping.sweep(plan, out)
    assert calls == [0, 1, 0, 1]
    assert "failed" not in report["runs"][0]
    assert report["runs"][1]["failed"] == "RuntimeError: the disk is on fire"
    assert report["spreads"] == []
    with pytest.raises(MmeditError, match="1 run of 2 failed"):
        raise_failures(report)
    report = sweeping.sweep(plan, out)
    assert calls[4:] == [1]
    assert [run.get("failed") for run in report["runs"]] == [None, None]
    assert len(report["spreads"]) == 1
    raise_failures(report)
    assert sweeping.sweep(plan, out) == report
    assert len(calls) == 5


class Says(Engine):
    """Runs end as they are told to."""

    name = "says"

    def __init__(self, *said: str) -> None:
        self.said = list(said)
        self.sizes: list[int] = []

    def run(self, work, payloads):
        self.sizes.append(len(payloads))
        mine = [self.said.pop(0) for _ in payloads]
        yield from InThisProcess().run(lambda payload: mine.pop(0), payloads)


def test_wrong_input_is_not_tried_again(tmp_path):
    plan = sweeping.plan_sweep(write(tmp_path, seeds=[0, 1]), tmp_path / "records")
    engine = Says("!no such picture", "killed", "killed", "killed")
    failed = sweeping._make_all(plan, engine, 2, Output(quiet=True))
    assert failed == {0: "no such picture", 1: "killed"}
    assert engine.sizes == [2, 1, 1]


def dying():
    """What a worker does: it dies as a killed process the first time. Without a name to import it travels whole."""

    def work(payload) -> str:
        import os
        import signal
        from pathlib import Path

        mark = Path(payload["mark"])
        if payload["dies"] and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return payload["says"]

    return work


def payloads(folder: Path) -> list[dict]:
    """Three runs: one is finished, the worker of one dies, and one is wrong input."""
    said = ("", "", "!wrong")
    return [
        {"mark": str(folder / f"{i}"), "dies": i == 1, "says": text}
        for i, text in enumerate(said)
    ]


def assert_ends(engine: Engine, folder: Path) -> None:
    """Check what an engine says of these runs, and that the second time the one that died is finished."""
    work = dying()
    ended = {end.index: end for end in engine.run(work, payloads(folder))}
    assert ended[0].problem == ""
    assert "ended" in ended[1].problem
    assert not ended[1].lasting
    assert (ended[2].problem, ended[2].lasting) == ("wrong", True)
    (again,) = engine.run(work, payloads(folder)[1:2])
    assert again.problem == ""


@pytest.mark.slow
def test_a_worker_of_ray_that_is_killed_is_a_failure_and_can_be_made_again(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: the extra `ray`")
    assert_ends(OnRay(Resources(workers=2)), tmp_path)


@pytest.mark.slow
def test_a_job_of_submitit_that_is_killed_is_a_failure_and_can_be_made_again(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: extra `slurm`")
    engine = OnSlurm(Resources(), tmp_path / "jobs", cluster="local")
    assert_ends(engine, tmp_path)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_is_said(
    cli, tmp_path, monkeypatch, engine, package
):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    code, _, err = cli("sweep", write(tmp_path), "--on", engine)
    assert code == 2
    assert f"{package} is not installed" in err
    assert f"pip install 'mmedit-cli[{engine}]'" in err
