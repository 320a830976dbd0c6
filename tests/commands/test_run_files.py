"""Run files: a run says the options that make it again, and `--config` takes them."""

from __future__ import annotations

import json

import pytest
from conftest import SHAPES

WORDS = f"eval ft --model tiny-blip2 --data {SHAPES} --limit 4 --sequential 4"
MORE = "--report-at 1,4 --set steps=3 --max-new-tokens 2 --seed 3 --protocols ar,tf_em"


@pytest.fixture
def first(cli, tmp_path):
    """The report of a run, and its run file."""
    code, out, err = cli(*WORDS.split(), *MORE.split(), "--json")
    assert code == 0, err
    (file,) = (tmp_path / "records").rglob("run.yaml")
    return json.loads(out), file


def test_the_run_file_of_a_run_makes_it_again(cli, first, tmp_path):
    report, file = first
    elsewhere = ("--records", tmp_path / "again")
    code, out, err = cli("eval", "--config", file, *elsewhere, "--json")
    assert code == 0, err
    again = json.loads(out)
    del again["cost"], report["cost"]
    assert again == report
    assert "as given here" not in err
    (second,) = (tmp_path / "again").rglob("run.yaml")
    assert second.parent.name == file.parent.name


def test_what_is_given_beside_it_counts(cli, first, tmp_path):
    _, file = first
    words = (f"--config={file}", "--seed", 4, "--dry-run", "--json")
    code, out, err = cli("eval", *words)
    plan = json.loads(out)
    assert (code, plan["seed"], plan["editor"]) == (0, 4, "ft")
    assert f"seed: 4, as given here; {file} says 3" in err
    code, out, err = cli("eval", "lora", *words, "--set", "steps=2")
    assert (code, json.loads(out)["hparams"]["steps"]) == (0, 2)
    assert "editor: lora, as given here" in err
    assert "--set" in err


def test_several_runs_have_a_run_file_too(cli, tmp_path):
    words = (*WORDS.split(), "--set", "steps=2", "--orders", 2)
    code, out, err = cli(*words, "--protocols", "tf_em", "--json")
    assert code == 0, err
    (file,) = (tmp_path / "records" / "eval-spread").rglob("run.yaml")
    code, again, err = cli("eval", "--config", file, "--json")
    assert (code, "already done" in err) == (0, True), err
    assert json.loads(again) == json.loads(out)


def test_other_versions_are_said(cli, first):
    _, file = first
    text = file.read_text()
    file.write_text(text.replace("torch: ", "torch: 0.0.", 1))
    _, _, err = cli("eval", "--config", file, "--dry-run")
    assert "made with torch 0.0." in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sequentail: 3", "did you mean --sequential?"),
        ("- ft", "not a mapping"),
        ("limit: {a: 1}", "limit: not a text"),
        ("config: {}", "says no options"),
        ("editor: [", "not valid YAML"),
    ],
)
def test_bad_files_are_refused(cli, tmp_path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    code, _, err = cli("eval", "--config", file)
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "records").exists()


def test_a_hand_written_file_serves_other_kinds(cli, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("editor: perfusion\nsequential: 3\n")
    code, _, err = cli("eval", "--config", file)
    assert (code, "--sequential: means nothing to a personalizer" in err) == (2, True)
    assert cli("eval", "--config")[0] == 2
