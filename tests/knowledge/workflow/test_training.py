"""Training an editor: exact resume, several processes, the choice of the checkpoint, and the command."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHAPES, ForkedProgram, needs_fork
from safetensors import safe_open
from safetensors.torch import load_file

from mmedit_cli import registry
from mmedit_cli.errors import DataError, HparamsError, UserError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge import loading, trained_networks, training_loop
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.evaluation.protocol import PREPARING, Protocol
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.training_loop import (
    Conditions,
    alternatives,
    distinct,
    rate_at,
    train_networks,
)
from mmedit_cli.knowledge.workflow import evaluation, training
from mmedit_cli.output import Output
from mmedit_cli.records import Run
from mmedit_cli.reports import show
from mmedit_cli.runtime import Interrupts

SHORT = (
    "training.steps=8",
    "training.batch_size=2",
    "training.validate_every=3",
    "training.alternatives=1",
)
CASES = read_data(SHAPES).cases
TAUGHT, HELD_OUT = CASES[:6], CASES[10:12]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-blip2", device="cpu")


def make(backbone, *overrides, seed=0):
    cls = registry.editors.get("liveedit")
    path = registry.hparams_file("liveedit")
    return cls(
        backbone,
        load_hparams(path, cls.Hparams, variant=backbone.name, overrides=overrides),
        seed=seed,
    )


def train(backbone, folder, *overrides, seed=0, tick=lambda *_: None):
    editor = make(backbone, *SHORT, *overrides, seed=seed)
    with Run.open(folder, {"overrides": overrides}, {}) as run:
        report = train_networks(editor, TAUGHT, HELD_OUT, run, Conditions(tick=tick))
    return editor, report


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a training that nothing interrupts, and its report but for the cost."""
    folder = tmp_path_factory.mktemp("whole")
    _, report = train(backbone, folder)
    report.pop("cost")
    return folder, report


