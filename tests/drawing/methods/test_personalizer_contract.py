"""What every personalizer promises on every model; a new one inherits these tests by being in its folder."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from drawing.methods.conftest import assert_same, draw, make, snapshot
from mmedit_cli import registry
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.errors import DataError, StateError

NAMED, UNNAMED = "a photo of a <my-dog>", "a photo of a cat"
QUICK = ("steps=6",)
ROUTED = (
    "perfusion",
    "multi-melo-diffusion",
)  # leave prompts without the token alone, bit for bit


@pytest.fixture(params=registry.personalizers.names())
def editor(request, model):
    """A fresh personalizer; the shared model must come out of each test as it went in."""
    before = snapshot(model)
    made = make(request.param, model, *QUICK)
    yield made
    made.close()
    assert_same(snapshot(model), before)


def test_learning_changes_what_the_token_draws_and_forgetting_restores_it(
    editor, concept
):
    base = draw(editor.model, [UNNAMED, "a photo of a dog"])
    before = snapshot(editor.model)
    ticks = []
    learned = editor.learn(concept, tick=ticks.append)
    assert sum(ticks) == editor.steps
    assert learned.info["steps"] == 6
    assert np.isfinite(learned.info["loss_last"])
    after = draw(editor.model, [UNNAMED, NAMED])
    assert not np.array_equal(after[1], base[1])
    assert np.array_equal(after[0], base[0]) == (editor.name in ROUTED)
    editor.remove("<my-dog>")
    assert_same(snapshot(editor.model), before)
    assert np.array_equal(draw(editor.model, [UNNAMED, "a photo of a dog"]), base)


def test_save_and_load_draw_the_same(editor, concept, tmp_path):
    editor.learn(concept)
    drawn = draw(editor.model, [UNNAMED, NAMED])
    editor.save("<my-dog>", tmp_path / "c.safetensors")
    editor.close()
    fresh = make(editor.name, editor.model, *QUICK)
    loaded = fresh.load(tmp_path / "c.safetensors")
    assert (loaded.token, loaded.superclass) == ("<my-dog>", "dog")
    assert np.array_equal(draw(editor.model, [UNNAMED, NAMED]), drawn)
    fresh.close()


def test_the_same_seed_learns_the_same(editor, concept):
    first = editor.learn(concept)
    editor.close()
    again = make(editor.name, editor.model, *QUICK).learn
    other = again.__self__
    second = again(concept)
    other.close()
    assert first.tensors.keys() == second.tensors.keys()
    assert all(
        torch.equal(tensor, second.tensors[key])
        for key, tensor in first.tensors.items()
    )
    third = make(editor.name, editor.model, *QUICK, seed=1)
    assert not all(
        torch.equal(t, first.tensors[k])
        for k, t in third.learn(concept).tensors.items()
    )
    third.close()


@pytest.mark.slow
def test_in_little_memory_it_learns_the_same(editor, concept):
    first = editor.learn(concept)
    lean = load_stable_diffusion(editor.model.name, device="cpu", low_memory=True)
    draw(lean, ["a dog"])
    runs = []
    resnets = [resnet for down in lean.unet.down_blocks for resnet in down.resnets]
    for resnet in resnets:
        resnet.register_forward_pre_hook(lambda *_: runs.append(1))
    with make(editor.name, lean, *QUICK) as other:
        second = other.learn(concept)
    assert len(runs) > 6 * len(resnets), "run again on the way back"
    assert second.info == pytest.approx(first.info, rel=1e-4)


def test_a_file_of_another_model_or_method_is_refused(editor, concept, tmp_path):
    editor.learn(concept)
    path = tmp_path / "c.safetensors"
    editor.save("<my-dog>", path)
    editor.close()
    tensors, facts = load_file(path), editor.read(path).facts
    name = next(iter(tensors))
    for change, reason in [
        ({"fingerprint": "x", "model": "other"}, "made for other, this is tiny-sd"),
        ({"method": "nobody"}, "made with method nobody"),
        ({"format": "99"}, "made with format 99"),
        ({"token": "../../etc"}, "not a name in angle brackets"),
    ]:
        save_file(tensors, path, {**facts, **change})
        with pytest.raises(StateError, match=reason):
            editor.load(path)
    save_file({**tensors, name: tensors[name] * torch.nan}, path, facts)
    with pytest.raises(StateError, match="not finite"):
        editor.load(path)
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != name}, path, facts
    )
    with pytest.raises(StateError, match=r"missing|does not fit"):
        editor.load(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(StateError, match="not a safetensors file"):
        editor.load(path)


def test_what_cannot_be_learned_is_refused_and_nothing_is_lost(
    editor, concept, tmp_path
):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "worse.png").write_bytes(b"none either")
    editor.learn(concept)
    drawn = draw(editor.model, [NAMED])
    held = snapshot(editor.model)
    if not editor.several:
        with pytest.raises(StateError, match="holds one concept"):
            editor.learn(replace(concept, token="<other>"))
    else:
        bad = replace(
            concept,
            token="<other>",
            images=(*concept.images, tmp_path / "bad.png", tmp_path / "worse.png"),
        )
        with pytest.raises(DataError, match=r"bad\.png") as caught:
            editor.learn(bad)
        assert len(caught.value.problems) == 2, "every bad picture is named"
        with pytest.raises(DataError, match="no pictures"):
            editor.learn(replace(concept, token="<other>", images=()))
        with pytest.raises(DataError, match="not a word"):
            editor.learn(replace(concept, token="<other>", superclass=" "))
    with pytest.raises(DataError, match="angle brackets"):
        editor.learn(replace(concept, token="my dog"))
    with pytest.raises(StateError, match=r"taken|one concept"):
        editor.learn(concept)
    with pytest.raises(StateError, match="no concept <x>"):
        editor.remove("<x>")
    assert snapshot(editor.model)["words"].keys() == held["words"].keys()
    assert np.array_equal(draw(editor.model, [NAMED]), drawn)


def test_two_concepts_and_one_forgotten(editor, model, concept):
    if not editor.several:
        pytest.skip(f"{editor.name} holds one concept")
    editor.learn(concept)
    one = draw(editor.model, [NAMED, UNNAMED])
    editor.learn(replace(concept, token="<toy>", superclass="stuffed animal"))
    both = draw(editor.model, ["a <my-dog> and a <toy>"])
    assert both.shape == (1, 16, 24 if model.windows else 16, 3)
    if editor.name in ROUTED:
        assert np.array_equal(draw(editor.model, [NAMED, UNNAMED])[1], one[1])
    editor.remove("<toy>")
    assert np.array_equal(draw(editor.model, [NAMED, UNNAMED]), one)


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.personalizers.names())
def test_bfloat16(name, concept):
    model = load_stable_diffusion("tiny-sd", device="cpu", dtype="bfloat16")
    base = draw(model, [UNNAMED, "a photo of a dog"])
    before = snapshot(model)
    with make(name, model, *QUICK) as editor:
        editor.learn(concept)
        assert not np.array_equal(draw(model, [UNNAMED, NAMED])[1], base[1])
        if name in ROUTED:
            assert np.array_equal(draw(model, [UNNAMED, NAMED])[0], base[0])
    assert_same(snapshot(model), before)


def test_hparams_are_in_the_file(editor, concept, tmp_path):
    editor.learn(concept)
    editor.save("<my-dog>", tmp_path / "c.safetensors")
    assert (
        json.loads(editor.read(tmp_path / "c.safetensors").facts["hparams"])["steps"]
        == 6
    )
