"""Weights on disk: editors bring in what they edit, and an edit is what it is without offloading."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import QUERIES, SHAPES

from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.evaluation.answers import target_losses
from mmedit_cli.knowledge.ledger.edited_model import open_edits
from mmedit_cli.knowledge.loading import load_editor
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.patch import bring_in

SETTINGS = {
    "ft": ("steps=3", "learning_rate=0.01"),
    "lora": ("layers=[2]", "steps=3", "rank=2", "learning_rate=0.01"),
    "t-patcher": ("steps=3",),
    "multi-melo": ("layers=[2]", "steps=3"),
}
STAR = (
    "--image",
    SHAPES / "solid/red-star.png",
    "--prompt",
    "What is this?",
    "--target",
    "a lynx",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same model as it is, and with most of it on disk."""
    folder = tmp_path_factory.mktemp("offloading") / "tiny-llava"
    tiny = load_backbone("tiny-llava", device="cpu")
    for part in (tiny.model, tiny.tokenizer, tiny.image_processor):
        part.save_pretrained(folder)
    places = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "disk",
        "lm_head": "cpu",
    }
    stack = tiny.model.get_submodule(tiny.anchors.stack)
    for name, _ in stack.named_children():
        if name != "layers":
            places[f"{tiny.anchors.stack}.{name}"] = "disk"
    for layer in range(tiny.n_layers):
        places[f"{tiny.anchors.stack}.layers.{layer}"] = "disk" if layer else "cpu"
    return load_backbone(str(folder), device="cpu"), load_backbone(
        str(folder), device="cpu", device_map=places
    )


def test_an_offloaded_model_is_the_same_model(pair):
    plain, spread = pair
    assert spread.model.get_parameter(
        spread.anchors.path("attn_q", 3) + ".weight"
    ).is_meta, "it is on disk"
    assert spread.device.type == "cpu"
    assert torch.equal(
        spread.logits(spread.batch(QUERIES)), plain.logits(plain.batch(QUERIES))
    )
    assert spread.generate(QUERIES, max_new_tokens=4) == plain.generate(
        QUERIES, max_new_tokens=4
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_an_edit_of_offloaded_weights_is_the_edit(pair, name):
    request, logits = QUERIES[0], []
    for backbone in pair:
        base = backbone.logits(backbone.batch([request]))
        with load_editor(name, backbone, overrides=SETTINGS[name]).edit([request]):
            logits.append(backbone.logits(backbone.batch([request])))
        assert torch.equal(backbone.logits(backbone.batch([request])), base)
        assert not torch.equal(logits[-1], base)
    assert torch.equal(*logits)


def test_weights_that_are_nowhere_are_refused():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="0: its weights are on device meta"):
        bring_in(model, "0")


def test_the_loss_after_is_what_asking_again_measures(cli, tmp_path):
    words = (
        "edit",
        "ft",
        "--model",
        "tiny-blip2",
        *STAR,
        "--into",
        tmp_path / "edits",
        "--json",
    )
    code, text, err = cli(*words, "--set", "learning_rate=0.01")
    (edit,) = json.loads(text)["edits"]
    assert code == 1  # likelier, but not the answer yet
    assert "did not move" not in err
    assert edit["loss_after"] < edit["loss_before"] / 2
    with open_edits(tmp_path / "edits") as edited:
        (again,) = target_losses(
            edited.backbone, [edit.request for edit in edited.ledger.active]
        )
        with edited.paused():
            (before,) = target_losses(
                edited.backbone, [edit.request for edit in edited.ledger.active]
            )
    assert again == pytest.approx(edit["loss_after"], abs=1e-5)
    assert before == pytest.approx(edit["loss_before"], abs=1e-5)


def test_an_edit_whose_loss_did_not_move_says_so(cli, tmp_path):
    small = (
        "--model",
        "tiny-blip2",
        "--set",
        "learning_rate=1e-30",
        "--set",
        "steps=2",
    )
    _, _, err = cli("edit", "ft", *small, *STAR, "--into", tmp_path / "edits")
    assert "edit 1: its loss did not move (" in err
    code, text, _ = cli(
        "eval", "ft", *small, "--data", SHAPES, "--limit", 2, "--protocols", "tf_em"
    )
    assert (code, "the loss of 2 edits did not move" in text) == (0, True)
