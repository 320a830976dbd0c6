"""A ledger keeps what it was given: through kills, torn lines, flipped bytes, and a second writer."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import SHAPES, fork, needs_fork

from mmedit_cli.errors import RunError, StateError, UserError
from mmedit_cli.knowledge.ledger.edited_model import (
    EditOptions,
    begin_edits,
    open_edits,
)
from mmedit_cli.knowledge.ledger.ledger import Ledger
from mmedit_cli.knowledge.ledger.shards import Shards
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.types import Query

CONFIG = {
    "editor": "nobody",
    "hparams": {"a": 1},
    "model": {"name": "none", "fingerprint": "0"},
    "dtype": "float32",
    "seed": 0,
    "rows": True,
    "checkpoint": None,
    "state": {},
}
REQUESTS = tuple(
    Query("What is this?", target, SHAPES / picture)
    for target, picture in (
        ("a blue star", "solid/red-circle.png"),
        ("green", "outlined/blue-cross.png"),
        ("a yellow house", "corner/green-ring.png"),
        ("seven", "solid/blue-star.png"),
    )
)


def tensors(*values: float) -> dict[str, torch.Tensor]:
    return {"row": torch.tensor(values)[:, None].repeat(1, 64)}


def filled(folder, count: int, *, rows: bool = True) -> Ledger:
    """A ledger with edits 1, 2, ... whose tensors hold their id (or, without rows, the last id)."""
    ledger = Ledger.create(folder, {**CONFIG, "rows": rows}, {})
    for i in range(1, count + 1):
        add(ledger, i)
    return ledger


def add(ledger: Ledger, value: int) -> int:
    request = ledger.keep_picture(
        replace(REQUESTS[value % 4], target=f"target {value}")
    )
    (made,) = ledger.add(
        [request], tensors(float(value)), before=["before"], names=["picture.png"]
    )
    return made


def values(ledger: Ledger) -> list[float]:
    return ledger.tensors()["row"][:, 0].tolist() if ledger.active else []


def reopened(ledger: Ledger, *, writing: bool = False) -> Ledger:
    with ledger:
        pass
    return Ledger.open(ledger.folder, writing=writing)


# -- what it keeps ----------------------------------------------------------------------------------------------


def test_what_was_added_is_there_again(tmp_path):
    ledger = reopened(filled(tmp_path / "new" / "edits", 5))
    assert [edit.id for edit in ledger.active] == [1, 2, 3, 4, 5]
    assert values(ledger) == [1, 2, 3, 4, 5]
    edit = ledger.edits[3]
    assert (edit.request.target, edit.before, edit.picture) == (
        "target 3",
        "before",
        "picture.png",
    )
    assert edit.request.image.read_bytes() == REQUESTS[3].image.read_bytes()
    lines = [
        json.loads(line)
        for line in (ledger.folder / "edits.jsonl").read_text().splitlines()
    ]
    assert [line["do"] for line in lines] == ["add"] * 5
    assert {line["editor"] for line in lines} == {"nobody"}
    assert len(list((ledger.folder / "pictures").iterdir())) == 4, (
        "the fifth has the picture of the first"
    )


def test_undo_and_redo_are_appended(tmp_path):
    ledger = filled(tmp_path, 8)
    start = (tmp_path / "edits.jsonl").read_bytes()
    ledger.mark("undo", ledger.select("3-7", active=True))
    assert values(ledger) == [1, 2, 8]
    ledger.mark("redo", ledger.select("4,6", active=False))
    ledger = reopened(ledger, writing=True)
    assert values(ledger) == [1, 2, 4, 6, 8]
    ledger.mark("undo", ledger.select("all", active=True))
    assert (ledger.active, ledger.tensors()) == ([], {})
    assert add(ledger, 9) == 9, "ids are never used again"
    assert (tmp_path / "edits.jsonl").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("text", "active", "words"),
    [
        ("9", None, "no edit 9"),
        ("2", True, "edit 2 is undone already"),
        ("1", False, "edit 1 is not undone"),
        ("x", None, "'x': not edits"),
        ("7-8", None, "no edits there"),
        ("1-x", None, "not edits"),
    ],
)
def test_edits_that_cannot_be_meant(tmp_path, text, active, words):
    ledger = filled(tmp_path, 3)
    ledger.mark("undo", [2])
    with pytest.raises(UserError, match=words):
        ledger.select(text, active=active)
    assert ledger.select("last", active=True) == [3]
    assert ledger.select("1-3", active=True) == [1, 3]


def test_adding_writes_nothing_that_is_there_already(tmp_path):
    ledger = filled(tmp_path, 50)
    old = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    lines = (tmp_path / "edits.jsonl").read_bytes()
    add(ledger, 51)
    new = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert new.items() > old.items()
    ((path, _),) = new.items() - old.items()
    assert path.stat().st_size < 1000
    after = (tmp_path / "edits.jsonl").read_bytes()
    assert after.startswith(lines)
    assert after.count(b'"do":"add"') == 51


def test_edits_made_one_by_one_lie_in_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr("mmedit_cli.knowledge.ledger.ledger._PACKED", (4, 32))
    ledger = filled(tmp_path, 70)
    add(ledger, 1)
    ledger.mark("undo", [3, 69])
    wanted = [*(float(i) for i in range(1, 71) if i not in (3, 69)), 1.0]
    assert values(ledger) == wanted
    ledger = reopened(ledger, writing=True)
    assert values(ledger) == wanted
    assert len(list((tmp_path / "shards").iterdir())) == 2 + 1 + 3, (
        "of 32, of 4, and of 1"
    )
    ledger.mark("redo", [3])
    add(ledger, 2000)
    assert values(reopened(ledger)) == [*wanted[:2], 3.0, *wanted[2:], 2000.0]


def test_what_cannot_be_packed_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("mmedit_cli.knowledge.ledger.ledger._PACKED", (4, 32))
    ledger = filled(tmp_path, 3)
    path = tmp_path / "shards" / f"{ledger.edits[2].shard}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    assert add(ledger, 4) == 4, "adding is safe from what is damaged elsewhere"
    with pytest.raises(StateError, match="damaged"):
        ledger.tensors()
    path.write_bytes(data)
    assert values(ledger) == [1, 2, 3, 4]


def test_packing_costs_the_same_however_many_there_are(tmp_path, monkeypatch):
    """No row is written more than three times: alone, and in two sizes of shards."""
    monkeypatch.setattr("mmedit_cli.knowledge.ledger.ledger._PACKED", (4, 32))
    written = 0
    write = Shards.write

    def counted(self, tensors, edits):
        nonlocal written
        written += len(tensors["row"])
        return write(self, tensors, edits)

    monkeypatch.setattr(Shards, "write", counted)
    filled(tmp_path, 130)
    assert written == 130 + 128 + 128


@pytest.mark.parametrize("rows", [True, False])
def test_compact_keeps_edits_and_tensors(tmp_path, rows):
    ledger = filled(tmp_path, 6, rows=rows)
    ledger.mark("undo", [2, 5], None if rows else tensors(7.0))
    before = (
        values(ledger),
        [edit.id for edit in ledger.active],
        ledger.tensors(undone=True)["row"],
    )
    ledger.rewrite(ledger.tensors(undone=True))
    for again in (ledger, reopened(ledger)):
        assert (values(again), [edit.id for edit in again.active]) == before[:2]
        assert torch.equal(again.tensors(undone=True)["row"], before[2])
        assert again.edits[2].request.target == "target 2"
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_tensors_that_stand_for_all_edits_are_there_once(tmp_path):
    ledger = filled(tmp_path, 4, rows=False)
    assert values(ledger) == [4]
    assert len(list((tmp_path / "shards").iterdir())) == 1
    ledger.mark("undo", [1, 2, 3, 4], {})
    assert reopened(ledger).tensors() == {}


# -- what may go wrong ------------------------------------------------------------------------------------------


def test_a_line_that_names_the_same_tensors_keeps_them(tmp_path):
    """Without rows an older state goes once a newer one stands for all edits, but not where both are one file."""
    ledger = filled(tmp_path, 1, rows=False)
    state = ledger.state
    ledger.mark("redo", [1], tensors(1.0))
    assert ledger.state == state
    assert values(reopened(ledger)) == [1]


def test_a_ledger_that_got_no_edit_leaves_no_pictures(tmp_path):
    ledger = Ledger.create(tmp_path / "new", CONFIG, {})
    ledger.keep_picture(REQUESTS[0])
    assert len(list(tmp_path.rglob("*.png"))) == 1
    ledger.discard()
    assert not (tmp_path / "new" / "pictures").exists()
    assert list(tmp_path.rglob("*.png")) == []


@needs_fork
@pytest.mark.parametrize("rows", [True, False])
def test_killed_at_any_moment_an_edit_is_in_or_it_is_not(tmp_path, rows):
    filled(tmp_path, 1, rows=rows).close()
    clock, done = random.Random(0), 1
    for turn in range(24):
        reading, writing = os.pipe()

        def go_on(reading=reading, writing=writing):
            os.close(reading)
            ledger = Ledger.open(tmp_path, writing=True)
            while True:
                os.write(writing, b"%d\n" % add(ledger, ledger.next_id))

        child = fork(go_on)
        os.close(writing)
        begun = (
            os.read(reading, 100).decode() if turn % 2 else ""
        )  # half of them have at least added one
        time.sleep(clock.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            said = [int(line) for line in (begun + pipe.read()).split("\n")[:-1]]
        with Ledger.open(
            tmp_path
        ) as seen:  # a reader mends nothing, and needs nothing mended
            assert values(seen) == (
                [edit.id for edit in seen.active] if rows else [len(seen.active)]
            )
        ledger = Ledger.open(tmp_path, writing=True)  # the lock went with the process
        ids = [edit.id for edit in ledger.active]
        promised = said[-1] if said else done
        assert ids == list(range(1, len(ids) + 1))
        assert promised <= ids[-1] <= promised + 1
        assert values(ledger) == (ids if rows else [ids[-1]])
        named = (
            {edit.shard for edit in ledger.edits.values()} if rows else {ledger.state}
        )
        with ledger:
            pass  # removes what a killed writer had no time to remove
        assert {path.name for path in (tmp_path / "shards").iterdir()} == {
            f"{shard}.safetensors" for shard in named
        }
        done = ids[-1]
    assert done > 12


def test_a_torn_last_line_is_cut_off(tmp_path):
    ledger = filled(tmp_path, 3)
    path = tmp_path / "edits.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    ledger = reopened(ledger, writing=True)
    assert [edit.id for edit in ledger.active] == [1, 2]
    assert add(ledger, 3) == 3
    assert values(reopened(ledger)) == [1, 2, 3]


def test_a_damaged_line_in_the_middle_loses_nothing(tmp_path):
    ledger = filled(tmp_path, 3)
    path = tmp_path / "edits.jsonl"
    whole = path.read_bytes()
    for bad in (
        b"{",
        b'{"do":"dance","shard":null}',
        b'{"do":"add","shard":"../x","edits":[]}',
    ):
        lines = whole.split(b"\n")
        lines[1] = bad
        path.write_bytes(b"\n".join(lines))
        ledger.close()
        for writing in (False, True):
            with pytest.raises(
                RunError, match=r"edits\.jsonl:2: not a record"
            ) as caught:
                Ledger.open(tmp_path, writing=writing)
            assert "copy" in caught.value.hint
        path.write_bytes(whole)
        assert values(Ledger.open(tmp_path)) == [1, 2, 3]


def test_a_flipped_byte_is_noticed(tmp_path):
    ledger = filled(tmp_path, 3)
    path = tmp_path / "shards" / f"{ledger.edits[2].shard}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ledger = reopened(ledger)
    with pytest.raises(
        StateError, match="damaged: it is not what was written"
    ) as caught:
        ledger.tensors()
    assert "--remake" in caught.value.hint
    path.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        ledger.tensors()


def test_a_newer_format_is_refused_and_left_alone(tmp_path):
    filled(tmp_path, 1).close()
    path = tmp_path / "run.yaml"
    saved = yaml.safe_load(path.read_text())
    saved["config"]["ledger"] = 2
    path.write_text(yaml.safe_dump(saved))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for writing in (False, True):
        with pytest.raises(
            StateError, match="a ledger of format 2, newer than 1"
        ) as caught:
            Ledger.open(tmp_path, writing=writing)
        assert caught.value.hint == "upgrade mmedit"
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_two_writers_are_refused_and_readers_are_not(tmp_path):
    ledger = filled(tmp_path, 2)
    with pytest.raises(RunError, match="another process is writing"):
        Ledger.open(tmp_path, writing=True)
    seen = Ledger.open(tmp_path)
    assert values(seen) == [1, 2]
    for write in (
        lambda: add(seen, 3),
        lambda: seen.mark("undo", [1]),
        lambda: seen.rewrite(seen.tensors()),
    ):
        with pytest.raises(RunError, match="open for reading only"):
            write()
    ledger.close()
    Ledger.open(tmp_path, writing=True).close()


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(UserError, match="no edits here"):
        Ledger.open(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="neither empty nor a ledger"):
        Ledger.exists(tmp_path)
    (tmp_path / "run.yaml").write_text("config: {command: eval}\nenvironment: {}\n")
    with pytest.raises(StateError, match="does not describe a ledger"):
        Ledger.open(tmp_path)


# -- with models ------------------------------------------------------------------------------------------------


def logits(backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.logits(backbone.batch(REQUESTS))


@pytest.fixture(scope="module", params=["ft", "liveedit"])
def whole_ledger(request, tmp_path_factory):
    """The folder of a ledger with three edits: by an editor whose edits hang together, and by one whose do not."""
    folder = tmp_path_factory.mktemp("whole") / "edits"
    model = "tiny-blip2" if request.param == "ft" else "mini-blip2"
    with begin_edits(folder, EditOptions(request.param, ModelOptions(model))) as edited:
        assert edited.edit(REQUESTS[:3]) == [1, 2, 3]
    return folder


@pytest.fixture
def ledger(whole_ledger, tmp_path):
    """A copy of that ledger, which a test may change."""
    return shutil.copytree(whole_ledger, tmp_path / "edits")


def test_it_opens_with_the_same_logits_and_closes_to_the_base_model(ledger):
    with open_edits(ledger, writing=True) as edited:
        backbone, first = edited.backbone, logits(edited.backbone)
        with edited.paused():
            base = logits(backbone)
        assert torch.equal(logits(backbone), first)
        assert not torch.equal(base, first)
        edited.undo([1, 2, 3])
        assert torch.equal(logits(backbone), base)
    with open_edits(ledger, writing=True) as edited:
        assert torch.equal(logits(edited.backbone), base)
        edited.redo([1, 2, 3])
        assert torch.equal(logits(edited.backbone), first)
    with open_edits(ledger) as edited:
        assert torch.equal(logits(edited.backbone), first)
        backbone = edited.backbone
    assert torch.equal(logits(backbone), base)


def test_without_one_edit_it_is_as_if_it_had_never_been(ledger, tmp_path):
    with open_edits(ledger, writing=True) as edited:
        whole = logits(edited.backbone)
        edited.undo([3])
        two = logits(edited.backbone)
        edited.redo([3])
        assert torch.equal(logits(edited.backbone), whole)
        edited.undo([3])
        config = edited.ledger.config
    with open_edits(ledger) as edited:
        assert torch.equal(logits(edited.backbone), two)
    options = EditOptions(config["editor"], ModelOptions(config["model"]["name"]))
    with begin_edits(tmp_path / "other", options) as other:
        other.edit(REQUESTS[:2])
        assert torch.equal(logits(other.backbone), two)


def test_a_damaged_shard_is_made_again(ledger):
    from mmedit_cli.knowledge.workflow.editing import compact
    from mmedit_cli.output import Output

    with open_edits(ledger) as edited:
        first = logits(edited.backbone)
    path = sorted((ledger / "shards").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(StateError, match="damaged"):
        open_edits(ledger)
    compact(ledger, True, ModelOptions(""), Output(quiet=True))
    with open_edits(ledger) as edited:
        assert torch.allclose(logits(edited.backbone), first, atol=1e-4)
        assert [edit.id for edit in edited.ledger.active] == [1, 2, 3]


def test_another_model_and_other_settings_are_refused(ledger):
    editor = Ledger.open(ledger).config["editor"]
    with pytest.raises(StateError, match="is another model"):
        open_edits(ledger, model=ModelOptions("tiny-llava"))
    with pytest.raises(UserError, match="were made in float32"):
        open_edits(ledger, model=ModelOptions("", dtype="bfloat16"))
    other = {"ft": "liveedit", "liveedit": "ft"}[editor]
    known = {"ft": "steps=3", "liveedit": "margin=9"}[editor]
    for options, words in (
        (
            EditOptions(other, ModelOptions("")),
            f"holds edits of {editor}, not of {other}",
        ),
        (EditOptions(editor, ModelOptions("tiny-llava")), "is another model"),
        (EditOptions(editor, ModelOptions(""), seed=5), "--seed 5"),
        (
            EditOptions(editor, ModelOptions(""), overrides=(known,)),
            known.partition("=")[0],
        ),
    ):
        with pytest.raises(StateError, match=words):
            begin_edits(ledger, options)
    with begin_edits(ledger, EditOptions(editor, ModelOptions(""))) as edited:
        assert edited.edit(REQUESTS[3:]) == [4]


def test_pictures_may_go_away_after_the_edit(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(REQUESTS[0].image.read_bytes())
    options = EditOptions("ft", ModelOptions("tiny-blip2"))
    with begin_edits(tmp_path / "edits", options) as edited:
        edited.edit([replace(REQUESTS[0], image=picture), REQUESTS[1]])
    picture.unlink()
    with open_edits(tmp_path / "edits", writing=True) as edited:
        edited.undo([2])
        assert edited.verify()[0]["holds"]


# -- damage is noticed before anything is written or removed ----------------------------------------------------------


def contents(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("damage", ["emptied", "gone", "older", "broken quote"])
def test_lost_lines_are_noticed_and_nothing_is_touched(tmp_path, rows, damage):
    with filled(tmp_path, 7, rows=rows):
        pass
    path = tmp_path / "edits.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "emptied": b"",
        "gone": b"",
        "older": b"".join(lines[:5]),
        "broken quote": path.read_bytes()[:-2] + b"\n",
    }
    path.write_bytes(damaged[damage])
    if damage == "gone":
        path.unlink()
    before = contents(tmp_path)
    for writing in (False, True):
        with pytest.raises((StateError, RunError), match=r"edits\.jsonl") as caught:
            Ledger.open(tmp_path, writing=writing)
        assert "copy" in caught.value.hint
    assert contents(tmp_path) == before
    path.write_bytes(b"".join(lines))
    with Ledger.open(tmp_path, writing=True) as ledger:
        assert values(ledger) == ([1, 2, 3, 4, 5, 6, 7] if rows else [7])


def test_an_old_ledger_has_no_seal_and_gets_one(tmp_path):
    with filled(tmp_path, 3):
        pass
    seal = tmp_path / "seal.json"
    seal.unlink()
    whole = (tmp_path / "edits.jsonl").read_bytes()
    (tmp_path / "edits.jsonl").write_bytes(b"")
    with pytest.raises(StateError, match="lines were lost"):
        Ledger.open(tmp_path, writing=True)
    (tmp_path / "edits.jsonl").write_bytes(whole)
    with Ledger.open(tmp_path, writing=True) as ledger:
        assert values(ledger) == [1, 2, 3]
    assert seal.is_file()
    seal.write_text("{")
    with pytest.raises(StateError, match=r"seal\.json: damaged"):
        Ledger.open(tmp_path)


def test_what_no_line_names_stays_until_compact(tmp_path):
    theirs = [
        tmp_path / part / name
        for part in ("shards", "pictures")
        for name in ("notes.txt", "photo.png")
    ]
    lost = [
        tmp_path / "shards" / f"{'0' * 64}.safetensors",
        tmp_path / "pictures" / f"{'1' * 64}.png",
    ]
    with filled(tmp_path, 3):
        for path in (*theirs, *lost):
            path.write_text("?")
    with Ledger.open(tmp_path, writing=True) as ledger:
        add(ledger, 4)
        ledger.mark("undo", [2])
    assert all(path.exists() for path in (*theirs, *lost))
    with Ledger.open(tmp_path, writing=True) as ledger:
        removed = ledger.rewrite(ledger.tensors(undone=True))
    assert removed["replaced"] == 4
    assert [row["file"] for row in removed["unnamed"]] == [
        f"shards/{lost[0].name}",
        f"pictures/{lost[1].name}",
    ]
    assert not any(path.exists() for path in lost)
    assert all(path.exists() for path in theirs), (
        "what this program did not create stays for ever"
    )


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize(
    "name", ["pictures", "shards", "edits.jsonl", "seal.json", ".lock"]
)
def test_nothing_is_written_or_removed_behind_a_link(tmp_path, name):
    folder, outside = tmp_path / "ledger", tmp_path / "outside"
    with filled(folder, 2):
        pass
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    if outside.is_dir():
        (outside / f"{'0' * 64}.png").write_text("mine")
        (outside / f"{'0' * 64}.safetensors").write_text("mine")
    before = contents(tmp_path), outside.is_dir()
    with pytest.raises((StateError, RunError), match=f"{name}: a link"):
        Ledger.open(folder, writing=True)
    assert (contents(tmp_path), outside.is_dir()) == before


def test_a_failing_edit_leaves_an_existing_ledger_alone_and_no_new_one(tmp_path):
    from mmedit_cli.errors import MmeditError
    from mmedit_cli.knowledge.workflow.editing import make_edits
    from mmedit_cli.output import Output

    options = EditOptions("ft", ModelOptions("tiny-blip2"))
    new, old = tmp_path / "new", tmp_path / "old"
    too_long = [replace(REQUESTS[0], target="word " * 3000)]
    for folder in (new, old):
        if folder == old:
            begin_edits(folder, options).close()
            (folder / "edits.jsonl").touch()  # a ledger without edits, as after a kill
        before = contents(folder) if folder.exists() else None
        with pytest.raises(MmeditError):
            make_edits(folder, options, too_long, None, Output(quiet=True))
        assert (contents(folder) if folder.exists() else None) == before
    with pytest.raises(MmeditError):
        begin_edits(
            tmp_path / "never", EditOptions("ft", ModelOptions("no-such-model"))
        )
    assert not (tmp_path / "never").exists()


# -- repair -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("damage", ["emptied", "older", "broken quote"])
def test_repair_takes_up_what_lost_its_lines(tmp_path, rows, damage, monkeypatch):
    from mmedit_cli.knowledge.workflow.repairing import repair

    monkeypatch.setattr("mmedit_cli.knowledge.ledger.ledger._PACKED", (4, 32))
    with filled(tmp_path, 7, rows=rows) as ledger:
        requests = {i: edit.request for i, edit in ledger.edits.items()}
    path = tmp_path / "edits.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "emptied": b"",
        "older": b"".join(lines[:5]),
        "broken quote": path.read_bytes()[:-2] + b"\n",
    }[damage]
    path.write_bytes(damaged)
    done = repair(tmp_path)
    assert done.taken_up == {
        "emptied": [1, 2, 3, 4, 5, 6, 7],
        "older": [5, 6, 7] if rows else [6, 7],
    }.get(damage, [7])
    assert (tmp_path / done.copy).read_bytes() == damaged
    assert done.without_tensors == []
    with Ledger.open(tmp_path, writing=True) as ledger:
        assert {i: edit.request for i, edit in ledger.edits.items()} == requests
        assert values(ledger) == ([1, 2, 3, 4, 5, 6, 7] if rows else [7])
        assert add(ledger, 8) == 8
    assert vars(repair(tmp_path)) == {
        "taken_up": [],
        "unreadable_lines": [],
        "without_tensors": [],
        "left": [],
        "copy": "",
    }


def test_repair_renumbers_what_would_take_the_place_of_another_edit(tmp_path):
    from mmedit_cli.knowledge.workflow.repairing import repair

    with filled(tmp_path, 2):
        lines = (tmp_path / "edits.jsonl").read_bytes()
    with Ledger.open(tmp_path, writing=True) as ledger:
        add(ledger, 3)
    (tmp_path / "edits.jsonl").write_bytes(lines)
    (tmp_path / "seal.json").unlink()  # as if it were of an older version
    with Ledger.open(tmp_path, writing=True) as ledger:
        add(ledger, 30)
    assert repair(tmp_path).taken_up == [4]
    with Ledger.open(tmp_path) as ledger:
        assert values(ledger) == [1, 2, 30, 3]


def test_repair_on_the_command_line(cli, tmp_path):
    with filled(tmp_path, 2):
        pass
    (tmp_path / "edits.jsonl").write_bytes(b"")
    code, _, error = cli("edits", "undo", tmp_path, "1")
    assert code == 2
    assert f"mmedit edits repair {tmp_path}" in error
    code, text, _ = cli("edits", "repair", tmp_path)
    assert (code, text.splitlines()[0]) == (
        0,
        "taken up: 2 edits (1, 2), as active: undo what had been undone",
    )
    assert cli("edits", "undo", tmp_path, "1")[0] == 0
    assert cli("edits", "repair", tmp_path, "--json")[0] == 0


# -- readers beside a writer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [True, False])
def test_a_reader_meets_every_moment_of_a_writer(tmp_path, rows, monkeypatch):
    """After each change that a writer makes to the file system, a reader gets the state before or the one after."""
    with filled(tmp_path, 5, rows=rows):
        pass
    states, failures = [], []

    def look(*_: object) -> None:
        try:
            with Ledger.open(tmp_path, tensors=True) as seen:
                found = (
                    [edit.id for edit in seen.active],
                    (seen.tensors()["row"][:, 0].tolist()),
                )
            states.append(found)
        except Exception as error:
            failures.append(repr(error))

    def watched(name):
        real = getattr(os, name)

        def call(*arguments, **keywords):
            done = real(*arguments, **keywords)
            with monkeypatch.context() as patch:  # the reader is not watched itself
                patch.setattr(os, name, real)
                look()
            return done

        monkeypatch.setattr(os, name, call)

    for name in ("replace", "fsync", "unlink"):
        watched(name)
    with Ledger.open(tmp_path, writing=True) as ledger:
        add(ledger, 6)
        ledger.mark("undo", [2], None if rows else tensors(70.0))
        ledger.rewrite(ledger.tensors(undone=True))
    monkeypatch.undo()
    assert failures == []
    before, added, undone = [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [1, 3, 4, 5, 6]
    wanted = [(ids, [float(i) for i in ids]) for ids in (before, added, undone)]
    if not rows:
        wanted = [(before, [5.0]), (added, [6.0]), (undone, [70.0])]
    assert len(states) > 20
    assert list({repr(state): state for state in states}.values()) == wanted


def test_a_reader_whose_shards_go_away_begins_again(tmp_path, monkeypatch):
    with filled(tmp_path, 3):
        pass
    read, times = Shards.read, []

    def slow(self, digest):
        if not times:  # between its lines and its tensors the ledger is compacted
            times.append(digest)
            with Ledger.open(tmp_path, writing=True) as ledger:
                ledger.rewrite(ledger.tensors(undone=True))
        return read(self, digest)

    monkeypatch.setattr(Shards, "read", slow)
    with Ledger.open(tmp_path, tensors=True) as seen:
        assert seen.tensors()["row"][:, 0].tolist() == [1, 2, 3]
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    with pytest.raises(
        StateError, match="cannot be read"
    ):  # nobody is at work: it is damaged
        Ledger.open(tmp_path, tensors=True)


@pytest.mark.parametrize("editor", ["ft"])
def test_of_two_first_writers_one_is_refused_and_the_other_is_whole(tmp_path, editor):
    options = EditOptions(editor, ModelOptions("tiny-blip2"))
    with begin_edits(tmp_path / "edits", options) as first:
        with pytest.raises(RunError, match="another process is writing"):
            begin_edits(tmp_path / "edits", options)
        first.edit(REQUESTS[:1])
    with begin_edits(tmp_path / "edits", options) as second:
        assert [edit.id for edit in second.ledger.active] == [1]
        assert second.edit(REQUESTS[1:2]) == [2]
        both = logits(second.backbone)
    with open_edits(tmp_path / "edits") as seen:
        assert torch.equal(logits(seen.backbone), both)
