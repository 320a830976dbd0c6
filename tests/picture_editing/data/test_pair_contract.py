"""What every set of edit pairs promises, wherever it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SHAPES
from PIL import Image

from mmedit_cli.errors import DataError
from mmedit_cli.picture_editing.data import opening
from mmedit_cli.picture_editing.data.base import EditPair, fingerprint
from mmedit_cli.picture_editing.data.opening import open_pairs

PICTURES = [SHAPES / "solid" / f"{name}.png" for name in ("red-circle", "blue-star")]
MOST = 20


def instruct_pix2pix(folder: Path) -> str:
    for name in ("0001", "0002"):
        place = folder / name
        place.mkdir(parents=True)
        (place / "prompt.json").write_text(json.dumps({"edit": f"turn it {name}"}))
        for number, side in enumerate(("0", "1")):
            shade = (int(name), 90 * number, 0)
            Image.new("RGB", (8, 6), shade).save(place / f"5_{side}.jpg")
    return str(folder)


def records(folder: Path) -> str:
    folder.mkdir()
    file = folder / "mine.jsonl"
    rows = [
        {"source": str(a), "target": str(b), "instruction": f"make it {b.stem}"}
        for a, b in (PICTURES, PICTURES[::-1])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def shards(folder: Path) -> str:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    files = [{"bytes": path.read_bytes(), "path": path.name} for path in PICTURES]
    columns = {"source_img": files, "target_img": files[::-1]}
    table = pyarrow.table({**columns, "instruction": ["turn it", "turn it back"]})
    parquet.write_table(table, folder / "train-00000.parquet")
    return str(folder)


def edits_of_emojikb(_folder: Path) -> str:
    return "emojikb-edits:val"  # the smallest side


SOURCES = (instruct_pix2pix, records, shards, edits_of_emojikb)


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.__name__)
def again(request, tmp_path_factory) -> Callable[..., list[EditPair]]:
    """Open the pairs, once more with every call."""
    data = request.param(tmp_path_factory.mktemp("set") / "pairs")
    return lambda limit=MOST: open_pairs(data, limit=limit)[1]


@pytest.fixture(scope="module")
def pairs(again) -> list[EditPair]:
    """The pairs, opened once for all tests."""
    return again()


def test_every_name_has_a_source_here(tmp_path):
    names = {source(tmp_path / source.__name__) for source in SOURCES}
    assert set(opening.NAMED) <= {name.partition(":")[0] for name in names}


def test_every_pair_has_a_name_of_its_own_and_an_instruction(pairs):
    assert len({pair.uid for pair in pairs}) == len(pairs) > 1
    assert all(pair.instruction.strip() and pair.place for pair in pairs)


def test_both_pictures_are_upright_colours_and_differ(pairs):
    for pair in pairs:
        source, target = pair.source(), pair.target()
        assert source.mode == target.mode == "RGB"
        assert source.size == target.size
        assert source != target
        assert pair.source() == source, "loaded anew, it is the same"


def test_what_tells_whether_an_edit_was_made_has_question_and_answer(pairs):
    assert all(bool(pair.question) == bool(pair.answer) for pair in pairs)


def test_pairs_are_known_by_their_content(again, pairs):
    assert len({pair.digest for pair in pairs}) > 1
    assert fingerprint(again()) == fingerprint(pairs)
    for change in ({"instruction": "other"}, {"digest": "other"}):
        changed = [replace(pairs[0], **change), *pairs[1:]]
        assert fingerprint(changed) != fingerprint(pairs)


def test_a_limit_takes_the_first(again, pairs):
    assert [p.uid for p in again(limit=1)] == [pairs[0].uid]


def test_a_name_that_is_nearly_right_is_suggested():
    for name in opening.NAMED:
        with pytest.raises(DataError, match=f"did you mean {name}"):
            open_pairs(f"{name}x")
