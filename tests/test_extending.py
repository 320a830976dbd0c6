"""Plug-ins: the examples are copied to another folder, and everything there is works with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mmedit_cli import registry
from mmedit_cli.catalog import find_model, named_models
from mmedit_cli.errors import UserError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.plugins import VARIABLE

METHOD_TESTS = "tests/knowledge/methods/test_editor_contract.py"
FAMILY_TESTS = "tests/knowledge/models/test_family_contract.py"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the examples and nothing else."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(
        ROOT / "examples", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def run_tests(copied: Path, *words: str) -> str:
    """Run tests in a process of their own, with all three examples as plug-ins; return the last line."""
    names = ("nudge.py", "intern_vl.py", "sums.py")
    plugins = os.pathsep.join(str(copied / name) for name in names)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=ROOT,
        env={**os.environ, VARIABLE: plugins, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_examples_pass_their_own_tests(copied):
    files = sorted(map(str, copied.glob("test_*.py")))
    assert len(files) == 3
    last = run_tests(copied, "-c", str(ROOT / "pyproject.toml"), *files)
    assert last.startswith("3 passed")


@pytest.mark.slow
def test_the_editor_keeps_the_contract_of_editors(copied):
    last = run_tests(copied, METHOD_TESTS, "-k", "nudge and tiny-blip2")
    assert int(last.split()[0]) >= 10
    assert "failed" not in last


@pytest.mark.slow
def test_the_family_keeps_the_contract_of_families(copied):
    last = run_tests(copied, FAMILY_TESTS, "-m", "", "-k", "tiny-intern-vl")
    assert int(last.split()[0]) >= 20
    assert "failed" not in last


def test_editor_family_and_data_work_together_on_the_command_line(cli, copied):
    names = ("nudge.py", "intern_vl.py", "sums.py")
    plugins = [word for name in names for word in ("--plugin", copied / name)]
    code, text, errors = cli(
        *(*plugins, "eval", "nudge", "--model", "tiny-intern-vl", "--data", "sums"),
        *("--sequential", 2, "--limit", 2, "--protocols", "tf_liveedit"),
        *("--set", "steps=30", "--device", "cpu", "--json"),
    )
    assert code == 0, errors
    report = json.loads(text)
    assert (report["editor"], report["model"]["family"]) == ("nudge", "intern-vl")
    assert report["hparams"]["steps"] == 30
    assert report["data"]["name"] == "sums"
    scores = report["milestones"][-1]["scores"]["tf_liveedit"]
    assert scores["reliability"]["mean"] > scores["reliability"]["before"]
    assert VARIABLE not in os.environ, "a plug-in is there for one command"


def test_edits_of_a_plugin_are_kept_and_taken_back(cli, copied, tmp_path):
    plugin = ("--plugin", copied / "nudge.py")
    ledger = tmp_path / "kept"
    code, _, _ = cli(
        *(*plugin, "edit", "nudge", "--model", "tiny-llava", "--device", "cpu"),
        *("--prompt", "What is the capital of Peru?", "--target", "Lima"),
        *("--into", ledger),
    )
    assert code in (0, 1), "1: kept, but random weights do not say the answer yet"
    code, text, _ = cli(*plugin, "edits", "list", ledger, "--json")
    assert (code, json.loads(text)["edits"]) == (0, 1)
    code, text, _ = cli(*plugin, "edits", "undo", ledger, "all", "--device", "cpu")
    assert (code, text) == (0, "undone: 1; 0 active\n")


def test_plugins_are_listed_with_what_they_say_of_themselves(cli, copied, monkeypatch):
    names = [str(copied / name) for name in ("nudge.py", "intern_vl.py", "sums.py")]
    monkeypatch.setenv(VARIABLE, os.pathsep.join(names))
    code, text, _ = cli("list", "--json")
    assert code == 0
    found = json.loads(text)
    (nudge,) = [row for row in found["editors"] if row["editor"] == "nudge"]
    assert nudge["summary"].startswith("Nudge: a few steps")
    assert nudge["trained first"] == "no"
    assert "intern-vl" in nudge["models"]
    (tiny,) = [row for row in found["models"] if row["model"] == "tiny-intern-vl"]
    assert tiny["family"] == "intern-vl"
    assert "sums" in [row["data"] for row in found["data"]]
    assert find_model("tiny-intern-vl").family == "intern-vl"
    assert cli("doctor", "sums")[1].count("100") == 1


def test_help_and_list_import_no_plugin(tmp_path):
    (tmp_path / "loud.py").write_text(
        '"""Loud: says so."""\nraise SystemExit(7)\nEDITOR = None\n'
    )
    (tmp_path / "still.py").write_text(
        '"""Still: draws."""\nraise SystemExit(7)\nPERSONALIZER = None\n'
    )
    code = (
        "import sys\nfrom mmedit_cli.app import main\n"
        "assert main(['eval', 'loud', '--help']) == 0\n"
        "assert main(['eval', 'still', '--help']) == 0\n"
        "assert main(['list']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    plugins = os.pathsep.join(map(str, (tmp_path / "loud.py", tmp_path / "still.py")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, VARIABLE: plugins},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    of_loud, of_still = done.stdout.split("Usage:")[1:]
    assert "--sequential" in of_loud
    assert "--sequential" not in of_still
    assert "Loud: says so." in of_still, "the list follows"


def test_a_package_is_found_by_its_entry_points(tmp_path, monkeypatch):
    package = tmp_path / "site" / "nudges"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("imported")\n')
    shutil.copy(ROOT / "examples" / "nudge.py", package / "gentle.py")
    shutil.copy(ROOT / "examples" / "nudge.yaml", package / "gentle_nudge.yaml")
    about = tmp_path / "site" / "nudges-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nudges\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[mmedit.editors]\ngentle-nudge = nudges.gentle\nclass-nudge = nudges.gentle:Nudge\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")

    editors = registry.editors
    assert {"gentle-nudge", "class-nudge", "ft"} <= set(editors.names())
    assert editors.summary("gentle_nudge").startswith("Nudge: a few steps")
    assert editors.fact("class-nudge", "plain") is True
    with pytest.raises(UserError, match=r"entry point gentle-nudge .*imported"):
        editors.get("gentle-nudge")
    (package / "__init__.py").write_text("")
    for module in [name for name in sys.modules if name.startswith("nudges")]:
        monkeypatch.delitem(sys.modules, module)
    found = editors.get("gentle-nudge")
    assert found.__module__ == "nudges.gentle"
    assert editors.get("class-nudge") is found
    file = registry.hparams_file("gentle-nudge")
    assert file == package / "gentle_nudge.yaml"
    assert load_hparams(file, found.Hparams).steps == 10


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("gone.py", None, "no such file of Python"),
        ("notes.txt", "EDITOR = 1", "no such file of Python"),
        ("broken.py", "EDITOR = (\n", "broken.py:1: '(' was never closed"),
        ("empty.py", "VALUE = 1\n", "offers none of EDITOR, PERSONALIZER"),
        ("ft.py", "EDITOR = 1\n", "another editor is called ft already"),
    ],
)
def test_what_is_no_plugin_is_refused_in_one_line(cli, tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, out, errors = cli("--plugin", tmp_path / name, "list")
    assert (code, out) == (2, "")
    assert says in errors.splitlines()[0]
    assert name in errors.splitlines()[0]


def test_a_plugin_that_cannot_be_imported_is_named(cli, tmp_path):
    (tmp_path / "needy.py").write_text("import no_such_package\nEDITOR = 1\n")
    code, _, errors = cli(
        "--plugin", tmp_path / "needy.py", "eval", "needy", "--dry-run"
    )
    assert code == 2
    assert "needy.py: cannot be imported: ModuleNotFoundError" in errors


def test_the_tiny_models_of_a_plugin_are_its_own(copied, monkeypatch):
    assert "tiny-intern-vl" not in named_models()
    monkeypatch.setenv(VARIABLE, str(copied / "intern_vl.py"))
    assert named_models()["tiny-intern-vl"].family == "intern-vl"
