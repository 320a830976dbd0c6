"""How long answers may be, which targets can be said, and what settings of a model change: as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHAPES

from mmedit_cli.knowledge.evaluation.answers import (
    MARGIN,
    answer_limits,
    check_sayable,
    tokens_for,
)
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.types import EditCase, Query, in_one_line

STAR = SHAPES / "solid" / "red-star.png"
LONG = "a red star of five points that somebody drew with a thick brush on a large sheet of white paper"
QUICK = ("--model", "tiny-blip2", "--set", "learning_rate=0.01", "--set", "steps=60")
SLOW = (
    "--model",
    "tiny-blip2",
    "--set",
    "layers=[1,2,3]",
    "--set",
    "learning_rate=0.005",
    "--set",
    "steps=300",
    "--set",
    "stop_loss=0.0001",
)


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("tiny-blip2", device="cpu")


def facts_of(folder: Path, *targets: str) -> Path:
    shutil.copy(STAR, folder / "star.png")
    lines = [
        json.dumps({"prompt": f"What is this? {i}", "target": t, "image": "star.png"})
        for i, t in enumerate(targets)
    ]
    file = folder / "facts.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_longest_target_of_a_case_says_how_long_its_answers_may_be(tiny):
    request = Query("What is this?", LONG, STAR)
    length = tiny.encode(request).n_answer
    assert length > 40
    near, other = (
        Query("What colour?", "red", STAR),
        Query("Who is it?", "nobody", STAR),
    )
    cases = [EditCase("1", request, locality={"near": (near,)}), EditCase("2", other)]
    limits = {
        query.prompt: limit for query, limit in answer_limits(tiny, cases).items()
    }
    assert limits["What is this?"] == limits["What colour?"]
    assert abs(limits["What is this?"] - length - MARGIN) <= 1
    assert limits["Who is it?"] < 16
    assert tokens_for(tiny, [request, Query("no target")], 32) == [
        limits["What is this?"],
        32,
    ]


def test_a_long_answer_is_right_everywhere(cli, tmp_path):
    file = facts_of(tmp_path, LONG)
    code, text, err = cli(
        "edit", "ft", *SLOW, "--requests", file, "--into", tmp_path / "edits", "--json"
    )
    report = json.loads(text)
    assert (code, report["edits"][0]["holds"]) == (0, True), err
    assert report["edits"][0]["after"].startswith(LONG)
    code, text, _ = cli("edits", "verify", tmp_path / "edits")
    assert (code, "1 of 1 edit holds" in text) == (0, True)
    for words in ((), ("--json",)):
        code, text, _ = cli(
            "ask", "--edits", tmp_path / "edits", "-i", STAR, "What is this? 0", *words
        )
        assert (code, LONG in text) == (0, True), (
            "a ledger knows how long its targets are"
        )
    code, text, err = cli(
        "eval", "ft", *SLOW, "--data", file, "--protocols", "ar", "--json"
    )
    assert code == 0, err
    scores = json.loads(text)["milestones"][0]["scores"]["ar"]
    assert scores["reliability"]["mean"] == 1


def test_a_line_break_in_a_target_becomes_a_blank_and_is_told(cli, tmp_path):
    assert in_one_line(Query("p", " a\r\n\n b\n")) == Query("p", "a b")
    assert in_one_line(Query("p", "a  b ")) == Query("p", "a  b "), (
        "nothing else is touched"
    )
    file = facts_of(tmp_path, "blue\ngreen", "red")
    code, text, err = cli(
        "edit", "ft", *QUICK, "--requests", file, "--into", tmp_path / "edits", "--json"
    )
    assert "targets with line breaks: 1; an answer is one line" in err
    assert (code, [edit["target"] for edit in json.loads(text)["edits"]]) == (
        0,
        ["blue green", "red"],
    )
    code, text, err = cli("eval", "ft", *QUICK, "--data", file, "--protocols", "ar")
    assert (code, "1 cases had line breaks in their targets" in text) == (0, True), err


@pytest.mark.parametrize("target", ["red</s>", "</s>", "red <pad> star"])
def test_a_target_that_can_never_be_said_is_refused(cli, tmp_path, tiny, target):
    special = target.replace("</s>", tiny.tokenizer.eos_token).replace(
        "<pad>", tiny.tokenizer.pad_token
    )
    file = facts_of(tmp_path, "red", special)
    for words in (
        ("edit", "ft", "--requests", file, "--into", tmp_path / "edits"),
        ("eval", "ft", "--data", file),
    ):
        code, _, err = cli(*words, "--model", "tiny-blip2")
        assert code == 2
        assert f"the target {special!r}" in err
        assert "can never be said: as an answer it reads" in err
    assert not (tmp_path / "edits").exists()


@pytest.mark.parametrize(
    "target",
    [
        "a red star",
        "caf\u00e9",
        "-5",
        "C++",
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\u732b",
    ],
)
def test_targets_of_any_language_can_be_said(tiny, target):
    check_sayable(tiny, Query("What is this?", target))


def test_settings_of_a_model_are_named_in_the_report_and_followed_by_ask_alone(
    cli, tmp_path
):
    backbone = load_backbone("tiny-llava", device="cpu")
    folder = tmp_path / "own"
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    backbone.image_processor.save_pretrained(folder)
    asked = ("-i", STAR, "What is this?")
    plain = cli("ask", "--model", folder, *asked)[1]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**settings, "no_repeat_ngram_size": 1, "num_beams": 2})
    )
    code, text, err = cli("ask", "--model", folder, *asked)
    assert (code, text) == (0, plain)
    assert "no_repeat_ngram_size=1" in err
    assert "--sampling model follows it" in err
    code, text, err = cli("ask", "--model", folder, *asked, "--sampling", "model")
    assert (code, text != plain) == (0, True)
    code, _, err = cli("ask", "--model", folder, *asked, "--sampling", "beams")
    assert (code, "--sampling beams: not a way to answer" in err) == (2, True)
    file = facts_of(tmp_path, "red")
    words = (
        "eval",
        "ft",
        "--model",
        folder,
        "--data",
        file,
        "--set",
        "steps=1",
        "--protocols",
        "ar",
    )
    code, text, err = cli(*words)
    assert code == 0, err
    assert "the model's own settings are ignored: " in text
    assert json.loads(cli(*words, "--json")[1])["ignored_settings"] == {
        "no_repeat_ngram_size": 1,
        "num_beams": 2,
    }
