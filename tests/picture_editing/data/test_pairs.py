"""Edit pairs from folders, records and shards, and those that EmojiKB makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHAPES
from PIL import Image, ImageChops, ImageOps

from mmedit_cli.errors import DataError, UserError
from mmedit_cli.picture_editing.data import emojikb_edits
from mmedit_cli.picture_editing.data.base import fingerprint
from mmedit_cli.picture_editing.data.opening import open_pairs

CIRCLE, STAR = SHAPES / "solid" / "red-circle.png", SHAPES / "solid" / "blue-star.png"
MANIFEST = json.loads((ROOT / "data" / "emojikb-edits" / "manifest.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two instructions in the layout of InstructPix2Pix, three pairs."""
    for name, seeds, told in (
        ("0001", (5, 9), {"edit": " turn it "}),
        ("0002", (1,), {"edit": "x", "input": "in"}),
    ):
        place = tmp_path / "pairs" / name
        place.mkdir(parents=True)
        (place / "prompt.json").write_text(json.dumps(told))
        for seed in seeds:
            Image.new("RGB", (8, 6), (seed, 0, 0)).save(place / f"{seed}_0.jpg")
            Image.new("RGB", (8, 6), (0, seed, 0)).save(place / f"{seed}_1.jpg")
    return tmp_path / "pairs"


def test_a_folder_of_instruct_pix2pix(folder):
    name, pairs = open_pairs(folder)
    assert name == "pairs"
    assert [(p.uid, p.instruction, p.caption) for p in pairs] == [
        ("0001/5", "turn it", ""),
        ("0001/9", "turn it", ""),
        ("0002/1", "x", "in"),
    ]
    assert pairs[0].source().size == (8, 6)
    assert pairs[0].source() != pairs[0].target()
    assert len(open_pairs(folder, limit=2)[1]) == 2
    before = fingerprint(pairs)
    Image.new("RGB", (8, 6), "white").save(folder / "0002" / "1_1.jpg")
    assert fingerprint(open_pairs(folder)[1]) != before


def test_all_that_is_wrong_in_a_folder_is_named(folder):
    (folder / "0001" / "9_1.jpg").unlink()
    (folder / "0002" / "prompt.json").write_text('{"edit": ""}')
    with pytest.raises(DataError) as caught:
        open_pairs(folder)
    assert len(caught.value.problems) == 2
    assert "its pair 9_1.jpg is missing" in caught.value.problems[0]
    assert "edit: must be a text that is not empty" in caught.value.problems[1]


def test_the_published_examples():
    path = ROOT.parent / "shared" / "data" / "mgie_examples"
    if not path.is_dir():
        pytest.skip("the published examples are not part of the repository")
    _, pairs = open_pairs(path)
    assert len(pairs) == 4
    assert {pair.instruction for pair in pairs} == {
        "Make it look like a painting",
        "make the painting into a mosaic",
    }
    assert all(pair.source().size == pair.target().size == (512, 512) for pair in pairs)


def test_records(tmp_path):
    file = tmp_path / "mine.jsonl"
    record = {
        "source": str(CIRCLE),
        "target": str(STAR),
        "instruction": "make it a blue star",
        "expressive": "a star",
    }
    file.write_text(json.dumps(record) + "\n")
    name, (pair,) = open_pairs(file)
    assert (name, pair.uid, pair.expressive) == ("mine", "1", "a star")
    file.write_text("\n".join(json.dumps({**record, "id": "a"}) for _ in range(2)))
    with pytest.raises(DataError, match="the id 'a' stands more than once"):
        open_pairs(file)
    bad = [
        {**record, "sorce": "x"},
        {**record, "target": "nowhere.png"},
        {**record, "instruction": " "},
        [],
        3,
    ]
    file.write_text("\n".join(json.dumps(line) for line in bad) + "\nnonsense")
    with pytest.raises(DataError) as caught:
        open_pairs(file)
    assert len(caught.value.problems) == 6
    assert "did you mean source" in caught.value.problems[0]


def test_shards_without_pyarrow_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pyarrow is not installed"):
        open_pairs(tmp_path)


