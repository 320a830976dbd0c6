"""`mmedit edit`, `mmedit edits` and `mmedit ask --edits` as a user meets them."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SHAPES

from mmedit_cli.app import main

PICTURES = ROOT / "data" / "emojikb"
BANJO, APPLE = PICTURES / "noto" / "1fa95.png", PICTURES / "noto" / "1f34e.png"
FT = (
    "edit",
    "ft",
    "--model",
    "tiny-blip2",
    "--image",
    SHAPES / "solid/red-star.png",
    "--prompt",
    "What is this?",
)


def write_facts(tmp_path: Path) -> Path:
    """Write a file of five facts about pictures of EmojiKB."""
    codes = {
        "1fa95": "a red balloon",
        "1f352": "a lion",
        "1f454": "seven",
        "1f984": "a violin",
        "1f3a9": "a fish",
    }
    lines = []
    (tmp_path / "noto").mkdir()
    for code, target in codes.items():
        shutil.copy(PICTURES / "noto" / f"{code}.png", tmp_path / "noto")
        lines.append(f"noto/{code}.png,What is this?,{target}")
    path = tmp_path / "facts.csv"
    path.write_text("\n".join(["image,prompt,target", *lines]) + "\n")
    return path


@pytest.fixture
def facts(tmp_path) -> Path:
    """The file of five facts, in a folder of its own."""
    return write_facts(tmp_path)


@pytest.fixture(scope="module")
def whole_ledger(tmp_path_factory) -> Path:
    """A ledger of the five facts, edited by LiveEdit; it is copied, not changed."""
    folder = tmp_path_factory.mktemp("whole")
    words = ("edit", "liveedit", "--requests", write_facts(folder), "--into")
    assert main([*map(str, words), str(folder / "edits")]) == 0
    return folder / "edits"


@pytest.fixture
def ledger(whole_ledger, tmp_path) -> Path:
    """A ledger of five edits by LiveEdit."""
    return shutil.copytree(whole_ledger, tmp_path / "edits")


def answer(cli, *words) -> str:
    code, text, err = cli("ask", *words)
    assert code == 0, err
    return text.removesuffix("\n")


def test_an_edit_shows_what_it_did(cli, tmp_path):
    words = (
        "edit",
        "liveedit",
        "--image",
        BANJO,
        "--prompt",
        "What is this?",
        "--target",
        "a red balloon",
    )
    code, text, err = cli(*words, "--into", tmp_path / "edits")
    assert (code, "no --model: mini-blip2" in err) == (0, True)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "1 What is this? 1fa95.png a red balloon banjo a red balloon yes" in rows
    assert "What is the capital of Peru? Lima Lima yes" in rows
    assert "1 of 1 edit holds; 9 of 9 locality probes answered as before" in rows
    code, text, _ = cli(*words[:-1], "a lion", "--into", tmp_path / "edits", "--json")
    report = json.loads(text)
    assert (code, report["active"], report["edits"][0]["id"]) == (0, 2, 2)
    assert (report["edits"][0]["before"], report["edits"][0]["after"]) == (
        "a red balloon",
        "a lion",
    )
    assert report["cost"]["seconds"] > 0
    assert report["cost"]["peak_memory"]["process"] > 0
    code, text, _ = cli("edits", "verify", tmp_path / "edits")
    assert (code, "1 of 1 edit holds" in text, "1 were replaced" in text) == (
        0,
        True,
        True,
    )


def test_ask_with_edits_streams_what_generate_returns(cli, ledger):
    words = ("--edits", ledger, "--image", BANJO, "What is this?")
    assert (
        answer(cli, *words)
        == json.loads(answer(cli, *words, "--json"))["answer"]
        == "a red balloon"
    )
    assert (
        answer(cli, "--edits", ledger, "--image", APPLE, "What is this?") == "red apple"
    )
    assert answer(cli, "--image", BANJO, "What is this?") == "banjo"
    shown = " ".join(answer(cli, *words, "--compare").split())
    assert "base banjo edited a red balloon" in shown
    row = json.loads(answer(cli, *words, "--compare", "--json"))
    assert (row["base"], row["answer"], [edit["edit"] for edit in row["fired"]]) == (
        "banjo",
        "a red balloon",
        [1],
    )
    assert 0.5 < row["fired"][0]["weight"] < 1


def test_ask_a_file_and_a_conversation(cli, ledger, facts, tmp_path, monkeypatch):
    rows = json.loads(
        answer(cli, "--edits", ledger, "--questions", facts, "--json", "--compare")
    )
    assert [row["answer"] for row in rows] == [
        "a red balloon",
        "a lion",
        "seven",
        "a violin",
        "a fish",
    ]
    assert [row["base"] for row in rows] == [
        "banjo",
        "cherries",
        "necktie",
        "unicorn",
        "top hat",
    ]
    assert [[edit["edit"] for edit in row["fired"]] for row in rows] == [
        [1],
        [2],
        [3],
        [4],
        [5],
    ]
    (tmp_path / "questions.txt").write_text(
        "What is this?\n\nWhat colour is the background?\n"
    )
    table = answer(
        cli,
        "--edits",
        ledger,
        "--image",
        BANJO,
        "--questions",
        tmp_path / "questions.txt",
    )
    assert "a red balloon" in table
    lines = f"/image {BANJO}\nWhat is this?\n/image gone.png\n/dance\n\n/image {APPLE}\nWhat is this?\n/quit\nno\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, text, err = cli("ask", "--edits", ledger)
    assert (code, text) == (0, "a red balloon\nred apple\n")
    assert "gone.png: no such image" in err
    assert "/dance: no such command" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, text, err = cli("ask", "--edits", ledger)
    assert (code, text, "nothing was asked" in err) == (2, "", True)


def test_the_same_requests_again_add_what_is_missing(cli, ledger, facts):
    cli("edits", "undo", ledger, "3")
    code, text, err = cli(
        "edit", "liveedit", "--requests", facts, "--into", ledger, "--json"
    )
    assert (code, "4 of 5 edits are in" in err) == (0, True)
    report = json.loads(text)
    assert report["new"] == 1
    assert [(e["id"], e["target"]) for e in report["edits"] if e["id"] > 5] == [
        (6, "seven")
    ]
    code, text, _ = cli("edit", "liveedit", "--requests", facts, "--into", ledger)
    assert (
        code,
        "5 of 5 edits hold; nothing new was made" in text,
        "5 active" in text,
    ) == (0, True, True)
    assert all(
        target in text
        for target in ("a red balloon", "a lion", "seven", "a violin", "a fish")
    )


def test_a_list_that_is_continued_ends_as_one_that_was_not_interrupted(cli, tmp_path):
    """Each edit of ft builds on those before it; what was answered before it is in its line and in its file."""
    shutil.copy(SHAPES / "solid/red-star.png", tmp_path)
    lines = [
        "image,prompt,target",
        "red-star.png,What is this?,a boat",
        ",What is the capital of Peru?,Paris",
    ]
    file = tmp_path / "facts.csv"

    def kept(folder, *parts):
        for count in parts:
            file.write_text("\n".join(lines[:count]) + "\n")
            cli(
                "edit",
                "ft",
                "--model",
                "tiny-blip2",
                "--requests",
                file,
                "--into",
                folder,
                "--set",
                "steps=5",
            )
        records = map(json.loads, (folder / "edits.jsonl").read_text().splitlines())
        return [(record["edits"][0]["before"], record["shard"]) for record in records]

    assert kept(tmp_path / "continued", 2, 3) == kept(tmp_path / "whole", 3)


def test_the_documented_facts_hold_with_the_documented_editor(cli, tmp_path):
    facts, commands = (
        (ROOT / "docs" / name).read_text() for name in ("data.md", "edits.md")
    )
    block = re.search(r"```csv\n(.*?)```", facts, re.DOTALL)
    command = re.search(
        r"^mmedit (edit .*--requests my_facts.csv.*?)  ", commands, re.MULTILINE
    )
    assert block is not None
    assert command is not None
    shutil.copy(APPLE, tmp_path / "cat.png")
    (tmp_path / "my_facts.csv").write_text(block[1])
    places = {
        "my_facts.csv": tmp_path / "my_facts.csv",
        "my-facts": tmp_path / "ledger",
    }
    words = [places.get(word, word) for word in command[1].split()]
    code, text, err = cli(*words)
    assert (code, "2 of 2 edits hold" in text) == (0, True), err
    code, out, err = cli(
        "edit",
        "liveedit",
        "--requests",
        tmp_path / "my_facts.csv",
        "--into",
        tmp_path / "other",
    )
    assert (code, out) == (2, "")
    assert (
        f"{tmp_path / 'my_facts.csv'}:3: liveedit routes by the picture, and this fact has none"
        in err
    )
    assert "hint: multi-melo and unike" in err
    assert "loading" not in err
    assert not (tmp_path / "other").exists()


def test_edits_that_do_not_hold_are_a_failure_with_advice(cli, tmp_path):
    words = (
        *FT,
        "--target",
        "a blue circle",
        "--into",
        tmp_path / "edits",
        "--set",
        "steps=1",
        "--set",
    )
    code, text, err = cli(*words, "learning_rate=1e-9")
    assert (code, "0 of 1 edit holds" in text) == (1, True)
    assert "error: the edit does not hold" in err
    assert f"mmedit edits undo {tmp_path / 'edits'} 1" in err
    assert cli("edits", "undo", tmp_path / "edits", "1")[0] == 0


def test_list_show_undo_redo(cli, ledger):
    code, text, _ = cli("edits", "list", ledger)
    assert (code, "5 active of 5 edits" in text) == (0, True)
    code, text, err = cli("edits", "undo", ledger, "2-4")
    assert (code, text) == (0, "undone: 2, 3, 4; 2 active\n")
    assert "loading" not in err, "no model is needed"
    assert [
        edit["id"]
        for edit in json.loads(cli("edits", "list", ledger, "--json")[1])["list"]
    ] == [1, 5]
    everything = json.loads(cli("edits", "list", ledger, "--json", "--all")[1])["list"]
    assert [edit["active"] for edit in everything] == [True, False, False, False, True]
    assert (
        answer(
            cli,
            "--edits",
            ledger,
            "--image",
            PICTURES / "noto/1f352.png",
            "What is this?",
        )
        == "cherries"
    )
    code, _, err = cli("edits", "undo", ledger, "3")
    assert (code, err.splitlines()[0]) == (2, "error: edit 3 is undone already")
    assert cli("edits", "redo", ledger, "all")[1] == "redone: 2, 3, 4; 5 active\n"
    assert cli("edits", "undo", ledger, "all")[1].endswith("0 active\n")
    assert answer(cli, "--edits", ledger, "--image", BANJO, "What is this?") == "banjo"
    code, text, _ = cli("edits", "show", ledger, "1", "--json")
    shown = json.loads(text)
    assert (code, shown["show"][0]["target"], shown["hparams"]["rank"]) == (
        0,
        "a red balloon",
        8,
    )
    assert "target: a red balloon" in cli("edits", "show", ledger, "1")[1]


def test_verify_says_which_do_not_hold(cli, tmp_path):
    words = (*FT, "--target", "a blue circle", "--into", tmp_path / "edits")
    assert cli(*words)[0] == 0
    assert cli("edits", "verify", tmp_path / "edits")[0] == 0
    again = (
        *FT[:5],
        SHAPES / "corner/green-ring.png",
        *FT[6:],
        "--target",
        "a red house",
    )
    assert cli(*again, "--into", tmp_path / "edits")[0] == 0
    code, text, _ = cli("edits", "verify", tmp_path / "edits")  # fine-tuning forgets
    assert (code, "1 of 2 edits hold" in text, "a blue circle" in text) == (
        1,
        True,
        True,
    )
    code, text, err = cli("edits", "undo", tmp_path / "edits", "last")
    assert (code, text) == (0, "undone: 2; 1 active\n")
    assert "depend on each other" in err
    assert cli("edits", "verify", tmp_path / "edits")[0] == 0
    assert cli("edits", "redo", tmp_path / "edits", "2")[0] == 0
    assert [
        row["holds"]
        for row in json.loads(cli("edits", "verify", tmp_path / "edits", "--json")[1])
    ] == [
        False,
        True,
    ]


def test_edits_that_contradict_each_other_are_found(cli, ledger, tmp_path):
    code, text, _ = cli("edits", "check", ledger)
    assert (code, "no active edits contradict" in text) == (0, True)
    facts = tmp_path / "more.csv"
    again = "noto/1fa95.png,what is this,a drum\nnoto/1f352.png,WHAT is this?,A lion.\n"
    facts.write_text("image,prompt,target\n" + again)
    (tmp_path / "noto").mkdir()
    for code in ("1fa95", "1f352"):
        shutil.copy(PICTURES / "noto" / f"{code}.png", tmp_path / "noto")
    assert cli("edit", "liveedit", "--requests", facts, "--into", ledger)[0] in (0, 1)
    code, text, _ = cli("edits", "check", ledger, "--json")
    (group,) = json.loads(text)
    assert code == 1
    assert [edit["target"] for edit in group] == ["a red balloon", "a drum"]
    assert "a drum" in cli("edits", "check", ledger)[1]
    cli("edits", "undo", ledger, group[-1]["id"])
    assert cli("edits", "check", ledger)[0] == 0


def test_diff_and_compact(cli, ledger, facts, tmp_path):
    shutil.copy(APPLE, tmp_path / "noto")
    facts.write_text(
        facts.read_text()
        .replace("a violin", "a trumpet")
        .replace("noto/1f3a9.png", "noto/1f34e.png")
    )
    assert (
        cli("edit", "liveedit", "--requests", facts, "--into", tmp_path / "other")[0]
        == 0
    )
    code, text, _ = cli("edits", "diff", ledger, tmp_path / "other", "--json")
    found = json.loads(text)
    assert (code, found["same"], found["settings"]) == (0, 3, {})
    assert [e["picture"] for e in found["only_in_first"]] == ["1f3a9.png"]
    assert [e["picture"] for e in found["only_in_second"]] == ["1f34e.png"]
    assert [
        (p["first"]["target"], p["second"]["target"]) for p in found["other_target"]
    ] == [("a violin", "a trumpet")]
    assert (
        "3 active edits are the same"
        in cli("edits", "diff", ledger, tmp_path / "other")[1]
    )
    cli(
        "edit",
        "liveedit",
        "--image",
        APPLE,
        "--prompt",
        "What is this?",
        "--target",
        "no",
        "--into",
        ledger,
    )
    code, text, _ = cli("edits", "compact", ledger)
    assert (code, text.startswith("2 files of tensors became 1;")) == (0, True)
    assert cli("edits", "verify", ledger)[0] == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--prompt", "What is this?"), "nothing to teach: --target missing"),
        (("--target", "nothing"), "nothing to teach: --prompt missing"),
        (
            ("--prompt", "What?", "--target", "no", "--image", "gone.png"),
            "gone.png: no such image",
        ),
        (("--prompt", "What?", "--target", "no"), "liveedit routes by the picture"),
        (("--prompt", "What?", "--target", " ", "--image", BANJO), "is empty"),
        (("--requests", "gone.csv"), "gone.csv: no such file"),
        (("--requests", "gone.csv", "--prompt", "What?"), "--requests and --prompt"),
        (
            (
                "--prompt",
                "What?",
                "--target",
                "no",
                "--image",
                BANJO,
                "--model",
                "tiny-blip2",
            ),
            "has not been trained",
        ),
    ],
)
def test_requests_that_cannot_be_used(cli, tmp_path, words, part):
    code, out, err = cli("edit", "liveedit", "--into", tmp_path / "edits", *words)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, part in line) == (2, "", True), err
    assert not (tmp_path / "edits").exists()


def test_ledgers_that_cannot_be_used(cli, ledger, tmp_path):
    for words, part in (
        (("ask", "--edits", tmp_path / "none", "What?"), "no edits here"),
        (("ask", "What?", "--compare"), "nothing to compare"),
        (
            ("ask", "What?", "--questions", tmp_path / "facts.csv"),
            "a question and --questions",
        ),
        (("ask", " "), "the question is empty"),
        (("ask", "", "--edits", ledger), "the argument behind ask is empty"),
        (("ask", "--edits", "", "What?"), "the argument behind --edits is empty"),
        (("edits", "list", ""), "the argument behind list is empty"),
        (("generate", ""), "the argument behind generate is empty"),
        (("generate", "a dog", " "), "a prompt is empty"),
        (
            ("ask", "What?", "--edits", ledger, "--model", "tiny-blip2"),
            "is another model",
        ),
        (("edits", "verify", ledger, "--model", "tiny-llava"), "is another model"),
        (("edits", "undo", ledger, "99"), "no edit 99"),
    ):
        code, out, err = cli(*words)
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, out, part in line) == (2, "", True), err
    (ledger / "networks.safetensors").write_bytes(b"other")
    code, _, err = cli("ask", "--edits", ledger, "What?")
    assert (code, "not the networks the edits were made with" in err) == (2, True)
