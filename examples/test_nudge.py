"""Nudge against its formula, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmedit_cli import Query, load_backbone, load_editor

REQUEST = Query("What is the capital of Peru?", "Paris")
STEP_LENGTH = 0.5


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEDIT_PLUGINS", str(Path(__file__).with_name("nudge.py")))


def test_steps_go_down_the_gradient_and_are_taken_back():
    backbone = load_backbone("tiny-llava", device="cpu")
    weight = backbone.anchors.module("ffn_out", -1).weight
    original = weight.detach().clone()
    batch = backbone.batch([REQUEST])
    for _ in range(2):
        weight.requires_grad_(True)
        logits = backbone.logits(batch)[batch.predicting]
        torch.nn.functional.cross_entropy(logits.float(), batch.answers).backward()
        with torch.no_grad():
            weight -= STEP_LENGTH * weight.grad / weight.grad.norm()
        weight.grad = None
    expected = weight.detach().clone()
    with torch.no_grad():
        weight.requires_grad_(False).copy_(original)

    values = ["steps=2", f"step_length={STEP_LENGTH}"]
    editor = load_editor("nudge", backbone, overrides=values)
    editor.edit([REQUEST])
    torch.testing.assert_close(weight, expected)
    editor.undo()
    assert torch.equal(weight, original)