def test_shards(tmp_path):
    import pyarrow
    from pyarrow import parquet

    files = [{"bytes": path.read_bytes(), "path": path.name} for path in (CIRCLE, STAR)]
    table = pyarrow.table(
        {"source_img": files, "target_img": files[::-1], "instruction": ["a", "b"]}
    )
    parquet.write_table(table, tmp_path / "train-00000.parquet", row_group_size=1)
    _, pairs = open_pairs(tmp_path)
    assert [pair.instruction for pair in pairs] == ["a", "b"]
    assert pairs[0].source() == pairs[1].target()


@pytest.mark.parametrize("data", ["nowhere", "emojikb-edit", "."])
def test_what_is_no_data(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no edit pairs"):
        open_pairs(data)


# -- emojikb-edits ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sides() -> dict[str, list]:
    return {
        split: open_pairs(f"emojikb-edits:{split}")[1] for split in emojikb_edits.SPLITS
    }


def test_they_are_those_of_the_manifest(sides):
    for split, pairs in sides.items():
        told = MANIFEST["splits"][split]
        assert (len(pairs), fingerprint(pairs)) == (told["pairs"], told["fingerprint"])
        assert {pair.kind for pair in pairs} == set(told["kinds"])
        assert len({pair.uid for pair in pairs}) == len(pairs)


def test_sides_share_no_concept_and_no_drawing():
    drawn: dict[str, set[str]] = {}
    for split in emojikb_edits.SPLITS:
        kb = emojikb_edits.load(split)
        found = drawn.setdefault(split, set())
        for concept in kb.concepts.values():
            for artist in concept["artists"]:
                for edit in emojikb_edits.edits(kb, concept, artist):
                    scenes = (edit.before, edit.after)
                    found |= {
                        sprite.concept for scene in scenes for sprite in scene.sprites
                    }
        assert found <= set(kb.concepts)
    assert not drawn["train"] & drawn["eval"]
    assert not drawn["train"] & drawn["val"]
    assert not drawn["val"] & drawn["eval"]


def test_each_says_what_it_does(sides):
    for pairs in sides.values():
        for pair in pairs:
            assert pair.instruction
            assert pair.expressive
            assert pair.caption
            assert pair.target_caption
            if pair.kind in emojikb_edits.AMBIGUOUS and pair.kind != "capital":
                assert pair.expressive not in pair.instruction


def test_who_does_not_see_the_picture_is_told_more(sides):
    plain = {pair.kind: pair.plain for pair in sides["train"]}
    assert {kind for kind, text in plain.items() if text} == {
        *emojikb_edits.AMBIGUOUS
    } - {"opposite-colour"}
    for pair in sides["train"]:
        if pair.kind == "opposite-background" and pair.answer:
            assert pair.plain == f"make the background {pair.answer}"
        if pair.kind == "another-artist":
            assert pair.plain == f"draw it in the style of {pair.answer}"


def test_pictures_are_made_as_told(sides):
    seen = {}
    for pair in sides["eval"]:
        seen.setdefault(pair.kind, pair)
    assert set(emojikb_edits.AMBIGUOUS) < set(seen)
    for kind, pair in seen.items():
        source, target = pair.source(), pair.target()
        assert source.size == target.size == (64, 64)
        assert (source.mode, target.mode) == ("RGB", "RGB")
        assert ImageChops.difference(source, target).getbbox() is not None, kind
        assert source == pair.source()
    assert seen["mirror"].target() == ImageOps.mirror(seen["mirror"].source())
    assert seen["turn"].target() == seen["turn"].source().rotate(180)
    colour = seen["background"].instruction.rpartition(" ")[2]
    kb = emojikb_edits.load("eval")
    wanted = tuple(bytes.fromhex(kb.colours[colour][1:]))
    colours = {rgb: count for count, rgb in seen["background"].target().getcolors(4096)}
    assert colours.get(wanted, 0) > colours.get((0, 0, 0), 0)


def test_the_order_is_mixed_and_fixed(sides):
    first = [pair.kind for pair in sides["eval"][:30]]
    assert len(set(first)) > 8
    assert [pair.uid for pair in open_pairs("emojikb-edits")[1][:30]] == [
        p.uid for p in sides["eval"][:30]
    ]


def test_a_neighbour_is_the_only_one_and_known():
    kb = {
        c["country"]
        for split in emojikb_edits.SPLITS
        for c in emojikb_edits.load(split).concepts.values()
        if "country" in c
    }
    unknown = {name for pair in emojikb_edits.NEIGHBOUR.items() for name in pair} - kb
    assert not unknown
