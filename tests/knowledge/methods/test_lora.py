"""lora: one adapter of peft for all edits, and nothing of peft left in the model."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPES

from mmedit_cli.errors import MmeditError, StateError
from mmedit_cli.knowledge.methods.lora import Lora, LoraHparams
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.types import Query

REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("What is the capital of Peru?", "green"),
)
HPARAMS = LoraHparams(
    layers=(3, -1),
    roles=("attn_v", "ffn_out"),
    rank=4,
    alpha=8.0,
    learning_rate=1e-2,
    steps=10,
)


@pytest.fixture
def model():
    return load_backbone("tiny-blip2", device="cpu")


def test_a_layer_adds_alpha_over_rank_times_b_a_x(model):
    paths = [
        model.anchors.path(role, layer)
        for layer in (3, 5)
        for role in ("attn_v", "ffn_out")
    ]
    plain = {path: model.model.get_submodule(path) for path in paths}
    editor = Lora(model, HPARAMS)
    editor.edit(REQUESTS)
    tensors = editor._tensors()
    assert len(tensors) == 8
    for path in paths:
        a, b = (
            next(
                t
                for n, t in tensors.items()
                if path.replace(".", "/") in n and f"lora_{s}" in n
            )
            for s in "AB"
        )
        assert a.shape[0] == b.shape[1] == 4
        assert b.any()
        x = torch.randn(3, a.shape[1])
        expected = plain[path](x) + 8.0 / 4 * x @ a.T @ b.T
        assert torch.allclose(model.model.get_submodule(path)(x), expected, atol=1e-5)
    editor.undo()
    assert all(
        model.model.get_submodule(path) is module for path, module in plain.items()
    )
    assert not any("lora" in name for name, _ in model.model.named_parameters())


def test_every_edit_trains_the_same_adapter_which_every_question_meets(model):
    editor, batch = Lora(model, HPARAMS), model.batch(REQUESTS[1:])
    base = model.logits(batch)
    editor.edit(REQUESTS[:1])
    first = editor._tensors()
    assert not torch.allclose(model.logits(batch), base, atol=1e-3)
    editor.edit(REQUESTS[1:])
    second = editor._tensors()
    assert {n: t.shape for n, t in second.items()} == {
        n: t.shape for n, t in first.items()
    }
    assert any(not torch.equal(second[name], first[name]) for name in first)
    assert editor.affects(REQUESTS) == [True, True]


def test_an_edit_that_breaks_off_leaves_the_adapter_as_it_was(model, monkeypatch):
    editor = Lora(model, HPARAMS)
    editor.edit(REQUESTS[:1])
    before, resume, calls = editor._tensors(), model.resume, []

    def broken(*args, **kwargs):
        calls.append(1)
        return resume(*args, **kwargs) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(model, "resume", broken)
    with pytest.raises(MmeditError, match="the loss became nan"):
        editor.edit(REQUESTS[1:])
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in editor._tensors().items()
    )


def test_an_adapter_of_another_shape_is_refused(model):
    editor = Lora(model, HPARAMS)
    editor.edit(REQUESTS[:1])
    tensors, metadata = editor.state()
    name = min(tensors)
    for wrong in (
        {**tensors, name: tensors[name][:1]},
        {n: t for n, t in tensors.items() if n != name},
    ):
        with pytest.raises(StateError, match="does not hold an adapter of rank 4"):
            editor.load_state(wrong, metadata)
