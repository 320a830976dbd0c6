"""`mmedit edit` without an editor: which one is taken, what else is asked, and what is advised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, SHAPES

from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.knowledge.workflow.asking_otherwise import GIVEN, OWN, own_ways
from mmedit_cli.knowledge.workflow.choosing import choose_editor
from mmedit_cli.reports.edit_tables import way_out
from mmedit_cli.types import EditCase, Query

BANJO = ROOT / "data" / "emojikb" / "noto" / "1fa95.png"
STAR = SHAPES / "solid" / "red-star.png"
SEEN = EditCase("1", Query("What is this?", "a red balloon", BANJO))
TEXT = EditCase("2", Query("What is the capital of Peru?", "Arequipa"))


def choose(folder: Path, *facts: EditCase, model: str = "mini-blip2"):
    """The choice for some facts, with the records of a folder."""
    return choose_editor(folder / "new", facts, ModelOptions(model), folder / "records")


def test_it_goes_by_the_picture_and_the_networks(tmp_path):
    assert choose(tmp_path, SEEN).editor == "liveedit"
    assert choose(tmp_path, TEXT).editor == "multi-melo"
    assert choose(tmp_path, SEEN, TEXT).editor == "multi-melo"
    assert choose(tmp_path, TEXT, model="tiny-llama-lm").editor == "multi-melo"
    untrained = choose(tmp_path, SEEN, model="tiny-llava")
    assert untrained.editor == "multi-melo"
    assert "tiny-llava" in untrained.why


def test_networks_of_ones_own_are_used(tmp_path):
    run = tmp_path / "records/train-editor/liveedit/tiny-llava/shapes/0123456789ab"
    run.mkdir(parents=True)
    for name in ("report.json", "editor.safetensors"):
        (run / name).touch()
    choice = choose(tmp_path, SEEN, model="tiny-llava")
    assert (choice.editor, choice.checkpoint) == ("liveedit", "latest")
    assert run.name in choice.why


def test_a_ledger_keeps_its_editor(cli, tmp_path):
    fact = ("--prompt", "What is this?", "--image", STAR, "--target", "a fox")
    ledger = ("--edits", tmp_path / "kept")
    first = ("edit", "ft", "--model", "tiny-blip2", "--set", "steps=1", *fact, *ledger)
    assert cli(*first)[0] in (0, 1)
    code, _, said = cli("edit", *fact, "--target", "a lynx", *ledger, "--json")
    assert code in (0, 1), said
    assert f"no EDITOR: ft, as {tmp_path / 'kept'} holds its edits" in said


def test_what_is_asked_otherwise():
    request = SEEN.request
    ways = own_ways(request)
    assert {way.query.target for way in ways} == {request.target}
    assert {way.source for way in ways} == {OWN}
    asked = [(way.query.prompt, way.query.image) for way in ways]
    assert len(set(asked)) == len(asked)
    assert (request.prompt, request.image) not in asked
    assert {way.shown for way in ways} == {
        "1fa95.png",
        "1fa95.png, turned",
        "1fa95.png, smaller",
        "1fa95.png, compressed",
    }
    unknown = own_ways(Query("Whose hat is it?", "Ada's\nhat"))
    assert [way.query.image for way in unknown] == [None, None]
    assert all("Whose hat is it?" in way.query.prompt for way in unknown)
    assert {way.query.target for way in unknown} == {"Ada's hat"}


def test_without_an_editor_it_is_shown_whether_the_edit_holds(
    cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ("edit", "--image", BANJO, "--prompt", "What is this?")
    rephrased = ("--rephrase", "Which thing can you see?")
    taught = (*words, "--target", "a red balloon", *rephrased)
    code, out, said = cli(*taught, "--json")
    assert code == 0, said
    report = json.loads(out)
    assert (report["ledger"], report["editor"]) == ("my-edits", "liveedit")
    assert f"no EDITOR: liveedit, as {report['chosen']}" in said
    ways = report["otherwise"]
    assert (ways[0]["prompt"], ways[0]["source"]) == (rephrased[1], GIVEN)
    assert len(ways) == 7
    assert all(way["before"] == "banjo" for way in ways if "thing" not in way["prompt"])
    assert all(way["after"] == "a red balloon" for way in ways if way["holds"])
    assert sum(way["holds"] for way in ways) >= 6


@pytest.mark.parametrize(
    ("held", "same", "said"),
    [
        (True, True, ()),
        (False, True, ("teach what is asked otherwise", "another editor")),
        (True, False, ("mmedit edits undo kept 2-3", "another editor")),
    ],
)
def test_the_way_out_follows_from_what_was_found(held, same, said):
    report = {
        "ledger": "kept",
        "edits": [{"id": 2}, {"id": 3}],
        "otherwise": [{"holds": held}],
        "locality": [{"same": same}],
    }
    advised = way_out(report)
    assert bool(advised) == bool(said)
    assert all(part in advised for part in said)


def test_a_file_and_a_wording_are_refused(cli, tmp_path):
    words = ("edit", "--requests", tmp_path / "facts.csv", "--rephrase", "Who?")
    code, _, said = cli(*words)
    assert code == 2
    assert "--requests and --rephrase: one fact, or a file of them" in said