def test_the_same_seed_gives_the_same_networks_and_another_gives_others(
    backbone, whole, tmp_path
):
    train(backbone, tmp_path / "b")
    train(backbone, tmp_path / "c", seed=1)
    a, b, c = (
        load_file(folder / "last.safetensors")
        for folder in (whole[0], tmp_path / "b", tmp_path / "c")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(
        torch.equal(a[key], c[key]) for key in a if key.startswith("networks.")
    )


@pytest.mark.parametrize(
    ("saving", "moment"),
    [
        ("seldom", 3),
        ("always", 4),
        *(pytest.param("seldom", n, marks=pytest.mark.slow) for n in (1, 4, 7)),
        *(pytest.param("always", n, marks=pytest.mark.slow) for n in (1, 3, 7)),
    ],
)
def test_killed_and_continued_equals_uninterrupted(
    backbone, whole, tmp_path, monkeypatch, moment, saving
):
    monkeypatch.setattr(
        training_loop, "SAVE_SECONDS", 0.0 if saving == "always" else 1e9
    )
    steps = []

    def tick(what, n):
        if what == "steps":
            steps.append(n)
        if sum(steps) == moment and len(steps) > 1:
            raise Killed

    with pytest.raises(Killed):
        train(backbone, tmp_path / "cut", tick=tick)
    editor = assert_same_end(backbone, whole, tmp_path / "cut")
    logs = [
        (folder / "log.jsonl").read_bytes() for folder in (whole[0], tmp_path / "cut")
    ]
    assert logs[0] == logs[1]
    best = load_file(tmp_path / "cut" / "editor.safetensors")
    assert all(
        torch.equal(best[key], value)
        for key, value in editor.networks.state_dict().items()
    )


def cut_short(backbone, folder, interrupt) -> dict:
    """Train with an `interrupt(what, n)` as the tick, which ends it; return where the saved training is."""
    with pytest.raises(KeyboardInterrupt):
        train(backbone, folder, tick=interrupt)
    with safe_open(folder / "last.safetensors", "pt") as file:
        return file.metadata()


def assert_same_end(backbone, whole: tuple[Path, dict], cut: Path) -> Editor:
    """Continue the training in `cut`; it has to end as the `whole` one did. Return the editor that was trained."""
    uninterrupted, expected = whole
    editor, report = train(backbone, cut)
    report.pop("cost")
    assert report == expected
    for name in ("last", "editor"):
        one, other = (
            load_file(folder / f"{name}.safetensors") for folder in (uninterrupted, cut)
        )
        assert all(torch.equal(one[key], other[key]) for key in one), name
    return editor


@pytest.mark.parametrize("moment", [2, 3])
def test_control_c_saves_the_step_that_is_taken(
    backbone, whole, tmp_path, monkeypatch, moment
):
    monkeypatch.setattr(training_loop, "SAVE_SECONDS", 1e9)
    steps = []

    def interrupt(what, n):
        if what == "steps" and n:
            steps.append(n)
            if len(steps) == moment:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert cut_short(backbone, tmp_path / "cut", interrupt)["step"] == str(moment)
    assert signal.getsignal(signal.SIGINT) is before
    assert_same_end(backbone, whole, tmp_path / "cut")


def test_control_c_while_held_out_cases_are_asked_stops_at_once(
    backbone, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_loop, "SAVE_SECONDS", 1e9)
    scores = training_loop._EditorTraining._scores

    def interrupted(self):
        monkeypatch.setattr(training_loop._EditorTraining, "_scores", scores)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it did not stop")

    monkeypatch.setattr(training_loop._EditorTraining, "_scores", interrupted)
    saved = cut_short(backbone, tmp_path / "cut", lambda *_: None)
    assert (saved["step"], saved["looked"]) == ("3", "0")
    assert_same_end(backbone, whole, tmp_path / "cut")


def test_a_second_control_c_does_not_wait():
    said = []
    with pytest.raises(KeyboardInterrupt), Interrupts(said.append) as interrupts:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert interrupts.came
        assert "control-C again stops at once" in said[0]
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it waited")


def test_what_is_prepared_is_told_and_counted(backbone, tmp_path):
    told: dict[str, int] = {}

    def tick(what, n):
        told[what] = told.get(what, 0) + n

    train(backbone, tmp_path, tick=tick)
    taught = training_loop.with_alternatives(
        TAUGHT, make(backbone, *SHORT).hparams.training, 0
    )
    most = evaluation.count_queries(
        [*(case for cases in taught for case in cases), *HELD_OUT]
    )
    assert told["steps"] == 8
    assert 0 < told[PREPARING] <= most


def test_the_best_checkpoint_on_held_out_cases_is_kept(backbone, tmp_path, monkeypatch):
    scores = iter((0.2, 0.9, 0.4))
    monkeypatch.setattr(
        training_loop,
        "score_case",
        lambda *_: {"scores": {training_loop.SCORE: {"reliability": score[0]}}},
    )
    score = [0.0]
    states = []
    real = training_loop._EditorTraining._validate

    def validate(self):
        score[0] = next(scores)
        states.append(
            {k: v.clone() for k, v in self.editor.networks.state_dict().items()}
        )
        return real(self)

    monkeypatch.setattr(training_loop._EditorTraining, "_validate", validate)
    editor, report = train(backbone, tmp_path)
    assert report["best"]["step"] == 6
    assert [line["score"] for line in report["curve"]] == [0.2, 0.9, 0.4]
    assert all(
        torch.equal(states[1][key], value)
        for key, value in editor.networks.state_dict().items()
    )


def falling(monkeypatch, *scores: float) -> None:
    """Let the held-out cases score so at the looks after steps 1, 2, ...: the score depends on the step alone."""
    real = training_loop._EditorTraining._scores

    def at_this_step(self):
        real(self)
        return [{"reliability": scores[self.progress.step - 1]}]

    monkeypatch.setattr(training_loop._EditorTraining, "_scores", at_this_step)
    monkeypatch.setattr(training_loop._EditorTraining, "_by_answer", lambda *_: {})


PATIENT = ("training.validate_every=1", "training.patience=2")


def test_it_ends_when_nothing_has_risen_for_so_many_looks(
    backbone, tmp_path, monkeypatch
):
    falling(monkeypatch, 0.2, 0.5, 0.4, 0.6, 0.6, 0.5, 0.9, 0.9)
    _, report = train(backbone, tmp_path / "patient", *PATIENT)
    assert [line["step"] for line in report["curve"]] == [1, 2, 3, 4, 5, 6]
    assert (report["steps"], report["ended_early"]) == (6, True)
    assert report["best"]["step"] == 4
    with safe_open(tmp_path / "patient" / "editor.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["step"], metadata["steps"]) == ("4", "6")
    _, report = train(backbone, tmp_path / "all", PATIENT[0])
    assert (report["steps"], report["ended_early"]) == (8, False)
    assert report["best"]["step"] == 7


@pytest.mark.parametrize("moment", [6, pytest.param(3, marks=pytest.mark.slow)])
def test_a_patient_training_ends_the_same_when_it_was_killed(
    backbone, tmp_path, monkeypatch, moment
):
    falling(monkeypatch, 0.2, 0.5, 0.4, 0.6, 0.6, 0.5, 0.9, 0.9)
    _, expected = train(backbone, tmp_path / "whole", *PATIENT)
    steps = []

    def tick(what, n):
        if what == "steps":
            steps.append(n)
        if sum(steps) == moment and len(steps) > 1:
            raise Killed

    with pytest.raises(Killed):
        train(backbone, tmp_path / "cut", *PATIENT, tick=tick)
    _, report = train(backbone, tmp_path / "cut", *PATIENT)
    _, again = train(backbone, tmp_path / "cut", *PATIENT)
    for part in (expected, report, again):
        part.pop("cost")
    assert report == expected == again


@pytest.mark.parametrize("editor", ["liveedit", "unike"])
def test_no_patience_at_all_is_refused(editor):
    cls, path = registry.editors.get(editor), registry.hparams_file(editor)
    with pytest.raises(HparamsError, match="patience must be at least 1"):
        load_hparams(path, cls.Hparams, overrides=("training.patience=0",))


def test_answers_that_were_taught_are_told_apart_from_the_others(
    backbone, tmp_path, monkeypatch
):
    """Two of four held-out cases teach an answer that a training case teaches, one in other letters."""
    held_out = []
    for number, case in enumerate(CASES[10:14]):
        target = CASES[number].request.target
        answers = (target, f" {target.title()}.", "a zebra", "a gnu")
        request = replace(case.request, target=answers[number])
        held_out.append(replace(case, uid=f"own-{number}", request=request))
    right = {"own-0": 1.0, "own-1": 0.5, "own-2": 0.0, "own-3": 0.0}
    monkeypatch.setattr(training_loop, "distinct", list)
    monkeypatch.setattr(
        training_loop,
        "score_case",
        lambda case, *_: {
            "scores": {
                training_loop.SCORE: {
                    "reliability": right[case.uid],
                    **({"locality.text": 1.0} if case.uid == "own-0" else {}),
                }
            }
        },
    )
    editor = make(backbone, *SHORT, "training.steps=1")
    with Run.open(tmp_path, {}, {}) as run:
        report = train_networks(editor, CASES[:10], held_out, run)
    assert report["best"]["scores"] == {"reliability": 0.375, "locality.text": 1.0}
    assert report["best"]["answers"] == {
        "seen": {
            "cases": 2,
            "score": 0.875,
            "scores": {"reliability": 0.75, "locality.text": 1.0},
        },
        "unseen": {"cases": 2, "score": 0.0, "scores": {"reliability": 0.0}},
    }


def test_the_table_of_a_training_shows_both(capsys):
    report = {
        "editor": "liveedit",
        "model": {"name": "m"},
        "data": {"cases": 10},
        "best": {
            "step": 4,
            "score": 0.5,
            "scores": {"reliability": 0.5},
            "answers": {
                "seen": {"cases": 3, "score": 0.9, "scores": {"reliability": 0.9}},
                "unseen": {"cases": 1, "score": 0.1, "scores": {"reliability": 0.1}},
            },
        },
        "cost": {"seconds": 60.0},
        "hparams": {"training": {"patience": 5}},
        "steps": 9,
        "ended_early": True,
        "trained_parameters": 7,
        "validation_cases": 4,
        "validation_edits": 4,
        "run": "records/abc",
    }
    show.report(Output(), report)
    text = capsys.readouterr().out
    assert "seen answers n=3   unseen answers n=1" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["Rel", "50.0", "90.0", "10.0"] in rows
    assert ["mean", "50.0", "90.0", "10.0"] in rows
    assert "9 steps (ended after 5 looks without a rise) in 1.0 min" in text
    del report["best"]["answers"], report["ended_early"]  # as version 0.1 wrote it
    show.report(Output(), report)
    text = capsys.readouterr().out
    assert ["Rel", "50.0"] in [line.split() for line in text.splitlines()]
    assert "9 steps in 1.0 min" in text


def test_alternatives_teach_other_targets_and_change_nothing_else():
    case = CASES[0]
    others = alternatives(case, CASES, 3, seed=0)
    assert others == alternatives(case, CASES, 3, seed=0)
    assert {other.request.target for other in others} <= {
        c.request.target for c in CASES
    }
    for other in others:
        assert {q.target for qs in other.generality.values() for q in qs} == {
            other.request.target
        }
        assert other.locality == case.locality
        assert other.request.prompt == case.request.prompt


def test_held_out_cases_that_say_the_same_of_a_picture_count_once():
    case = next(case for case in CASES if case.generality.get("image"))
    other = case.generality["image"][0]
    by_another_picture = replace(
        case, uid="sibling", request=replace(case.request, image=other.image)
    )
    of_another_answer = replace(
        case,
        uid="other",
        request=replace(case.request, target="quite another"),
        generality={},
    )
    assert distinct([case, by_another_picture, of_another_answer]) == [
        case,
        of_another_answer,
    ]


def test_learning_rates(backbone):
    hp = make(backbone).hparams.training
    assert [rate_at(hp, step) for step in (0, 9_999)] == [1e-4, 1e-4]
    assert rate_at(hp, 10_000) == pytest.approx(1e-5)
    hp = make(
        backbone, "training.schedule=cosine", "training.warmup=10", "training.steps=110"
    ).hparams.training
    assert rate_at(hp, 0) == pytest.approx(1e-5)
    assert rate_at(hp, 60) == pytest.approx(5e-5)
    assert rate_at(hp, 109) < 1e-7


def test_one_case_is_too_few(backbone, tmp_path):
    with (
        Run.open(tmp_path, {}, {}) as run,
        pytest.raises(DataError, match="one case is too few"),
    ):
        train_networks(make(backbone, *SHORT), CASES[:1], CASES[1:2], run)


# -- the command --------------------------------------------------------------------------------------------------


def words(records, *more):
    flags = [word for override in SHORT for word in ("--set", override)]
    return (
        "train-editor",
        "liveedit",
        "--model",
        "tiny-blip2",
        "--data",
        SHAPES,
        "--records",
        records,
        *flags,
        *more,
    )


def test_own_networks_answer_where_they_are_asked_for(cli, tmp_path):
    code, text, err = cli(*words(tmp_path, "--json"))
    assert code == 0, err
    report = json.loads(text)
    assert report["data"]["cases"] == 22
    assert report["validation"]["cases"] == 2, "every twentieth of 24 is held out"
    assert "step 8/8" in err
    assert "questions are run through the frozen layers once" in err
    assert "already done" in cli(*words(tmp_path))[2]
    run = report["run"].rpartition("/")[2]
    of_model = (
        "--model",
        "tiny-blip2",
        "--data",
        SHAPES,
        "--limit",
        2,
        "-n",
        2,
        "--records",
        tmp_path,
    )
    code, _, err = cli("eval", "liveedit", *of_model)
    assert (code, "no networks come along" in err) == (2, True)
    assert f"--checkpoint latest takes the newest of your own trainings ({run})" in err
    code, _, err = cli("eval", *of_model)
    assert (code, f"--checkpoint latest takes your newest training, {run}" in err) == (
        2,
        True,
    )
    code, text, err = cli("eval", *of_model[2:], "--checkpoint", "latest", "--json")
    assert code == 0, err
    assert "no EDITOR: liveedit on tiny-blip2" in err
    found = json.loads(text)
    assert found["hparams"]["edit_layer"] == 3
    assert "training" not in found["hparams"], (
        "how the networks were trained is told by their own run"
    )
    answered = found["networks"]
    assert (answered["source"], answered["run"], answered["steps"]) == ("run", run, 8)
    assert answered["trained_on"] == report["data"]["name"]
    for named in (run, run[:6], report["run"], f"{report['run']}/editor.safetensors"):
        code, text, err = cli(
            "eval", "liveedit", *of_model, "--checkpoint", named, "--json"
        )
        assert code == 0, err
        assert json.loads(text)["checkpoint"] == found["checkpoint"]
    assert (
        f"networks: run {run}, trained 8 steps on"
        in cli("eval", *of_model[2:], "--checkpoint", "latest")[1]
    )
    code, _, err = cli("eval", "liveedit", *of_model, "--checkpoint", "nowhere")
    assert (
        code,
        "neither a file, nor the folder or the id of a finished training" in err,
    ) == (2, True)
    assert run in err
    code, _, err = cli("eval", "ft", *of_model, "--checkpoint", "latest")
    assert (code, "ft has no networks" in err) == (2, True)
    code, text, _ = cli("report", "--records", tmp_path)
    assert "trained" in text


def test_what_comes_along_stays_the_default(tmp_path):
    """Whatever was trained here: own networks are never taken unasked."""
    run = (
        tmp_path
        / "train-editor"
        / "liveedit"
        / "mini-blip2"
        / "shapes"
        / "0123456789ab"
    )
    run.mkdir(parents=True)
    shipped = trained_networks.find_networks("liveedit", "mini-blip2", tmp_path)
    shutil.copyfile(shipped.path, run / "editor.safetensors")
    (run / "report.json").write_text(
        '{"editor": "liveedit", "model": {"name": "mini-blip2"}, "steps": 20}'
    )
    assert trained_networks.find_networks("liveedit", "mini-blip2", tmp_path) == shipped
    assert trained_networks.default_editor(tmp_path) == ("liveedit", "mini-blip2")
    assert (
        trained_networks.networks_line(shipped.facts())
        == "networks: come along with mmedit, trained 700 steps"
    )
    own = trained_networks.find_networks("liveedit", "mini-blip2", tmp_path, "latest")
    assert (
        trained_networks.networks_line(own.facts())
        == "networks: run 0123456789ab, trained 20 steps, kept at step 700"
    )
    assert trained_networks.default_editor(tmp_path, checkpoint="0123") == (
        "liveedit",
        "mini-blip2",
    )


def test_an_untrained_editor_is_no_surprise(cli, tmp_path):
    code, _, err = cli(
        "eval",
        "liveedit",
        "--model",
        "tiny-llava",
        "--data",
        SHAPES,
        "--records",
        tmp_path,
    )
    assert code == 2
    assert "liveedit has not been trained for tiny-llava" in err
    assert "mmedit train-editor liveedit --model tiny-llava" in err
    code, _, err = cli(
        "train-editor", "ft", "--model", "tiny-llava", "--records", tmp_path
    )
    assert code == 2
    assert "ft needs no training" in err
    assert not list(tmp_path.iterdir())


def test_the_evaluation_side_is_never_trained_on():
    options = training.EditorTrainingOptions(
        "liveedit", loading.ModelOptions("tiny-blip2"), "emojikb", limit=50
    )
    name, cases, held_out = training.training_cases(options)
    assert name == "emojikb"
    assert {case.uid.partition("-")[0] for case in cases} == {"train"}
    assert {case.uid.partition("-")[0] for case in held_out} == {"val"}
    with pytest.raises(UserError, match="too few to hold some out"):
        training.training_cases(
            training.EditorTrainingOptions("x", options.model, str(SHAPES), limit=5)
        )


OF_ONE_STEP = (
    *("train-editor", "liveedit", "--model", "tiny-blip2", "--data", SHAPES),
    *("--device", "cpu", "--set", "training.steps=1"),
    # with patience the processes agree after each look whether it goes on
    *("--set", "training.patience=1"),
    *("--set", "training.validate_every=1", "--set"),
)


def assert_same_gradients(one: Path, two: Path) -> None:
    """Check that the single step of two trainings had the same gradient, up to the order of additions."""
    found = []
    for records in (one, two):
        tensors = load_file(next(records.rglob("last.safetensors")))
        # a tenth of the gradient
        moments = [key for key in tensors if key.endswith(".exp_avg")]
        assert moments
        found.append(torch.cat([tensors[key].flatten() for key in sorted(moments)]))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


@needs_fork
def test_two_processes_equal_one_with_the_doubled_batch(cli, tmp_path):
    """On the CPU (gloo), with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (*OF_ONE_STEP, "training.batch_size=4", "--records", tmp_path / "two")
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    running = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        place = {"RANK": rank, "LOCAL_RANK": rank}
        running.append(ForkedProgram(tmp_path / rank, *words, **group, **place))
    words = (*OF_ONE_STEP, "training.batch_size=8", "--records", tmp_path / "one")
    assert cli(*words)[0] == 0
    for program in running:
        code, _, err = program.wait()
        assert code == 0, err
    assert_same_gradients(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_torchrun_starts_two_processes(cli, tmp_path):
    words = (*OF_ONE_STEP, "training.batch_size=4", "--records", tmp_path / "two")
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *launch, "-m", "mmedit_cli", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    words = (*OF_ONE_STEP, "training.batch_size=8", "--records", tmp_path / "one")
    assert cli(*words)[0] == 0
    assert_same_gradients(tmp_path / "one", tmp_path / "two")


def test_an_ablation_has_networks_that_stay_random(tmp_path):
    request = evaluation.EvalOptions(
        "liveedit",
        loading.ModelOptions("mini-blip2", device="cpu"),
        str(SHAPES),
        Protocol(),
        records=tmp_path,
    )
    trained = evaluation.plan_evaluation(request)
    random = evaluation.plan_evaluation(replace(request, checkpoint="untrained"))
    assert random.networks is None
    assert random.config["checkpoint"] == "untrained"
    assert random.folder != trained.folder
    with pytest.raises(UserError, match="ft has no networks"):
        evaluation.plan_evaluation(
            replace(request, editor="ft", checkpoint="untrained")
        )
