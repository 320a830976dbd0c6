"""A folder of concepts: learned into, listed, forgotten from, damaged, and drawn with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmedit_cli.drawing.covariance import Covariance, default_path
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.workflow import generation
from mmedit_cli.drawing.workflow.concepts import (
    ConceptFolder,
    LearnOptions,
    learn_concept,
)
from mmedit_cli.errors import (
    DataError,
    HparamsError,
    ModelError,
    StateError,
    UnknownName,
    UserError,
)
from mmedit_cli.output import Output
from mmedit_cli.pictures import Picture, load_picture, photos_in
from mmedit_cli.types import Concept

QUIET = Output(quiet=True)
FEW = ("--steps", 2, "--json")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A place where the covariance is found, so that it need not be computed."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMEDIT_CACHE", str(folder))
    model = load_stable_diffusion("tiny-sd", device="cpu")
    path = default_path(model)
    path.parent.mkdir()
    Covariance(torch.eye(32).double(), source={"encoder": model.text_fingerprint}).save(
        path
    )
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (24, 24), (200, 40 * i, 30)).save(folder / f"{i}.jpg")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def learn(photos, tmp_path):
    def run(token="<my-dog>", editor="perfusion", folder=tmp_path / "mine", **more):
        concept = Concept(
            token, more.pop("superclass", "dog"), more.pop("images", photos_in(photos))
        )
        more = {"model": "tiny-sd", "device": "cpu", "overrides": ("steps=3",), **more}
        return learn_concept(
            LearnOptions(editor, concept=concept, folder=folder, **more), QUIET
        )

    return run


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_learning_writes_a_file_and_an_index(learn, tmp_path):
    entry = learn()
    folder = ConceptFolder.existing(tmp_path / "mine")
    assert folder.tokens == ["<my-dog>"]
    assert folder.head == {
        "format": 1,
        "editor": "perfusion",
        "model": "tiny-sd",
        "fingerprint": folder.head["fingerprint"],
    }
    assert folder.entries == [entry]
    assert (entry["file"], entry["superclass"], entry["steps"]) == (
        "my-dog.safetensors",
        "dog",
        3,
    )
    assert entry["bytes"] == (tmp_path / "mine" / "my-dog.safetensors").stat().st_size
    assert [image["name"] for image in entry["images"]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert entry["seconds"] > 0
    assert not list((tmp_path / "mine").glob("*.tmp"))


def test_the_command_learns_and_draws(cli, photos, tmp_path):
    words = (
        "edit",
        "perfusion",
        "--model",
        "tiny-sd",
        "--images",
        photos,
        "--superclass",
        "dog",
        "--device",
        "cpu",
        "--into",
        tmp_path / "mine",
        "--set",
        "steps=3",
    )
    code, out, _ = cli(*words, "--token", "<my-dog>", "--json")
    assert (code, json.loads(out)["token"]) == (0, "<my-dog>")
    assert (
        cli(
            "generate",
            "--edits",
            tmp_path / "mine",
            "a <my-dog>",
            "-o",
            tmp_path / "a.png",
            *FEW,
        )[0]
        == 0
    )
    for more, said in (
        (("--token", "<my-dog>"), "--force to replace it"),
        ((), "--token are needed"),
        (
            ("--token", "<my-cat>", "--target", "a cat"),
            "--target: means nothing to a personalizer",
        ),
    ):
        code, _, err = cli(*words, *more)
        assert (code, said in err) == (2, True), err


def test_photos_are_what_a_folder_has(photos, tmp_path):
    assert [path.name for path in photos_in(photos)] == ["0.jpg", "1.jpg", "2.jpg"]
    with pytest.raises(DataError, match="not a folder"):
        photos_in(photos / "0.jpg")
    with pytest.raises(DataError, match="no pictures"):
        photos_in(tmp_path)


def test_photos_of_other_formats_are_used_or_named(tmp_path, capfd):
    for name in ("a.gif", "b.TIFF", "c.avif"):
        Image.new("RGB", (16, 16), "#ff8000").save(tmp_path / name)
    for name in ("d.heic", "e.DNG", "notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    found = photos_in(tmp_path)
    assert [path.name for path in found] == ["a.gif", "b.TIFF", "c.avif"]
    for path in found:
        red, green, blue = load_picture(Picture(path)).getpixel((8, 8))
        assert (red > 240, 118 < green < 138, blue < 16) == (True, True, True), path
    assert (
        "left out, as they cannot be opened: d.heic, e.DNG; convert"
        in capfd.readouterr().err
    )
    for path in found:
        path.unlink()
    with pytest.raises(
        DataError, match=r"no pictures .*, and d.heic, e.DNG cannot be opened"
    ):
        photos_in(tmp_path)


def test_several_are_added_and_one_is_forgotten(learn, tmp_path):
    learn()
    learn("<a/../b>", superclass="toy")
    folder = ConceptFolder(tmp_path / "mine")
    assert folder.tokens == ["<my-dog>", "<a/../b>"]
    assert all(
        (tmp_path / "mine" / entry["file"]).is_file() for entry in folder.entries
    )
    with pytest.raises(StateError, match="is there already"):
        learn()
    again = learn(force=True, seed=5)
    assert ConceptFolder(tmp_path / "mine").tokens == ["<a/../b>", "<my-dog>"]
    folder.forget("<my-dog>")
    assert not (tmp_path / "mine" / again["file"]).exists()
    assert ConceptFolder(tmp_path / "mine").tokens == ["<a/../b>"]
    with pytest.raises(StateError, match=r"no concept <my-dog>"):
        folder.forget("<my-dog>")


def test_one_method_and_one_model_a_folder(learn, tmp_path):
    learn()
    before = (tmp_path / "mine" / "index.json").read_bytes()
    for more in ({"editor": "dreambooth-lora"}, {"model": "tiny-sdxl"}):
        with pytest.raises(StateError, match="holds concepts of perfusion for tiny-sd"):
            learn("<other>", **more)
    assert (tmp_path / "mine" / "index.json").read_bytes() == before


def test_a_second_concept_that_could_not_be_drawn_with_the_first_is_not_learned(
    learn, tmp_path, cache
):
    learn()
    (path,) = (cache / "covariance").glob("*")
    found = Covariance.load(path)
    Covariance(found.matrix + torch.ones(32, 32), source=found.source).save(path)
    with pytest.raises(
        StateError, match="<my-dog> was learned with another covariance"
    ):
        learn("<toy>")
    learn(force=True)
    learn("<whole>", editor="dreambooth", folder=tmp_path / "whole")
    with pytest.raises(StateError, match="holds <whole>, and dreambooth one concept"):
        learn("<toy>", editor="dreambooth", folder=tmp_path / "whole")


def test_bad_input_costs_nothing(learn, tmp_path):
    for more, error in [
        ({"editor": "prefusion"}, UnknownName),
        ({"model": "tiny-blip2"}, ModelError),
        ({"overrides": ("steps=0",)}, HparamsError),
        ({"token": "my dog"}, DataError),
        ({"images": ()}, DataError),
        ({"superclass": ""}, DataError),
        ({"dtype": "float16"}, UserError),
        ({"covariance": tmp_path / "none.safetensors"}, StateError),
    ]:
        with pytest.raises(error):
            learn(**more)
    assert not (tmp_path / "mine" / "index.json").exists()


def test_damaged_folders_are_named(learn, tmp_path, cli):
    entry, mine = learn(), tmp_path / "mine"
    model = load_stable_diffusion("tiny-sd", device="cpu")
    index, data = (mine / "index.json").read_text(), (mine / entry["file"]).read_bytes()
    (mine / entry["file"]).write_bytes(data[:-4] + b"abcd")
    with pytest.raises(StateError, match="not the file that was saved"):
        ConceptFolder(mine).load(model)
    (mine / entry["file"]).write_bytes(data)
    (tmp_path / "outside.safetensors").write_bytes(data)
    (mine / "index.json").write_text(
        index.replace('"my-dog.safetensors"', '"../outside.safetensors"')
    )
    with pytest.raises(StateError, match=r"no file '\.\./outside"):
        ConceptFolder(mine).load(model)
    (mine / "index.json").write_text(index.replace('"format": 1', '"format": 2'))
    with pytest.raises(StateError, match="format 2"):
        ConceptFolder(mine)
    for text in (
        "{",
        "[]",
        '{"format": 1}',
        '{"format":1,"editor":"x","model":"y","fingerprint":"z","concepts":[1]}',
    ):
        (mine / "index.json").write_text(text)
        code, _, talk = cli(
            "generate", "a dog", "--edits", mine, "-o", tmp_path / "x.png"
        )
        assert code == 2
        assert talk.startswith(f"error: {mine / 'index.json'}"), talk
    assert model.words == {}


def test_without_a_covariance_one_is_computed_and_kept(learn, cache, monkeypatch):
    (path,) = (cache / "covariance").glob("*")
    path.unlink()
    monkeypatch.setattr(
        "mmedit_cli.drawing.covariance.read_captions",
        lambda _path: iter(["a dog", "a red toy on a table"]),
    )
    learn()
    assert load_file(path)["matrix"].shape == (32, 32)


@pytest.mark.parametrize(
    "editor",
    [
        "perfusion",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("dreambooth", "dreambooth-lora", "multi-melo-diffusion")
        ),
    ],
)
def test_drawing_with_concepts(learn, cli, tmp_path, editor):
    learn(editor=editor, overrides=("steps=10",))
    words = ("--edits", tmp_path / "mine", *FEW)
    code, text, talk = cli(
        "generate",
        "a <my-dog>",
        "a cat",
        *words,
        "--seeds",
        "1,2",
        "-o",
        tmp_path / "all",
        "--compare",
    )
    assert code == 0, talk
    done = json.loads(text)
    assert done["concepts"] == ["<my-dog>"]
    names = [path.rpartition("/")[2] for path in done["files"]]
    assert names == [
        f"{i:03d}-{s}-{side}.png"
        for i in (0, 1)
        for side in ("base", "edited")
        for s in (1, 2)
    ]
    shown = {name: picture(tmp_path / "all" / name) for name in names}
    assert not np.array_equal(shown["000-1-base.png"], shown["000-1-edited.png"])
    with Image.open(tmp_path / "all" / "000-1-base.png") as base:
        assert base.info["mmedit:prompt"] == "a dog"
    if editor in ("perfusion", "multi-melo-diffusion"):
        assert np.array_equal(shown["001-2-base.png"], shown["001-2-edited.png"])
    code, text, _ = cli(
        "generate",
        "a dog",
        "a cat",
        "--model",
        "tiny-sd",
        *FEW,
        "--seeds",
        "1,2",
        "-o",
        tmp_path / "b",
    )
    assert np.array_equal(
        picture(tmp_path / "b" / "000-1-base.png"), shown["000-1-base.png"]
    ), "the plain word"


def test_gates_can_be_set_when_drawing(learn, cli, tmp_path):
    learn()
    files = []
    for beta in (0.4, 0.4, 0.9):
        files.append(tmp_path / f"{len(files)}.png")
        code, _, _ = cli(
            "generate",
            "a <my-dog>",
            "--edits",
            tmp_path / "mine",
            "--set",
            f"beta={beta}",
            *FEW,
            "-o",
            files[-1],
        )
        assert code == 0
    one, same, other = map(picture, files)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_sheet_has_a_row_a_prompt_and_side(learn, cli, tmp_path):
    learn()
    path = tmp_path / "sheet.png"
    words = (
        "generate",
        "a <my-dog>",
        "a cat",
        "--edits",
        tmp_path / "mine",
        "--seeds",
        "0,1,2",
        "-o",
        path,
    )
    assert cli(*words, *FEW, "--compare")[0] == 0
    with Image.open(path) as image:
        assert image.width == 8 + 3 * (16 + 8)
        assert image.info["mmedit:prompt"] == "a <my-dog> | a cat"
        assert image.info["mmedit:seed"] == "0,1,2"
    before = path.read_bytes()
    code, _, talk = cli(*words, *FEW)
    assert (code, "there already" in talk) == (2, True)
    assert path.read_bytes() == before
    code, text, _ = cli(*words, "--steps", 2, "--force")
    assert (code, text.strip()) == (0, str(path))


def test_a_prompt_that_names_two_makes_a_wide_picture(learn, cli, tmp_path):
    learn(editor="multi-melo-diffusion")
    learn("<toy>", "multi-melo-diffusion")
    words = (
        "generate",
        "a <my-dog> and a <toy>",
        "a cat",
        "--edits",
        tmp_path / "mine",
        *FEW,
        "--compare",
    )
    assert cli(*words, "-o", tmp_path / "sheet.png")[0] == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == 8 + 24 + 8
    code, text, talk = cli(*words, "-o", tmp_path / "files", "--json")
    assert (code, "a window for each subject: 'a <my-dog>', 'a <toy>'" in talk) == (
        0,
        True,
    )
    assert json.loads(text)["windows"] == {
        "a <my-dog> and a <toy>": ["a <my-dog>", "a <toy>"]
    }
    with Image.open(tmp_path / "files" / "000-0-edited.png") as image:
        assert image.info["mmedit:prompt"] == "a <my-dog> | a <toy>"
    sizes = {path.stem: picture(path).shape for path in (tmp_path / "files").iterdir()}
    assert sizes == {
        "000-0-base": (16, 16, 3),
        "000-0-edited": (16, 24, 3),
        "001-0-base": (16, 16, 3),
        "001-0-edited": (16, 16, 3),
    }


def test_a_place_the_system_refuses_is_named(cli, photos, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, talk = cli(
        "edit",
        "multi-melo-diffusion",
        "--model",
        "tiny-sd",
        "--images",
        photos,
        "--superclass",
        "dog",
        "--token",
        "<my-dog>",
        "--into",
        tmp_path / "file" / "mine",
        "--device",
        "cpu",
    )
    assert (code, "report it" in talk) == (2, False)
    assert f"error: {tmp_path / 'file'}" in talk
    assert "may you write to it?" in talk


def test_places_for_pictures(cli, tmp_path, monkeypatch):
    words = ("generate", "a dog", "a dog", "--model", "tiny-sd", *FEW, "--seeds", "3,1")
    folder = tmp_path / "v1.5"
    folder.mkdir()
    code, text, _ = cli(*words, "-o", folder)
    assert (code, [Path(file).name for file in json.loads(text)["files"]]) == (
        0,
        ["000-3-base.png", "000-1-base.png"],
    )
    monkeypatch.setitem(generation.LONGEST, ".webp", 30)
    code, text, _ = cli(*words, "-o", tmp_path / "long.webp")
    assert (code, json.loads(text)["files"]) == (0, [str(tmp_path / "long.webp.png")])
    assert picture(tmp_path / "long.webp.png").shape[1] > 30
    (tmp_path / "file").write_text("x")
    code, _, talk = cli(*words, "-o", tmp_path / "file" / "x")
    assert (code, "loading" in talk, f"{tmp_path / 'file'}: not a folder" in talk) == (
        2,
        False,
        True,
    )
    monkeypatch.setattr("os.access", lambda *_: False)
    code, _, talk = cli(*words, "-o", tmp_path / "x.png")
    assert (code, "loading" in talk, f"{tmp_path}: cannot be written to" in talk) == (
        2,
        False,
        True,
    )


def test_a_single_picture_is_the_picture_itself(cli, tmp_path):
    for name in ("one.png", "one.jpg", "one.webp"):
        assert (
            cli("generate", "a dog", "--model", "tiny-sd", *FEW, "-o", tmp_path / name)[
                0
            ]
            == 0
        )
        assert picture(tmp_path / name).shape == (16, 16, 3)


def test_what_cannot_be_drawn(learn, cli, tmp_path):
    learn()
    mine = ("--edits", tmp_path / "mine")
    for words, said in [
        (("a <my-dig>", *mine), "no concept <my-dig> (did you mean <my-dog>?)"),
        (("a <my-dog>", "--model", "tiny-sd"), "no concept <my-dog>"),
        (
            ("a dog", "--model", "tiny-sd", "--compare"),
            "--compare: there are no concepts",
        ),
        (
            ("a dog", "--model", "tiny-sd", "--set", "beta=1"),
            "--set: there are no concepts",
        ),
        (("a dog", "--edits", tmp_path), "no concepts here"),
        (
            ("a dog", *mine, "--model", "tiny-sdxl"),
            "made for tiny-sd, this is tiny-sdxl",
        ),
        (("a dog", "--model", "tiny-blip2"), "draws nothing"),
        (("a dog", "--model", "tiny-sd", "--size", 36), "not a multiple of 8"),
        (("a dog", "--model", "tiny-sd", "--seeds", "x"), "not whole numbers"),
        (
            ("a dog", "--model", "tiny-sd", "--seeds", ""),
            "the argument behind --seeds is empty",
        ),
        (("a dog", "--model", "tiny-sd", "--seeds", "9" * 30), "not whole numbers"),
        (("dog " * 30 + "<my-dog>", *mine), "stands beyond the 24 tokens"),
        (("a dog", *mine, "--set", "bata=1"), "unknown key 'bata'"),
    ]:
        code, _, talk = cli("generate", *words, *FEW, "-o", tmp_path / "x.png")
        assert (code, said in talk) == (2, True), talk
    for output, said in (
        ("no/where.png", "no such folder"),
        ("x.txt", "not a kind of picture"),
    ):
        code, _, talk = cli(
            "generate", "a dog", "--model", "tiny-sd", *FEW, "-o", tmp_path / output
        )
        assert (code, said in talk) == (2, True), talk
    assert not (tmp_path / "x.png").exists()


def test_a_model_folder_is_found_again_from_anywhere(learn, cli, tmp_path, monkeypatch):
    model = load_stable_diffusion("tiny-sd", device="cpu")
    model.pipe.save_pretrained(tmp_path / "my-sd")
    monkeypatch.chdir(tmp_path)
    learn(model="my-sd", editor="dreambooth-lora")
    monkeypatch.chdir("/")
    assert (
        cli(
            "generate",
            "a <my-dog>",
            "--edits",
            tmp_path / "mine",
            *FEW,
            "-o",
            tmp_path / "x.png",
        )[0]
        == 0
    )


def test_the_list_shows_who_learns_concepts(cli):
    listed = json.loads(cli("list", "--json")[1])
    assert {row["personalizer"] for row in listed["personalizers"]} >= {
        "perfusion",
        "dreambooth",
    }
    assert all("stable-diffusion" not in row["models"] for row in listed["editors"])


def test_a_foreign_safetensors_file_is_refused(learn, tmp_path):
    entry = learn()
    path = tmp_path / "mine" / entry["file"]
    save_file({"x": torch.ones(1)}, path)
    index = json.loads((tmp_path / "mine" / "index.json").read_text())
    import hashlib

    data = path.read_bytes()
    index["concepts"][0] |= {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    (tmp_path / "mine" / "index.json").write_text(json.dumps(index))
    with pytest.raises(StateError, match="made with format None"):
        ConceptFolder(tmp_path / "mine").load(
            load_stable_diffusion("tiny-sd", device="cpu")
        )


def test_concepts_are_listed_forgotten_and_exported(learn, cli, tmp_path):
    mine = tmp_path / "mine"
    learn(editor="multi-melo-diffusion")
    learn("<toy>", editor="multi-melo-diffusion", superclass="stuffed animal")
    code, text, _ = cli("edits", "list", mine)
    assert (code, "<toy>" in text, "stuffed animal" in text) == (0, True, True)
    assert [
        e["token"]
        for e in json.loads(cli("edits", "list", mine, "--json")[1])["concepts"]
    ] == [
        "<my-dog>",
        "<toy>",
    ]
    code, text, _ = cli(
        "edits", "export", mine, "--to", tmp_path / "lora", "--device", "cpu", "--json"
    )
    assert (code, len(json.loads(text)["written"])) == (0, 2)
    called = {entry["identifier"] for entry in ConceptFolder(mine).entries}
    assert {
        w["called"].partition(" ")[0] for w in json.loads(text)["written"]
    } == called
    pipe = load_stable_diffusion("tiny-sd", device="cpu").pipe
    pipe.load_lora_weights(tmp_path / "lora" / "toy.safetensors")
    code, _, err = cli("edits", "export", mine, "--to", tmp_path / "lora")
    assert (code, "there already" in err) == (2, True)
    code, _, err = cli("edits", "undo", mine, "<tay>")
    assert (code, "did you mean <toy>" in err) == (2, True)
    assert "forgotten: <toy>; 1 left" in cli("edits", "undo", mine, "<toy>")[1]
    assert ConceptFolder(mine).tokens == ["<my-dog>"]


def test_only_a_lora_is_exported_as_one(learn, cli, tmp_path):
    learn()
    code, _, err = cli("edits", "export", tmp_path / "mine", "--to", tmp_path / "lora")
    assert (code, "concepts of perfusion are no LoRA" in err) == (2, True)


def test_no_two_concepts_of_a_folder_get_one_identifier(learn, monkeypatch, tmp_path):
    taken = []

    def named(_tokenizer, token, others):
        taken.append(set(others))
        return f"sks{len(taken)}"

    monkeypatch.setattr(
        "mmedit_cli.drawing.methods.multi_melo_diffusion.personalizer.identifier", named
    )
    learn(editor="multi-melo-diffusion")
    learn("<toy>", editor="multi-melo-diffusion")
    learn("<toy>", editor="multi-melo-diffusion", force=True)
    assert taken == [set(), {"sks1"}, {"sks1"}]


# -- nothing outside, nothing lost, readers beside a writer --


@pytest.mark.parametrize(
    "file",
    ["../../outside/victim.txt", "/etc/hostname", "..", "a\\b.safetensors", "C:x"],
)
def test_an_index_that_points_outside_is_refused(learn, cli, tmp_path, file):
    learn()
    victim = tmp_path.parent / f"{tmp_path.name}-victim.txt"
    victim.write_text("mine")
    index = tmp_path / "mine" / "index.json"
    content = json.loads(index.read_text())
    content["concepts"][0]["file"] = (
        f"../../{victim.name}" if "victim" in file else file
    )
    index.write_text(json.dumps(content))
    for words in (("undo", tmp_path / "mine", "<my-dog>"), ("list", tmp_path / "mine")):
        code, _, err = cli("edits", *words)
        assert (code, "in the folder can be meant" in err) == (2, True), err
    assert victim.read_text() == "mine"
    victim.unlink()


def test_forgetting_removes_only_what_learning_wrote(learn, tmp_path):
    learn()
    folder, victim = tmp_path / "mine", tmp_path / "victim"
    victim.write_text("mine")
    file = folder / "my-dog.safetensors"
    file.unlink()
    file.symlink_to(victim)
    with pytest.raises(StateError, match="no file 'my-dog"):
        ConceptFolder(folder).load(load_stable_diffusion("tiny-sd", device="cpu"))
    ConceptFolder(folder).forget("<my-dog>")
    assert (victim.read_text(), file.is_symlink()) == ("mine", True)
    learn()
    index = folder / "index.json"
    content = json.loads(index.read_text())
    (folder / "thesis.tex").write_text("mine")
    content["concepts"][0]["file"] = "thesis.tex"
    index.write_text(json.dumps(content))
    ConceptFolder(folder).forget("<my-dog>")
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_kill_between_the_index_and_the_file_leaves_nothing_behind(
    learn, cli, tmp_path, monkeypatch
):
    def killed(path):
        raise KeyboardInterrupt

    mine = tmp_path / "mine"
    for token in ("<my-dog>", "<toy>"):
        learn(token, editor="multi-melo-diffusion")
    with monkeypatch.context() as patch:
        patch.setattr("mmedit_cli.drawing.workflow.concepts.remove_file", killed)
        assert cli("edits", "undo", mine, "<my-dog>")[0] == 130
    assert (mine / "my-dog.safetensors").exists()
    code, _, err = cli("edits", "undo", mine, "<my-dog>")
    assert (code, "no concept <my-dog>" in err) == (2, True)
    assert [path.name for path in mine.glob("*.safetensors")] == ["toy.safetensors"]
    assert "leaving" not in (mine / "index.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("mmedit_cli.drawing.workflow.concepts.remove_file", killed)
        with pytest.raises(KeyboardInterrupt):
            learn("<toy>", editor="multi-melo-diffusion", force=True, seed=5)
    (replaced,) = ConceptFolder(mine).entries
    learn("<toy>", editor="multi-melo-diffusion", force=True, seed=5)
    assert [path.name for path in mine.glob("*.safetensors")] == [replaced["file"]]
    assert [entry["file"] for entry in ConceptFolder(mine).entries] == [
        replaced["file"]
    ]


def test_a_reader_beside_a_writer_gets_what_was_or_what_is(learn, tmp_path):
    learn(editor="multi-melo-diffusion")
    learn("<toy>", editor="multi-melo-diffusion")
    model = load_stable_diffusion("tiny-sd", device="cpu")
    seen = ConceptFolder(tmp_path / "mine")
    first = {entry["token"]: entry["file"] for entry in seen.entries}
    learn("<my-dog>", editor="multi-melo-diffusion", force=True, seed=5)
    with seen.load(model) as personalizer:  # its file of <my-dog> is gone
        assert set(personalizer.concepts) == {"<my-dog>", "<toy>"}
    again = {entry["token"]: entry["file"] for entry in seen.entries}
    assert again["<my-dog>"] != first["<my-dog>"]
    assert sorted(
        path.name for path in (tmp_path / "mine").glob("*.safetensors")
    ) == sorted(again.values())
    ConceptFolder(tmp_path / "mine").forget("<my-dog>")
    with seen.load(model) as personalizer:
        assert set(personalizer.concepts) == {"<toy>"}
    (tmp_path / "mine" / again["<toy>"]).write_bytes(b"?")
    with pytest.raises(StateError, match="not the file that was saved"):
        seen.load(model)
