"""t-patcher against the published code (golden), and its own switches."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import QUERIES, SHAPES
from safetensors.torch import load_file

from mmedit_cli.errors import HparamsError
from mmedit_cli.knowledge.methods.shared.neurons import joined, respond, site_of
from mmedit_cli.knowledge.methods.t_patcher import TPatcher, TPatcherHparams
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query

REQUEST = Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png")
TEXTS = ("The river rises in the hills.", "She sang in the choir of the town.")


def test_the_published_loop_is_reproduced(golden):
    """Two edits on top of each other: losses, the new weights and the logits of both, with the published slip."""
    settings = json.loads((golden / "t_patcher.json").read_text())["settings"]
    expected = load_file(golden / "t_patcher.safetensors")
    folder = golden / "liveedit_blip2"
    records = json.loads((folder / "records_vqa.json").read_text())
    backbone = load_backbone(str(folder / "model"), device="cpu")
    hparams = TPatcherHparams(
        layer=settings["layer"],
        steps=settings["steps"],
        learning_rate=settings["lr"],
        weight_decay=settings["weight_decay"],
        activation_weight=settings["loss_a_lambda"],
        memory_weight=settings["loss_m_lambda"],
        memory=tuple(settings["text_lines"]),
        compat="reference",
    )
    editor = TPatcher(backbone, hparams)
    drawn = iter(
        torch.cat([expected[f"edit{i}.text_line_per_step"] for i in range(2)]).tolist()
    )
    editor._draw = lambda _source: editor._texts[next(drawn)]
    requests = [
        Query(
            records[i]["src"] + " The answer is:",
            records[i]["alt"],
            folder / "images" / records[i]["image"],
        )
        for i in settings["records"]
    ]
    close = {"atol": 2e-4, "rtol": 1e-3}
    for i, request in enumerate(requests):
        losses = editor.edit([request]).info["losses"][0]
        torch.testing.assert_close(
            torch.tensor(losses), expected[f"edit{i}.loss_edit"], **close
        )
        tensors = editor.state()[0]
        for ours, theirs in (
            ("keys", "in_weight"),
            ("bias", "in_bias"),
            ("values", "out_weight"),
        ):
            published = expected[f"edit{i}.{theirs}"]  # the newest first
            published = (published.T if theirs == "in_weight" else published).flip(0)
            torch.testing.assert_close(tensors[ours], published, **close)
    for record, request in zip(settings["records"], requests, strict=True):
        batch = backbone.batch([request])
        logits = backbone.logits(batch)[batch.predicting]
        torch.testing.assert_close(
            logits, expected[f"record{record}.logits_edited"], **close
        )


def test_the_corrected_loop_learns_the_request(backbone):
    with TPatcher(
        backbone, TPatcherHparams(steps=30, learning_rate=0.1, memory=TEXTS)
    ).edit([REQUEST]) as edited:
        losses = edited.info["losses"][0]
    assert losses[-1] < losses[0] - 1


def test_neurons_are_a_larger_ffn(backbone):
    """Keys and values put beside the model's own matrices give the same output."""
    site, width = site_of(backbone, -1), backbone.width
    source = torch.Generator().manual_seed(3)
    names = ("keys", "values", *(("up",) if site.gated else ()))
    new = {name: torch.randn(4, width, generator=source) * 0.1 for name in names}
    new |= {
        name: torch.randn(4, generator=source) * 0.1
        for name in ("bias", *(("up_bias",) if site.gated else ()))
    }
    anchors, seen = backbone.anchors, []
    batch = backbone.batch(QUERIES)
    with Patch(backbone.model) as patch:
        site.hook(patch, lambda z: seen.append(z) or respond(z, new, site.act))
        added = backbone.logits(batch)
    entering = seen[0]
    big_in, big_out = anchors.module("ffn_in", -1), anchors.module("ffn_out", -1)

    def larger(linear, rows, bias):
        own = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias
        return entering @ torch.cat((linear.weight, rows)).T + torch.cat((own, bias))

    if site.gated:
        active = site.act(
            larger(anchors.module("ffn_gate", -1), new["keys"], new["bias"])
        )
        active = active * larger(big_in, new["up"], new["up_bias"])
    else:
        active = site.act(larger(big_in, new["keys"], new["bias"]))
    whole = active @ torch.cat((big_out.weight, new["values"].T), 1).T
    whole = whole if big_out.bias is None else whole + big_out.bias
    with Patch(backbone.model) as patch:
        patch.hook(anchors.path("ffn_out", -1), lambda out: whole.reshape(out.shape))
        concatenated = backbone.logits(batch)
    torch.testing.assert_close(added, concatenated, atol=1e-5, rtol=1e-5)


def test_the_form_of_the_paper(backbone):
    """One neuron a wrong token, at most so many; and none once the answer is right."""
    hparams = TPatcherHparams(
        variant="paper",
        neurons=3,
        steps=150,
        activation_weight=1.0,
        memory_weight=0.01,
        memory=TEXTS,
    )
    editor = TPatcher(backbone, hparams)
    editor.edit([REQUEST])
    assert 1 <= len(editor.state()[0]["bias"]) <= 3
    batch = backbone.batch([REQUEST])
    if (backbone.logits(batch)[batch.predicting].argmax(-1) == batch.answers).all():
        editor.edit([REQUEST])
        assert editor.state()[0]["counts"].tolist()[1] == 0
    assert len(editor._seen) == len(editor.operations)
    editor.undo()


def test_sets_are_joined_in_order():
    sets = [
        {"keys": torch.full((n, 2), float(n)), "bias": torch.full((n,), float(n))}
        for n in (1, 0, 2)
    ]
    assert joined(sets)["bias"].tolist() == [1.0, 2.0, 2.0]
    assert joined(sets)["keys"].shape == (3, 2)


def test_bad_values_are_explained(backbone):
    for wrong, match in (
        ({"steps": 0}, "steps"),
        ({"memory": ("word",)}, "two words"),
        ({"compat": "reference"}, "needs texts"),
        ({"compat": "reference", "variant": "paper", "memory": TEXTS}, "needs texts"),
    ):
        with pytest.raises(ValueError, match=match):
            TPatcherHparams(**wrong)
    with pytest.raises(HparamsError, match="layers 0 to 5"):
        TPatcher(backbone, TPatcherHparams(layer=6))
