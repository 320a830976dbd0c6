"""A folder of concept edits: made, listed, undone, redone, damaged, drawn with and exported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmedit_cli.drawing.models.foreign_lora import ldm_key
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.workflow.concept_edits import (
    ConceptEditOptions,
    ConceptEdits,
    make_edits,
)
from mmedit_cli.errors import StateError, UserError
from mmedit_cli.output import Output
from mmedit_cli.types import ConceptChange

QUIET = Output(quiet=True)
DOG = ConceptChange("a dog", ("a red cat",), ("a boot",))
TOY = ConceptChange("a toy", ())
CAT = ConceptChange("a cat", ("a boot", "a backpack"))


@pytest.fixture(scope="module")
def model():
    return load_stable_diffusion("tiny-sd", device="cpu")


def make(folder, *changes, editor="uce", **more):
    more = {"model": "tiny-sd", "device": "cpu", **more}
    return make_edits(
        ConceptEditOptions(editor, changes=changes, folder=folder, **more), QUIET
    )


def weights(folder, model):
    with ConceptEdits.existing(folder).load(model) as editor:
        return editor.changed_weights()


def same(one, other):
    return one.keys() == other.keys() and all(
        map(torch.equal, one.values(), other.values())
    )


METHODS = (
    "uce",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("time", "rece", "speed")),
)


@pytest.mark.parametrize("editor", METHODS)
def test_edits_are_kept_one_by_one_and_undone_exactly(tmp_path, model, editor):
    one, other = tmp_path / "one", tmp_path / "other"
    first = make(one, DOG, editor=editor)
    assert [edit["id"] for edit in first["edits"]] == [1]
    assert first["edits"][0]["keep"] == ["a boot"]
    # the model and the hyper-parameters of the folder are those of the next edits
    assert make(one, TOY, CAT, model="", editor=editor)["active"] == 3
    make(other, DOG, CAT, editor=editor)
    folder = ConceptEdits.existing(one)
    everything = weights(one, model)
    assert folder.mark("2", active=False) == [2]
    assert same(weights(one, model), weights(other, model))
    assert ConceptEdits(one).mark("all", active=True) == [2]
    assert same(weights(one, model), everything)
    ConceptEdits(one).mark("1-3", active=False)
    assert weights(one, model) == {}
    assert not list(one.glob("*.tmp"))


def test_the_commands(cli, tmp_path):
    folder = tmp_path / "edits"
    words = ("edit", "uce", "--into", folder, "--model", "tiny-sd", "--device", "cpu")
    code, out, _ = cli(*words, "--erase", "a dog, a cat", "--keep", "a boot", "--json")
    assert code == 0
    assert [edit["source"] for edit in json.loads(out)["edits"]] == ["a dog", "a cat"]
    code, out, _ = cli("edits", "undo", folder, "last")
    assert (code, out.strip()) == (0, "undone: 2; 1 active")
    code, out, _ = cli("edits", "list", folder, "--json")
    assert [edit["id"] for edit in json.loads(out)["edits"]] == [1]
    code, out, _ = cli("edits", "list", folder, "--all")
    assert "'a cat'" in out
    assert "undone" in out
    code, out, _ = cli("edits", "redo", folder, "2")
    assert (code, out.strip()) == (0, "redone: 2; 2 active")
    pictures = tmp_path / "pictures"
    few = ("--steps", 2, "--device", "cpu", "-o", pictures, "--compare")
    code, _, _ = cli("generate", "--edits", folder, "a dog", *few)
    assert code == 0
    base, edited = (pictures / f"000-0-{side}.png" for side in ("base", "edited"))
    with Image.open(base) as one, Image.open(edited) as other:
        assert not np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["uce", "time", "rece", "speed"])
def test_one_of_fifty_edits_is_undone_exactly(cli, tmp_path, model, editor):
    """Made at once from a file, some erased and some drawn as others; without the 25th they are 49 from the start."""
    words = ["dog", "cat", "toy", "boot", "snow"]
    texts = [f"a {one} {other}" for one in words for other in words]
    texts += [f"the {text[2:]}" for text in texts]
    rows = [
        f"{text},{'a beach' if i % 2 else ''},a teapot" for i, text in enumerate(texts)
    ]
    for name, some in (("all", rows), ("less", rows[:24] + rows[25:])):
        table = tmp_path / f"{name}.csv"
        table.write_text("\n".join(["prompt,target,keep", *some]))
        code, out, err = cli(
            *("edit", editor, "--model", "tiny-sd", "--device", "cpu"),
            *("--requests", table, "--into", tmp_path / name, "--json"),
        )
        assert code == 0, err
        assert json.loads(out)["active"] == len(some)
    everything = weights(tmp_path / "all", model)
    assert cli("edits", "undo", tmp_path / "all", "25")[0] == 0
    assert same(weights(tmp_path / "all", model), weights(tmp_path / "less", model))
    assert cli("edits", "redo", tmp_path / "all", "25")[0] == 0
    assert same(weights(tmp_path / "all", model), everything)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,target\n,a rose\n", "a.csv:2: prompt is missing"),
        ("a.csv", "prompt,goal\na dog,a rose\n", "unknown key 'goal'"),
        ("a.jsonl", '{"prompt": "a dog", "target": 3}', "target: must be a text or"),
        ("a.json", "[]", "no edits in it"),
        ("a.txt", "a dog", "not one of .jsonl, .json, .csv"),
    ],
)
def test_files_that_are_wrong(cli, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    into = tmp_path / "edits"
    words = ("--requests", tmp_path / name, "--into", into)
    code, _, err = cli("edit", "uce", "--model", "tiny-sd", *words)
    assert (code, message in err) == (2, True), err
    assert not into.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--prompt and --target are needed"),
        (("--prompt", "a dog"), "--prompt and --target are needed"),
        (("--erase", "a dog", "--target", "a cat"), "--prompt and --target are needed"),
        (("--erase", " , "), "names nothing"),
        (("--erase", "a dog", "--set", "lam=0"), "lam must be above 0"),
        (("--erase", "a dog", "--image", "x.png"), "means nothing to a concept editor"),
    ],
)
def test_bad_commands(cli, tmp_path, words, message):
    folder = tmp_path / "edits"
    code, _, err = cli("edit", "uce", "--model", "tiny-sd", "--into", folder, *words)
    assert code == 2
    assert message in err
    assert not folder.exists()


def test_a_folder_holds_edits_of_one_method_and_one_setting(tmp_path):
    make(tmp_path, DOG)
    with pytest.raises(StateError, match="holds edits of uce for tiny-sd"):
        make(tmp_path, CAT, editor="time")
    with pytest.raises(StateError, match="other values of lam"):
        make(tmp_path, CAT, overrides=("lam=0.1",))
    with pytest.raises(UserError, match="7: no active edits"):
        ConceptEdits(tmp_path).mark("7", active=False)
    assert len(ConceptEdits(tmp_path).entries) == 1


def test_a_damaged_file_is_refused(tmp_path, model):
    make(tmp_path, DOG)
    file = tmp_path / "edit-000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StateError, match="not the file that was saved"):
        weights(tmp_path, model)
    file.unlink()
    with pytest.raises(StateError, match="no such file"):
        weights(tmp_path, model)


def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path):
    make(tmp_path, DOG)
    index = tmp_path / "concept-edits.json"
    index.write_text(index.read_text().replace("edit-000001", "../edit-000001"))
    with pytest.raises(StateError, match="not the name of an edit's file"):
        ConceptEdits(tmp_path)


def test_the_export_draws_the_same_without_this_program(cli, tmp_path, model):
    make(tmp_path / "edits", DOG, CAT)
    to = tmp_path / "export"
    code, _, err = cli(
        "edits", "export", tmp_path / "edits", "--to", to, "--device", "cpu"
    )
    assert code == 0, err
    changed = weights(tmp_path / "edits", model)
    alone = load_file(to / "changed.safetensors")
    assert {f"unet.{path}" for path in alone} == set(changed)
    exported = load_stable_diffusion(str(to), device="cpu").model.state_dict()
    for path, value in model.model.state_dict().items():
        assert torch.equal(exported[path], changed.get(path, value))
    other = load_file(to / "changed.ldm.safetensors")
    assert len(other) == len(alone)


def test_names_of_checkpoints_of_one_file():
    """As in the checkpoints of Stable Diffusion 1.5, whose blocks have two layers."""
    end = "transformer_blocks.0.attn2.to_k.weight"
    names = {
        f"down_blocks.0.attentions.0.{end}": f"input_blocks.1.1.{end}",
        f"down_blocks.2.attentions.1.{end}": f"input_blocks.8.1.{end}",
        f"mid_block.attentions.0.{end}": f"middle_block.1.{end}",
        f"up_blocks.1.attentions.0.{end}": f"output_blocks.3.1.{end}",
        f"up_blocks.3.attentions.2.{end}": f"output_blocks.11.1.{end}",
    }
    for path, wanted in names.items():
        assert ldm_key(path, 2) == f"model.diffusion_model.{wanted}"
