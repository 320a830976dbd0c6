"""The command line as a user meets it: results, errors with a place and a way out, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHAPES, ForkedProgram, needs_fork

from mmedit_cli.catalog import default_model
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.output import Output

EVAL = (
    "eval",
    "ft",
    "--model",
    "tiny-blip2",
    "--data",
    SHAPES,
    "--limit",
    8,
    "--sequential",
    8,
    "--report-at",
    "1,8",
    "--max-new-tokens",
    2,
)
QUICK = (
    *EVAL,
    *("--limit", 4, "--sequential", 4, "--report-at", "1,4"),
    *("--set", "steps=5"),
)
COMMANDS = ("eval", "edit", "ask", "list", "report", "doctor", "image-edit")


def spoiled(tmp_path: Path, line: int, **request: object) -> Path:
    """A copy of the small data set with one request changed."""
    folder = shutil.copytree(SHAPES, tmp_path / "data")
    records = [
        json.loads(text) for text in (folder / "cases.jsonl").read_text().splitlines()
    ]
    records[line - 1]["request"].update(request)
    (folder / "cases.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    return folder


def test_eval_prints_a_table_and_json_has_the_same_numbers(cli, tmp_path):
    code, table, talk = cli(*QUICK)
    assert code == 0
    assert (
        "loading tiny-blip2: random weights, which know nothing; only for trying a command"
        in talk
    )
    code, text, talk = cli(*QUICK, "--json")
    assert (code, "already done" in talk) == (0, True)
    report = json.loads(text)
    rows = [line.split() for line in table.splitlines()]
    (reliability,) = [row for row in rows if row[:2] == ["ar", "Rel"]]
    scores = [
        milestone["scores"]["ar"]["reliability"] for milestone in report["milestones"]
    ]
    assert reliability[2] == f"{100 * scores[-1]['before']:.1f}"
    assert reliability[3::2] == [f"{100 * score['mean']:.1f}" for score in scores]
    assert [m["edits"] for m in report["milestones"]] == [1, 4]
    assert [s["n"] for s in scores] == [1, 4]
    for milestone in report["milestones"]:
        for columns in milestone["scores"].values():
            for score in columns.values():
                assert 0 <= score["ci95"][0] <= score["mean"] <= score["ci95"][1] <= 1
    assert report["versions"]["torch"]
    assert report["environment"]["device"]
    assert (tmp_path / "records").exists()


def test_several_runs_make_one_table_with_their_spread(cli, tmp_path):
    words = (*EVAL, "--protocols", "ar", "--orders", "2")
    code, table, talk = cli(*words)
    assert (code, "run 2 of 2: seed 0, order 1" in talk) == (0, True)
    code, text, talk = cli(*words, "--json")
    assert (code, "already done" in talk) == (0, True)
    report = json.loads(text)
    assert len(report["runs"]) == 2
    over = report["milestones"][-1]["scores"]["ar"]["reliability"]["over_runs"]
    figures = [over[key] for key in ("mean", "sd", "min", "max")]
    rows = [line.split() for line in table.splitlines()]
    assert ["ar", "Rel", *(f"{100 * figure:.1f}" for figure in figures)] in rows
    assert "sd over 2 runs" in table
    assert "2 runs: seeds 0; orders 2" in table
    folder = tmp_path / "records" / "eval-spread" / "ft" / "tiny-blip2" / "shapes"
    (run,) = folder.iterdir()
    assert cli("report", run)[1] == table
    plan = json.loads(cli(*words, "--dry-run", "--json")[1])
    assert [made["order"] for made in plan["runs"]] == [0, 1]


def test_force_does_it_again_and_ends_the_same(cli):
    first = json.loads(cli(*QUICK, "--json")[1])
    code, text, talk = cli(*QUICK, "--json", "--force")
    again = json.loads(text)
    assert (code, "already done" in talk) == (0, False)
    assert again.pop("cost") != first.pop("cost")
    assert again == first


def test_report_and_list(cli, tmp_path):
    assert cli("report")[1].startswith("no finished runs")
    cli(*QUICK)
    code, text, _ = cli("report", "--json")
    (run,) = json.loads(text)
    assert (code, run["editor"], run["edits"]) == (0, "ft", 4)
    assert (run["protocol"], type(run["reliability"])) == ("ar", float)
    assert cli("report", run["run"])[1] == cli(*QUICK)[1]
    assert cli("report", tmp_path)[0] == 2
    code, text, _ = cli("list", "--json")
    listed = json.loads(text)
    assert "ft" in [row["editor"] for row in listed["editors"]]
    assert {"tiny-blip2", "llava-1.5-7b"} <= {row["model"] for row in listed["models"]}
    assert "Fine-tuning" in cli("list")[1]


def test_dry_run_prints_the_plan_and_writes_nothing(cli, tmp_path):
    code, text, _ = cli(*EVAL, "--dry-run", "--json", "--set", "steps=3")
    plan = json.loads(text)
    assert (code, plan["hparams"]["steps"], plan["groups"]) == (0, 3, 1)
    assert not (tmp_path / "records").exists()
    assert "steps: 50" in cli(*EVAL, "--dry-run")[1]


def test_scripts_need_no_bare_python(tmp_path):
    for name, program in (
        ("dirname", shutil.which("dirname")),
        ("python3", sys.executable),
    ):
        (tmp_path / name).symlink_to(str(program))
    found = {
        **os.environ,
        "PATH": str(tmp_path),
        "MODELS": " ",
        "RECORDS": str(tmp_path / "none"),
    }
    found.pop("PYTHON", None)
    script = ROOT / "scripts" / "compare_editors.sh"
    done = subprocess.run(
        [str(shutil.which("bash")), script], env=found, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "no reports" in done.stderr


def test_no_hint_goes_round_in_a_circle(cli):
    words = ("eval", "ft", "--model", "tiny-llava", "--data", SHAPES, "--limit", 1)
    code, _, err = cli(*words, "--template", "chat")
    assert (code, "hint: leave --template chat out" in err) == (2, True)
    code, _, err = cli(*words, "--template", "plain")
    assert (code, "hint: leave --template out" in err) == (2, True)


def test_progress_is_told_where_no_bar_can_be_drawn(capsys, monkeypatch):
    times = iter([0.0, 5.0, 11.0, 12.0, 45.0, 200.0])
    monkeypatch.setattr(
        "mmedit_cli.output.time", SimpleNamespace(monotonic=lambda: next(times))
    )
    with Output().progress({"steps": 100, "looks": 3}) as tick:
        tick("steps", 10)  # at 5 s: too early for a word
        tick("steps", 10)
        tick("steps", 10)  # at 12 s: one was said just now
        tick("steps", 50)
        tick("looks", 3)
    assert capsys.readouterr().err.splitlines() == [
        "steps: 20 of 100, about 48 s left",
        "steps: 80 of 100, about 11 s left",
        "looks: 3 of 3",
    ]
    times = iter([0.0, 100.0])
    with Output(quiet=True).progress({"steps": 1}) as tick:
        tick("steps", 1)
    assert capsys.readouterr().err == ""


def test_ask(cli):
    words = (
        "ask",
        "--model",
        "tiny-llava",
        "--image",
        SHAPES / "solid/red-star.png",
        "What is this?",
    )
    code, text, _ = cli(*words)
    answer = json.loads(cli(*words, "--json")[1])["answer"]
    assert (code, text) == (0, answer + "\n")
    expected = load_backbone("tiny-llava", device="cpu")
    from mmedit_cli.types import Query

    assert (
        answer
        == expected.generate(
            [Query("What is this?", image=SHAPES / "solid/red-star.png")]
        )[0]
    )


def test_doctor_of_what_no_editor_answers(cli, tmp_path):
    code, text, _ = cli("doctor", "emojikb-concepts", "--json")
    checks = {row["check"]: row["found"] for row in json.loads(text)}
    assert (code, checks["photos"]) == (0, "80")
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "1.png").write_bytes(b"no picture")
    (tmp_path / "subjects.yaml").write_text("subjects: {rex: dog}")
    code, text, _ = cli("doctor", tmp_path, "--json")
    assert (code, "1.png: not a readable image" in json.loads(text)[-1]["found"]) == (
        1,
        True,
    )


@pytest.mark.slow
def test_doctor_of_all_that_comes_along(cli):
    code, text, _ = cli("doctor", "emojikb-edits:val", "--json")
    checks = [row["check"] for row in json.loads(text)]
    assert (code, sum(check.startswith("pairs ") for check in checks)) == (0, 14)
    code, text, _ = cli("doctor", "emojikb", "--json")
    checks = {row["check"]: row["found"] for row in json.loads(text)}
    assert code == 0
    assert (
        checks["leaks train-eval"]
        == "concepts 0, images 0, requests 0, locality 0, crossed 0"
    )
    assert checks["licence openmoji"].endswith("CC-BY-SA-4.0")


def test_doctor(cli, tmp_path):
    code, text, _ = cli("doctor", SHAPES, "--json")
    checks = {row["check"]: row for row in json.loads(text)}
    assert code == 0
    assert checks["cases"]["found"] == "24"
    assert checks["images"]["found"] == "72 distinct, 0 unusable"
    folder = shutil.copytree(SHAPES, tmp_path / "data")
    (folder / "solid/red-star.png").write_bytes(b"no image")
    code, text, _ = cli("doctor", folder)
    assert code == 1
    assert "red-star.png: not a readable image" in " ".join(text.split())
    (folder / "cases.jsonl").write_text("{\n")
    assert cli("doctor", folder)[0] == 1


# -- bad input --------------------------------------------------------------------------------------------------


def assert_refused(cli, tmp_path, words, *parts: str) -> None:
    """One `error:` line with all parts, exit 2, no traceback, and no run."""
    code, out, err = cli(*words)
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1), err
    for part in parts:
        assert part in errors[0]
    assert all(
        line.startswith(("error: ", "hint: ", "loading ", "hyper-parameters of "))
        for line in lines
    ), err
    assert not (tmp_path / "records").exists()


def test_a_wrong_key_is_named_with_its_near_miss(cli, tmp_path):
    parts = ("learning_rte=1", "hparams/ft.yaml", "learning_rate")
    assert_refused(cli, tmp_path, (*EVAL, "--set", "learning_rte=1"), *parts)


def test_a_broken_image_path(cli, tmp_path):
    folder = spoiled(tmp_path, 3, image="solid/gone.png")
    assert_refused(
        cli,
        tmp_path,
        (*EVAL, "--data", folder),
        "cases.jsonl:3",
        "request.image",
        "gone.png: no such image",
    )


def test_an_image_that_is_none(cli, tmp_path):
    folder = spoiled(tmp_path, 3)
    (folder / "solid/red-star.png").write_bytes(b"no image")
    assert_refused(
        cli,
        tmp_path,
        (*EVAL, "--data", folder, "--limit", "24"),
        "cases.jsonl:",
        "red-star.png: not a readable image",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("prompt", ""), ("prompt", " "), ("target", ""), ("target", "\n")],
)
def test_an_empty_prompt_or_target(cli, tmp_path, key, value):
    folder = spoiled(tmp_path, 5, **{key: value})
    assert_refused(
        cli, tmp_path, (*EVAL, "--data", folder), "cases.jsonl:5", f"request.{key}"
    )


def test_a_target_that_tokenises_to_nothing(cli, tmp_path, monkeypatch):
    from tokenizers import normalizers

    from mmedit_cli.knowledge.models.shared import tiny

    real = tiny.tokenizer

    def stripping():  # as tokenizers with a strict normaliser do
        made = real()
        made.backend_tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Replace("\u00ad", ""),
                normalizers.Strip(left=False, right=True),
            ]
        )
        return made

    monkeypatch.setattr(tiny, "tokenizer", stripping)
    folder = spoiled(tmp_path, 5, target="\u00ad")
    assert_refused(
        cli, tmp_path, (*EVAL, "--data", folder), "cases.jsonl:5", "has no tokens"
    )


def test_a_model_folder_without_weights(cli, tmp_path):
    backbone = load_backbone("tiny-blip2", device="cpu")
    folder = tmp_path / "model"
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    assert_refused(cli, tmp_path, (*EVAL, "--model", folder), str(folder), "no weights")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--model", "tiny-blp2"), "did you mean tiny-blip2?"),
        (("--data", "nowhere"), "nowhere: no such file, folder or data set"),
        (("--sequential", "99"), "--sequential 99: "),
        (("--report-at", "9"), "--report-at 9"),
        (("--report-at", "one"), "--report-at one"),
        (("--protocols", "arr"), "--protocols arr"),
        (("--device", "tpu"), "--device tpu"),
        (("--dtype", "int3"), "--dtype int3"),
        (("--hparams", "nowhere.yaml"), "nowhere.yaml"),
        (("--set", "steps=many"), "steps"),
        (("--set", "steps=0"), "steps must be above 0"),
        (("--edit-batch", "0"), "--edit-batch 0: must be at least 1"),
        (("--orders", "0"), "--orders 0: must be at least 1"),
        (
            ("--orders", "2", "--limit", "1", "-n", "1", "--report-at", "1"),
            "of 1 cases there are 1",
        ),
        (("--seeds", "0,1,0"), "--seeds 0,1,0: 0 stands there twice"),
        (("--seeds", "0,one"), "--seeds 0,one: not whole numbers"),
        (("--seeds", "0,-1"), "--seeds 0,-1: -1 is below 0"),
        (("--seeds", "0,1", "--seed", "2"), "--seed 2 and --seeds 0,1"),
        (("--intervals-by", "concept"), "--intervals-by concept: "),
        (("--intervals-by", "picture"), "must be concept or case"),
    ],
)
def test_wrong_values(cli, tmp_path, words, part):
    assert_refused(cli, tmp_path, (*EVAL, *words), part)


def test_unknown_editor_option_and_command(cli):
    code, _, err = cli("eval", "ftt", "--model", "tiny-blip2", "--data", SHAPES)
    assert (code, "did you mean ft?" in err) == (2, True)
    assert cli(*EVAL, "--sequentail", 3)[0] == 2
    assert cli("evaluate")[0] == 2


def test_without_a_model_and_data_those_that_come_along_are_used(cli, tmp_path):
    code, text, talk = cli(
        "eval", "ft", "--limit", 2, "--sequential", 2, "--set", "steps=1", "--json"
    )
    report = json.loads(text)
    assert (code, report["data"]["name"], report["model"]["name"]) == (
        0,
        "emojikb",
        default_model(),
    )
    assert f"no --model: {default_model()}" in talk
    code, _, err = cli("eval", "ft", "--set", "learning_rte=1")
    assert code == 2
    for part in ("learning_rte", "hparams/ft.yaml", "learning_rate"):
        assert part in err


def test_a_connector_edit_without_an_image_names_the_request(cli, tmp_path):
    folder = spoiled(tmp_path, 2, image=None)
    code, _, err = cli(*QUICK, "--data", folder, "--set", "target=connector")
    assert (code, "needs an image" in err, "Traceback" in err) == (2, True, False)


def test_debug_shows_the_traceback(cli):
    from mmedit_cli.errors import UnknownName

    with pytest.raises(UnknownName):
        cli("eval", "ftt", "--model", "tiny-blip2", "--data", SHAPES, "--debug")


# -- the program as a process -----------------------------------------------------------------------------------


@needs_fork
def test_killed_for_good_the_same_command_ends_with_the_same_report(cli, tmp_path):
    words = (*QUICK, "--json", "--device", "cpu", "--records")
    expected = json.loads(cli(*words, tmp_path / "whole")[1])
    killed = ForkedProgram(tmp_path, *words, tmp_path / "killed")
    while not killed.ended() and not list((tmp_path / "killed").rglob("cases.jsonl")):
        time.sleep(0.001)
    killed.send(signal.SIGKILL)
    code, _, _ = killed.wait()
    assert code == -signal.SIGKILL, "finished before it could be killed"
    _, out, err = cli(*words, tmp_path / "killed")
    report = json.loads(out)
    assert "already done" not in err
    assert report.pop("cost")["edits"] == expected.pop("cost")["edits"]
    assert report == expected


@needs_fork
def test_interrupted_by_the_keyboard(tmp_path):
    words = (*EVAL, "--records", tmp_path / "records", "--set", "steps=200")
    running = ForkedProgram(tmp_path, *words)
    while not running.ended() and not list(tmp_path.rglob("edits.jsonl")):
        time.sleep(0.001)
    running.send(signal.SIGINT)
    code, _, err = running.wait()
    assert (code, "Traceback" in err) == (130, False)
    assert "the same command continues" in err


@pytest.mark.slow
def test_a_process_started_anew_is_interrupted_by_the_keyboard(tmp_path):
    words = (*EVAL, "--records", tmp_path, "--set", "steps=2000")
    command = [sys.executable, "-m", "mmedit_cli", *map(str, words)]
    heard = signal.SIGINT, signal.SIG_DFL  # what runs behind a shell ignores it
    with subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(*heard),
    ) as running:
        while running.poll() is None and not list(tmp_path.rglob("edits.jsonl")):
            time.sleep(0.001)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=120)
    assert (running.returncode, "Traceback" in err) == (130, False)
    assert "the same command continues" in err


@needs_fork
def test_two_writers_are_refused(cli, tmp_path):
    words = (*EVAL, "--records", tmp_path / "records", "--set", "steps=200")
    first = ForkedProgram(tmp_path, *words)
    while not first.ended() and not list(tmp_path.rglob("run.yaml")):
        time.sleep(0.001)
    first.send(signal.SIGSTOP)  # alive, and in no hurry
    code, _, err = cli(*words)
    first.send(signal.SIGKILL)
    assert first.wait()[0] == -signal.SIGKILL, "finished before it could be stopped"
    assert code == 2
    assert "another process is writing" in err


@pytest.mark.parametrize("words", [(), *((command,) for command in COMMANDS)])
def test_help_loads_nothing_heavy(words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mmedit_cli", *words, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if "|" in line
    }
    assert "typer" in loaded
    heavy = {
        "torch",
        "transformers",
        "diffusers",
        "peft",
        "accelerate",
        "numpy",
        "PIL",
        "huggingface_hub",
        "yaml",
    }
    assert not loaded & heavy
    # the command of reports is several
    assert not words or "--json" in done.stdout or "compare" in done.stdout


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_they_are_told_otherwise(
    cli, monkeypatch, given, used
):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert cli("--version")[0] == 0
    assert os.environ["OMP_WAIT_POLICY"] == used


def test_version(cli):
    from mmedit_cli import __version__

    assert cli("--version")[:2] == (0, f"mmedit {__version__}\n")
    assert re.match(r"\d+\.\d+\.\d+", __version__)


def test_a_finished_evaluation_keeps_no_state_to_continue_from(
    cli, tmp_path, monkeypatch
):
    """With ft it is as large as a model, and on a slow machine it was saved."""
    from mmedit_cli.knowledge.evaluation import protocol
    from mmedit_cli.records import Run

    monkeypatch.setattr(protocol, "SAVE_SECONDS", 0.0)
    saved = []
    save = Run.save_tensors
    monkeypatch.setattr(
        Run,
        "save_tensors",
        lambda run, *what: saved.append(what[0]) or save(run, *what),
    )
    words = (
        "eval",
        "ft",
        "--model",
        "tiny-blip2",
        "--data",
        SHAPES,
        "--limit",
        "2",
        "--set",
        "steps=1",
    )
    code, _, err = cli(*words, "--records", tmp_path / "records")
    assert code == 0, err
    names = {path.name for path in tmp_path.rglob("records/eval/**/*")}
    assert "report.json" in names
    assert "editor" in saved
    assert "editor.safetensors" not in names
