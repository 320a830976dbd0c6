"""`mmedit image-edit`: pictures of every kind, lists that go on where they stopped, and nothing ever lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SHAPES
from PIL import ExifTags, Image

from mmedit_cli.output import Output
from mmedit_cli.picture_editing.workflow.editing import (
    PictureEditOptions,
    RequestedEdit,
    edit_pictures,
)

CIRCLE = SHAPES / "solid" / "red-circle.png"
FAST = ("instruct-pix2pix", "--model", "tiny-ip2p", "--steps", "1", "--device", "cpu")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo of 40 x 20 pixels that lies on its side: upright it is 20 wide and 40 high."""
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.new("RGB", (40, 20), "navy")
    picture.paste("orange", (0, 0, 20, 20))
    picture.save(path, exif=exif, quality=95)
    return path


def test_one_picture(cli, tmp_path, photo):
    code, out, err = cli(
        "image-edit",
        *FAST,
        "--image",
        photo,
        "make it winter",
        "-o",
        tmp_path / "out.png",
    )
    assert (code, out.strip()) == (0, str(tmp_path / "out.png")), err
    with Image.open(tmp_path / "out.png") as made:
        assert made.size == (20, 40)
        assert not made.getexif()


def test_a_large_photo_through_a_small_model_is_said_to_be_enlarged(cli, tmp_path):
    Image.new("RGB", (120, 90), "navy").save(tmp_path / "large.png")
    words = (
        "image-edit",
        *FAST,
        "--image",
        tmp_path / "large.png",
        "make it winter",
        "-o",
        tmp_path / "out.png",
    )
    code, _, err = cli(*words)
    assert (
        code,
        "worked at 32 x 24 pixels and the result is enlarged to 120 x 90" in err,
    ) == (0, True)
    assert "--working-size" in err
    assert "enlarged" not in cli(*words, "--force", "--working-size")[2]


def test_the_report(cli, tmp_path, photo):
    code, out, _ = cli(
        "image-edit",
        *FAST,
        "-i",
        photo,
        "make it winter",
        "-o",
        tmp_path / "o.png",
        "--seed",
        7,
        "--json",
    )
    assert code == 0
    report = json.loads(out)
    assert report["settings"] == {
        "steps": 1,
        "text_guidance": 7.5,
        "image_guidance": 1.5,
        "resolution": 32,
        "restore": True,
    }
    (edit,) = report["edits"]
    assert (edit["seed"], edit["rows"], edit["size"]) == (7, 3, [20, 40])
    assert len(edit["input_sha256"]) == len(edit["output_sha256"]) == 64


def test_samples_have_names_of_their_own_and_a_sheet_shows_them(cli, tmp_path, photo):
    code, out, err = cli(
        "image-edit",
        *FAST,
        "-i",
        photo,
        "make it winter",
        "-o",
        tmp_path / "o.png",
        "--samples",
        3,
        "--sheet",
        tmp_path / "sheet.png",
        "--seed",
        2,
    )
    assert code == 0, err
    assert [Path(line).name for line in out.split()] == [
        "o-2.png",
        "o-3.png",
        "o-4.png",
    ]
    assert len({(tmp_path / f"o-{i}.png").read_bytes() for i in (2, 3, 4)}) == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 400
        assert len(sheet.getcolors(1 << 20)) > 50


def test_nothing_is_overwritten_without_force(cli, tmp_path, photo):
    kept = tmp_path / "out.png"
    kept.write_text("mine")
    code, _, err = cli("image-edit", *FAST, "-i", photo, "make it winter", "-o", kept)
    assert code == 2
    assert "exists already" in err
    assert "--force" in err
    assert kept.read_text() == "mine"
    assert (
        cli("image-edit", *FAST, "-i", photo, "make it winter", "-o", kept, "--force")[
            0
        ]
        == 0
    )
    code, _, err = cli(
        "image-edit", *FAST, "-i", photo, "make it winter", "-o", photo, "--force"
    )
    assert code == 2
    assert "the output is the input" in err


