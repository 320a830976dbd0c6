"""A model that no file of hyper-parameters has a variant for runs with every editor."""

from __future__ import annotations

import json

import pytest
from conftest import SHAPES

from mmedit_cli import registry
from mmedit_cli.knowledge.loading import load_editor, variant_for
from mmedit_cli.knowledge.models.shared import tiny
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.types import Query

REQUEST = Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png")
DEPTH = 4
QUICK = {  # what costs time and does not depend on the depth
    "ft": ("steps=1",),
    "ike": ("demonstrations=0",),
    "liveedit": ("module_dim=32", "refine=1"),
    "lora": ("steps=1",),
    "multi-melo": ("steps=1",),
    "grace": ("steps=1",),
    "t-patcher": ("steps=1",),
    "alphaedit": ("questions=2", "relative=true", "target.steps=1"),
    "memit": ("questions=2", "target.steps=1"),
    "mend": ("rank=16",),
    "lte": ("hidden_dim=32",),
    "recipe": ("hidden_dim=32", "key_dim=32"),
    "serac": ("hidden_dim=32",),
    "ultraedit": ("unrelated=2",),
    "m-ore": ("steps=1",),
    "wise": ("steps=1",),
    "unike": (
        "steps=1",
        "encoder_dim=16",
        "truth_dim=8",
        "scope_dim=16",
        "knowledge=16",
    ),
}
LAYERS = {  # of four, as deep as the published ones of 32
    "grace": ("layer", 2),
    "m-ore": ("layers", 4),
    "wise": ("layer", 3),
    "liveedit": ("edit_layer", 2),
    "lora": ("layers", (1, 2, 3)),
    "multi-melo": ("layers", (1, 2, 3)),
    "alphaedit": ("layers", (0, 1)),
    "memit": ("layers", (0, 1)),
    "ultraedit": ("layers", (3,)),
    "unike": ("layers", 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA with four decoder layers, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("models") / "somebodys-llava"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tiny, "_LAYERS", DEPTH)
        model, tokenizer, processor = tiny.build("tiny-llava")
    for part in (model, tokenizer, processor):
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(str(folder), device="cpu")


@pytest.mark.parametrize("name", registry.editors.names())
def test_every_editor_runs_on_it(name, backbone):
    assert variant_for(name, backbone) is None
    editor = load_editor(
        name, backbone, overrides=QUICK.get(name, ()), checkpoint="untrained"
    )
    with editor.edit([REQUEST]):
        assert backbone.generate([REQUEST], max_new_tokens=1)
        assert editor.ids == [1]
    key, layers = LAYERS.get(name, (None, None))
    if key is not None:
        assert getattr(editor.hparams, key) == layers
        kept = json.loads(editor.state()[1]["hparams"])[key]
        assert kept == (list(layers) if isinstance(layers, tuple) else layers)


def test_a_plan_holds_the_numbers_of_the_layers(folder, cli):
    """So 0.66 and 2 are the same run."""
    words = ("eval", "lora", "--model", folder, "--data", SHAPES, "--dry-run", "--json")
    runs = []
    for layers in ("[0.5,0.97]", "[2,3]"):
        code, out, err = cli(*words, "--set", f"layers={layers}")
        assert code == 0, err
        runs.append(json.loads(out))
    assert runs[0] == runs[1]
    assert runs[0]["hparams"]["layers"] == [2, 3]


def test_a_fraction_that_names_no_layer_is_refused(folder, cli):
    words = ("eval", "lora", "--model", folder, "--data", SHAPES, "--dry-run")
    code, _, err = cli(*words, "--set", "layers=[1.0]")
    assert code == 2
    assert "layers 1.0: a fraction of the depth is at least 0 and below 1" in err
