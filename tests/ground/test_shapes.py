"""Hyper-parameters belong to the config of a model, not to the name of its folder."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from conftest import FAMILIES, ROOT, SHAPES

from mmedit_cli import registry, shapes
from mmedit_cli.catalog import ModelRef, bundled, find_model
from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.loading import load_editor, variant_for
from mmedit_cli.knowledge.models.shared.loading import load_backbone


def ref_of(folder, **config):
    """A model folder with no more than a config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return ModelRef(folder.name, "llava", folder, "0" * 32)


VICUNA = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
}  # as on the hub


@pytest.mark.parametrize(
    "name", ["llava-1.5-7b", "llava-1.5-7b-hf", "somebody/else", "blip2-opt-2.7b"]
)
def test_the_same_files_get_the_same_variant_whatever_their_folder_is_called(
    tmp_path, name
):
    ref = ref_of(tmp_path / name, **VICUNA)
    assert shapes.shape_of(ref) == ("llava", 32, 4096), (
        "what is not in the file is the default of its kind"
    )
    assert variant_for("liveedit", ref) == "llava-1.5-7b"


def test_a_name_alone_brings_no_variant(tmp_path):
    larger = {
        **VICUNA,
        "text_config": {
            "model_type": "llama",
            "num_hidden_layers": 40,
            "hidden_size": 5120,
        },
    }
    assert variant_for("liveedit", ref_of(tmp_path / "llava-1.5-7b", **larger)) is None
    flat = ref_of(
        tmp_path / "mini-blip2",
        model_type="qwen2_vl",
        num_hidden_layers=28,
        hidden_size=1536,
    )
    assert shapes.shape_of(flat) == ("qwen2_vl", 28, 1536)
    assert variant_for("ft", flat) is None
    assert (
        shapes.shape_of(
            ref_of(
                tmp_path / "odd",
                model_type="llava",
                text_config={"model_type": "nobody"},
            )
        )
        is None
    )
    with pytest.raises(ModelError, match="text_config is not an object"):
        shapes.shape_of(ref_of(tmp_path / "null", model_type="llava", text_config=None))


def test_a_variant_of_ones_own_goes_by_the_name(tmp_path):
    file = tmp_path / "ft.yaml"
    file.write_text("variants:\n  mine: {steps: 3}\n  tiny-blip2: {steps: 4}\n")
    shape = shapes.Shape("llava", 1, 1)
    assert shapes.pick_variant(file, shape, "mine") == "mine"
    assert shapes.pick_variant(file, shape, "other") is None
    assert shapes.pick_variant(file, shape, "tiny-blip2") is None
    assert (
        shapes.pick_variant(file, shapes.SHAPES["tiny-blip2"], "other") == "tiny-blip2"
    )
    file.write_text("variants: [")
    assert shapes.pick_variant(file, shape, "mine") is None


def test_every_variant_that_comes_along_is_of_a_known_shape():
    for path in sorted((ROOT / "hparams").glob("*.yaml")):
        assert set(yaml.safe_load(path.read_text()).get("variants", {})) <= set(
            shapes.SHAPES
        ), path.name


@pytest.mark.parametrize("name", [name for name in shapes.SHAPES if name in bundled()])
def test_shapes_of_models_that_come_along(name):
    assert shapes.shape_of(find_model(name)) == shapes.SHAPES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_of_tiny_models(name):
    assert (
        shapes.shape_of_config(load_backbone(name, device="cpu").model.config)
        == shapes.SHAPES[name]
    )


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux"])
def test_shapes_of_tiny_pipelines(name, tmp_path):
    from mmedit_cli.drawing.models import tiny

    tiny.build(name).save_pretrained(tmp_path / "mine")
    ref = find_model(str(tmp_path / "mine"))
    assert shapes.shape_of(ref) == shapes.SHAPES[name]
    assert variant_for("dreambooth-lora", ref) == name


def test_it_is_said_which_variant_was_taken(tmp_path, cli):
    shutil.copytree(
        registry.share_dir("data") / "models" / "mini-blip2", tmp_path / "mine"
    )
    backbone = load_backbone(str(tmp_path / "mine"), device="cpu")
    assert load_editor("lora", backbone).hparams.rank == 16, "that of mini-blip2"
    picture = SHAPES / "solid/red-circle.png"
    fact = ("--image", picture, "--prompt", "What is this?", "--target", "a star")
    words = ("--model", "tiny-blip2", "--into", tmp_path / "ledger", *fact)
    _, _, err = cli("edit", "ft", *words, "--device", "cpu", "--set", "steps=1")
    assert "hyper-parameters of ft: variant tiny-blip2" in err
    code, out, err = cli(
        "eval", "ft", "--model", "tiny-blip2", "--data", SHAPES, "--dry-run", "--json"
    )
    assert (code, json.loads(out)["variant"]) == (0, "tiny-blip2"), err
