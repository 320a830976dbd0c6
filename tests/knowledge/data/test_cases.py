"""Reading cases: strict, with a place for every problem, and nothing outside the folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHAPES
from PIL import Image

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.base import fingerprint, load_cases, read_data
from mmedit_cli.pictures import Picture, check_picture, load_picture

GOOD = {"id": "1", "request": {"prompt": "What?", "target": "that"}}


def write(folder: Path, *records: object) -> Path:
    lines = [
        record if isinstance(record, str) else json.dumps(record) for record in records
    ]
    (folder / "cases.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_the_small_data_set_is_read_in_order():
    cases = load_cases(SHAPES)
    assert len(cases) == 24
    first = cases[0]
    assert (first.uid, first.type, first.place) == (
        "red-circle",
        "name",
        f"{SHAPES / 'cases.jsonl'}:1",
    )
    assert [column for column, _ in first.columns()] == [
        "reliability",
        "generality.text",
        "generality.image",
        "generality.both",
        "locality.text",
        "locality.image",
        "locality.near",
        "locality.same_image",
        "portability.1-hop",
    ]
    assert load_cases(SHAPES / "cases.jsonl", limit=3) == cases[:3]


def test_data_joined_by_a_plus_sign_take_turns(tmp_path):
    own = write(tmp_path, *({**GOOD, "id": str(i)} for i in range(3)))
    data = read_data(f"{SHAPES}+{own}")
    assert data.name == f"shapes+{tmp_path.name}"
    assert [case.uid for case in data.cases[:2]] == [
        "shapes:red-circle",
        f"{tmp_path.name}:0",
    ]
    assert len(data.cases) == 6, "as many of each as the shortest has"
    assert read_data(f"{SHAPES}+{own}", limit=3).cases == data.cases[:3]
    with pytest.raises(DataError, match="nowhere"):
        read_data(f"{SHAPES}+nowhere")


def test_the_small_data_set_is_what_its_script_draws(tmp_path):
    sys.path.insert(0, str(ROOT / "tests" / "data"))
    from make_shapes import write as draw

    draw(tmp_path)
    assert (tmp_path / "cases.jsonl").read_bytes() == (
        SHAPES / "cases.jsonl"
    ).read_bytes()
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert len(drawn) == 72
    for (
        path
    ) in drawn:  # pixels, because the bytes of a PNG depend on the version of zlib
        assert (
            Image.open(tmp_path / path).tobytes() == Image.open(SHAPES / path).tobytes()
        )


def test_blank_lines_are_skipped_and_separators_inside_texts_are_kept(tmp_path):
    odd = json.dumps(
        {**GOOD, "request": {"prompt": "a\u2028b", "target": "c"}}, ensure_ascii=False
    )
    assert load_cases(write(tmp_path, "", odd, ""))[0].request.prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("{", "cases.jsonl:2: not valid JSON"),
        ("[" * 10**5, "cases.jsonl:2: nested deeper than 64 levels"),
        ("[]", "cases.jsonl:2: must be an object"),
        ({"id": "2"}, "cases.jsonl:2: request is missing"),
        ({**GOOD, "id": 2}, "cases.jsonl:2: id: must be a text"),
        ({**GOOD, "id": "1"}, "cases.jsonl:2: id: '1' stands in line 1 already"),
        (
            {**GOOD, "id": "2", "generalty": {}},
            r"unknown key 'generalty' \(did you mean generality\?\)",
        ),
        ({**GOOD, "id": "2", "locality": []}, "locality: must map names to lists"),
        (
            {**GOOD, "id": "2", "locality": {"near": []}},
            "locality.near: must be a list of at least one query",
        ),
        (
            {"id": "2", "request": {"prompt": " ", "target": "x"}},
            "request.prompt: must be a text that is not empty",
        ),
        (
            {"id": "2", "request": {"prompt": "x", "target": ""}},
            "request.target: must be a text that is not empty",
        ),
        ({"id": "2", "request": {"prompt": "x"}}, "request: target is missing"),
        (
            {"id": "2", "request": {**GOOD["request"], "image": "gone.png"}},
            "gone.png: no such image",
        ),
        (
            {"id": "2", "request": {**GOOD["request"], "image": ["a", "b"]}},
            "several are not supported",
        ),
        (
            {"id": "2", "request": {**GOOD["request"], "image": "/etc/passwd"}},
            "lies outside the folder",
        ),
        (
            {"id": "2", "request": {**GOOD["request"], "image": "../x.png"}},
            "lies outside the folder",
        ),
        (
            {"id": "2", "request": {**GOOD["request"], "image": "link.png"}},
            "lies outside the folder",
        ),
        (
            {"id": "2", "request": {**GOOD["request"], "background": "red"}},
            "must be a colour such as #cfe8ff",
        ),
    ],
)
def test_a_bad_record_is_named_with_its_place(tmp_path, record, problem):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(SHAPES / "solid/red-circle.png")
    with pytest.raises(DataError, match=problem):
        load_cases(write(tmp_path / "data", GOOD, record))


def test_all_problems_come_at_once_but_not_endlessly(tmp_path):
    with pytest.raises(DataError) as caught:
        load_cases(write(tmp_path, *[{"id": str(i)} for i in range(50)]))
    assert len(caught.value.problems) == 21
    assert "30 more" in caught.value.problems[-1]


def test_missing_empty_and_foreign_files(tmp_path):
    with pytest.raises(DataError, match="no such file, folder or data set"):
        load_cases(tmp_path / "gone")
    with pytest.raises(DataError, match=r"did you mean emojikb\?"):
        load_cases("emojikbb")
    with pytest.raises(
        DataError, match=r"emojikb:evil: no such split \(did you mean eval\?\)"
    ):
        load_cases("emojikb:evil")
    with pytest.raises(DataError, match="no cases in it"):
        load_cases(write(tmp_path, ""))
    (tmp_path / "cases.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        load_cases(tmp_path)


def test_the_fingerprint_follows_content_not_place(tmp_path):
    copied = shutil.copytree(SHAPES, tmp_path / "copy")
    assert fingerprint(load_cases(copied)) == fingerprint(load_cases(SHAPES))
    Image.new("RGBA", (32, 32), "#123456").save(copied / "solid/red-circle.png")
    assert fingerprint(load_cases(copied)) != fingerprint(load_cases(SHAPES))
    assert fingerprint(load_cases(SHAPES, limit=3)) != fingerprint(load_cases(SHAPES))


def test_pictures_are_composed_upright_and_closed(tmp_path):
    see_through = Image.new("RGBA", (2, 1))
    see_through.putpixel((1, 0), (255, 0, 0, 255))
    see_through.save(tmp_path / "a.png")
    picture = load_picture(Picture(tmp_path / "a.png", "#00ff00"))
    assert (picture.mode, picture.getpixel((0, 0)), picture.getpixel((1, 0))) == (
        "RGB",
        (0, 255, 0),
        (255, 0, 0),
    )
    turned = Image.new("L", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert load_picture(Picture(tmp_path / "b.jpg")).size == (2, 4)
    for content in (b"", b"text", (SHAPES / "solid/red-circle.png").read_bytes()[:50]):
        (tmp_path / "c.png").write_bytes(content)
        with pytest.raises(DataError, match="not a readable image"):
            check_picture(tmp_path / "c.png")
    with pytest.raises(DataError, match="is a folder, not a file"):
        load_picture(Picture(tmp_path))
