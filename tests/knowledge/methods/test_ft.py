"""ft against the published code (golden), and its own switches."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import QUERIES, SHAPES
from safetensors.torch import load_file

from mmedit_cli.errors import DataError, MmeditError
from mmedit_cli.knowledge.methods.ft import Ft, FtHparams
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.types import Query

REQUEST = Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png")


def assert_close(ours, expected, atol=2e-4, rtol=1e-3):
    assert ((ours - expected).abs() <= atol + rtol * expected.abs()).all()


@pytest.mark.parametrize("case", ["a", "b"])
def test_the_published_loop_is_reproduced(golden, case):
    """Case b edits three records in chunks of two: losses step by step, the weight, and the logits of every edit."""
    settings = json.loads((golden / "ft.json").read_text())["cases"][case]
    expected = load_file(golden / "ft.safetensors")
    folder = golden / "liveedit_blip2"
    records = json.loads((folder / "records_vqa.json").read_text())
    requests = [
        Query(
            records[i]["src"] + " The answer is:",
            records[i]["alt"],
            folder / "images" / records[i]["image"],
        )
        for i in settings["records"]
    ]
    backbone = load_backbone(str(folder / "model"), device="cpu")
    hparams = FtHparams(
        layers=(settings["layer"],),
        steps=settings["steps"],
        learning_rate=settings["lr"],
        weight_decay=settings["weight_decay"],
        batch_size=settings["batch_size"],
    )
    edited = Ft(backbone, hparams).edit(requests)
    assert_close(torch.tensor(edited.info["losses"]), expected[f"{case}.losses"])
    weight = backbone.model.get_parameter(settings["weight"])
    wrong = (weight - expected[f"{case}.weight_after"]).abs() > 5e-5
    assert wrong.float().mean() <= 1e-3
    for i, request in zip(settings["records"], requests, strict=True):
        batch = backbone.batch([request])
        assert_close(
            backbone.logits(batch)[batch.predicting],
            expected[f"{case}.record{i}.logits_edited"],
        )


def test_caching_the_frozen_part_changes_no_bit(backbone, monkeypatch):
    """Every step from the cached prefix equals a step through the whole model."""
    losses = Ft(backbone, FtHparams(steps=4, learning_rate=1e-2)).edit([REQUEST])
    losses.editor.undo()

    def whole(self, requests):
        from mmedit_cli.knowledge.methods.shared.losses import answer_loss

        batch = self.backbone.batch(requests)
        return lambda: answer_loss(
            self.backbone.logits(batch)[batch.predicting], batch.answers
        )

    monkeypatch.setattr(Ft, "_prepare", whole)
    for target in ("lm", "connector"):
        uncached = Ft(
            backbone, FtHparams(target=target, steps=4, learning_rate=1e-2)
        ).edit([REQUEST])
        uncached.editor.undo()
        monkeypatch.undo()
        cached = Ft(
            backbone, FtHparams(target=target, steps=4, learning_rate=1e-2)
        ).edit([REQUEST])
        cached.editor.undo()
        assert cached.info["losses"] == pytest.approx(uncached.info["losses"], abs=1e-5)
        monkeypatch.setattr(Ft, "_prepare", whole)


def test_the_vision_tower_runs_once_a_connector_edit(backbone):
    runs = []
    below = backbone.model.get_submodule(backbone.anchors.below_connector[0])
    handle = below.register_forward_hook(lambda *_: runs.append(1))
    with Ft(backbone, FtHparams(target="connector", steps=5)).edit([REQUEST]):
        pass
    handle.remove()
    assert len(runs) == 1


def test_the_norm_constraint_bounds_every_weight(backbone):
    name = backbone.anchors.path("ffn_out", -1) + ".weight"
    before = backbone.model.get_parameter(name).clone()
    with Ft(backbone, FtHparams(learning_rate=0.1, steps=5, norm_constraint=1e-3)).edit(
        [REQUEST]
    ):
        change = (backbone.model.get_parameter(name) - before).abs()
        assert 9e-4 < change.max() <= 1e-3 + 1e-6
    with Ft(backbone, FtHparams(learning_rate=0.1, steps=5)).edit([REQUEST]):
        assert (backbone.model.get_parameter(name) - before).abs().max() > 1e-2


def test_it_stops_early_and_skips_steps_of_small_loss(backbone):
    long = Ft(backbone, FtHparams(learning_rate=3e-2, steps=100, stop_loss=2.0))
    with long.edit([REQUEST]) as edited:
        assert 2 < len(edited.info["losses"]) < 100
        assert edited.info["losses"][-1] < 2.0 <= edited.info["losses"][-2]
    with Ft(backbone, FtHparams(stop_loss=1e9)).edit([REQUEST]) as edited:
        assert len(edited.info["losses"]) == 1
        assert edited.editor.backbone.logits(backbone.batch(QUERIES)).isfinite().all()


def test_several_layers(backbone):
    editor = Ft(backbone, FtHparams(layers=(-1, 2)))
    assert editor.first_layer == 2
    editor.edit([REQUEST])
    assert set(editor.state()[0]) == {
        backbone.anchors.path("ffn_out", layer) + ".weight" for layer in (2, 5)
    }
    editor.undo()


def test_bad_requests_and_values_are_explained(backbone):
    with pytest.raises(DataError, match="needs an image in every request"):
        Ft(backbone, FtHparams(target="connector")).edit([Query("What?", "that")])
    base = backbone.logits(backbone.batch(QUERIES))
    with pytest.raises(MmeditError, match=r"not finite: .*(fc2|down_proj)") as diverged:
        Ft(backbone, FtHparams(learning_rate=1e37, steps=5)).edit([REQUEST])
    assert "learning_rate" in diverged.value.hint
    assert torch.equal(backbone.logits(backbone.batch(QUERIES)), base)
    for wrong in (
        {"steps": 0},
        {"learning_rate": -1.0},
        {"norm_constraint": 0.0},
        {"layers": ()},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FtHparams(**wrong)