def test_transparency(cli, tmp_path):
    glass = tmp_path / "glass.png"
    picture = Image.new("RGBA", (30, 30), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 15, 30))
    picture.save(glass)
    assert (
        cli(
            "image-edit", *FAST, "-i", glass, "make it winter", "-o", tmp_path / "a.png"
        )[0]
        == 0
    )
    more = ("--keep-alpha", "--background", "skyblue")
    assert (
        cli(
            "image-edit",
            *FAST,
            "-i",
            glass,
            "make it winter",
            "-o",
            tmp_path / "b.png",
            *more,
        )[0]
        == 0
    )
    with (
        Image.open(tmp_path / "a.png") as plain,
        Image.open(tmp_path / "b.png") as kept,
    ):
        assert plain.mode == "RGB"
        assert kept.getchannel("A").tobytes() == picture.getchannel("A").tobytes()
    code, _, err = cli(
        "image-edit", *FAST, "-i", glass, "x", "-o", tmp_path / "c.jpg", "--keep-alpha"
    )
    assert code == 2
    assert "JPEG has no transparency" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-i", "nowhere.png", "x", "-o", "o.png"), "nowhere.png: no such image"),
        (("-i", CIRCLE, "x", "-o", "o.xyz"), ".xyz is no format"),
        (("-i", CIRCLE, "x", "-o", "o.png", "--background", "blurple"), "not a colour"),
        (
            ("-i", CIRCLE, "x", "-o", "o.png", "--resolution", "5000"),
            "--resolution 5000",
        ),
        (("-i", CIRCLE, "-o", "o.png"), "no INSTRUCTION"),
        (("x", "-o", "o.png"), "no --image"),
        (("-i", CIRCLE, "--batch", "b.jsonl", "-o", "o"), "stand in the file"),
        (("-i", CIRCLE, "x" * 100, "-o", "o.png"), "102 tokens"),
        (
            ("-i", CIRCLE, "x", "-o", "o.png", "--model", "tiny-ip"),
            "did you mean tiny-ip2p",
        ),
        (
            ("-i", CIRCLE, "x", "-o", "o.png", "--dtype", "float8"),
            "not a number format",
        ),
    ],
)
def test_wrong_input_is_one_line(cli, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("image-edit", *FAST, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert not list(tmp_path.glob("o*"))


def test_an_editor_that_is_not_there(cli, tmp_path):
    code, _, err = cli(
        "image-edit", "instruct-pix2pox", "-i", CIRCLE, "x", "-o", tmp_path / "o.png"
    )
    assert code == 2
    assert (
        "unknown image editor 'instruct-pix2pox' (did you mean instruct-pix2pix?)"
        in err
    )


def test_a_picture_that_is_a_bomb_or_none_at_all(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    code, _, err = cli("image-edit", *FAST, "-i", CIRCLE, "x", "-o", tmp_path / "o.png")
    assert code == 2
    assert "exceeds limit" in err
    monkeypatch.undo()
    torn = tmp_path / "torn.png"
    torn.write_bytes(CIRCLE.read_bytes()[:60])
    code, _, err = cli("image-edit", *FAST, "-i", torn, "x", "-o", tmp_path / "o.png")
    assert code == 2
    assert "torn.png" in err


@pytest.fixture
def listed(tmp_path: Path, photo: Path) -> Path:
    file = tmp_path / "edits.jsonl"
    lines = [
        {"image": photo.name, "instruction": "make it winter"},
        {
            "image": str(CIRCLE),
            "instruction": "paint it blue",
            "output": "blue/circle.png",
            "seed": 4,
        },
        {"image": str(CIRCLE), "instruction": ""},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return file


def test_a_list(cli, tmp_path, listed):
    folder = tmp_path / "edited"
    code, out, err = cli(
        "image-edit", *FAST, "--batch", listed, "-o", folder, "--batch-size", 2
    )
    assert code == 0, err
    assert out.split() == ["00001-photo.png", "blue/circle.png", "00003-red-circle.png"]
    assert "empty instruction" in err
    assert all((folder / name).is_file() for name in out.split())


def test_a_list_goes_on_where_it_stopped(cli, tmp_path, listed):
    folder = tmp_path / "edited"
    whole = ("image-edit", *FAST, "--batch", listed, "-o", folder, "--json")
    first = json.loads(cli(*whole)[1])
    assert first["made"] == 3
    (folder / "blue" / "circle.png").unlink()
    lines = (folder / "edits.jsonl").read_text().splitlines(keepends=True)
    (folder / "edits.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    (folder / "00003-red-circle.png").unlink()
    again = json.loads(cli(*whole)[1])
    assert again["made"] == 2
    assert [e["output_sha256"] for e in again["edits"]] == [
        e["output_sha256"] for e in first["edits"]
    ]
    assert json.loads(cli(*whole)[1])["made"] == 0
    listed.write_text(
        listed.read_text().strip()
        + "\n"
        + json.dumps({"image": "photo.jpg", "instruction": "more"})
    )
    assert json.loads(cli(*whole)[1])["made"] == 1


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_list_is_repeated_after_a_kill_between_a_picture_and_its_line(
    cli, tmp_path, listed, monkeypatch, survivors
):
    from mmedit_cli.picture_editing.workflow import editing

    def pictures(folder):
        return {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*.png")
        }

    def killed(made):
        if len(pictures(tmp_path / "edited")) == survivors:
            raise KeyboardInterrupt
        write(made)

    write = editing._write
    words = ("image-edit", *FAST, "--batch", listed, "--batch-size", 2, "-o")
    assert cli(*words, tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(editing, "_write", killed)
        assert cli(*words, tmp_path / "edited")[0] == 130
    assert len(pictures(tmp_path / "edited")) == survivors
    code, _, err = cli(*words, tmp_path / "edited")
    assert code == 0, err
    assert pictures(tmp_path / "edited") == pictures(tmp_path / "whole")
    lines = [
        json.loads(line)
        for line in (tmp_path / "edited" / "edits.jsonl").read_text().splitlines()
    ]
    assert [line["output"] for line in lines] == [
        "00001-photo.png",
        "blue/circle.png",
        "00003-red-circle.png",
    ]


def test_a_replaced_picture_is_never_taken_for_the_new_one(
    cli, tmp_path, listed, monkeypatch
):
    from mmedit_cli.picture_editing.workflow import editing

    words = ("image-edit", *FAST, "--batch", listed, "-o", tmp_path / "edited")
    assert cli(*words)[0] == 0
    old = (tmp_path / "edited" / "00001-photo.png").read_bytes()
    listed.write_text(listed.read_text().replace("winter", "summer"))
    with monkeypatch.context() as patch:
        patch.setattr(
            editing, "_write", lambda made: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert cli(*words, "--force")[0] == 130
    assert cli(*words, "--force")[0] == 0
    assert (tmp_path / "edited" / "00001-photo.png").read_bytes() != old


def test_a_folder_is_made_one_way(cli, tmp_path, listed):
    folder = tmp_path / "edited"
    assert cli("image-edit", *FAST, "--batch", listed, "-o", folder)[0] == 0
    code, _, err = cli(
        "image-edit", *FAST, "--batch", listed, "-o", folder, "--tg", "3"
    )
    assert code == 2
    assert "different: settings" in err
    listed.write_text(listed.read_text().replace("winter", "summer"))
    code, _, err = cli("image-edit", *FAST, "--batch", listed, "-o", folder)
    assert code == 2
    assert "was made from another picture, instruction or seed" in err
    before = (folder / "00001-photo.png").read_bytes()
    assert cli("image-edit", *FAST, "--batch", listed, "-o", folder, "--force")[0] == 0
    assert (folder / "00001-photo.png").read_bytes() != before


def test_bad_lines_are_all_named(cli, tmp_path):
    file = tmp_path / "bad.jsonl"
    good = {"image": "a.png", "instruction": "x"}
    more = (
        {"output": "../out.png"},
        {"seed": -1},
        {"output": "o.png"},
        {"output": "o.png", "instruction": "y"},
    )
    records = [
        [],
        {"image": "a.png"},
        {**good, "image": 3},
        {"imag": "a", "instruction": "x"},
    ]
    lines = [
        "nonsense",
        *map(json.dumps, [*records, *({**good, **fields} for fields in more)]),
    ]
    file.write_text("\n".join(lines))
    code, _, err = cli("image-edit", *FAST, "--batch", file, "-o", tmp_path / "o")
    assert code == 2
    for number in (1, 2, 3, 4, 5, 6, 7, 9):
        assert f"bad.jsonl:{number}: " in err
    assert "did you mean image" in err
    assert "is not inside" in err
    assert not (tmp_path / "o").exists()


def test_a_kill_leaves_no_half_picture(tmp_path, monkeypatch):
    from mmedit_cli.picture_editing.methods.base import EditSettings
    from mmedit_cli.picture_editing.workflow import editing
    from mmedit_cli.runtime import LoadOptions

    wish = RequestedEdit(CIRCLE, "paint it blue", tmp_path / "o.png")
    options = PictureEditOptions(
        "instruct-pix2pix", "tiny-ip2p", LoadOptions(device="cpu"), EditSettings(1)
    )
    monkeypatch.setattr(
        editing, "write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        edit_pictures([wish], options, Output(quiet=True))
    assert not list(tmp_path.iterdir())
