"""Stable Diffusion 3 and FLUX: they are called as their own pipelines call them, learned on, and edited."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from drawing.methods.conftest import draw, make
from PIL import Image

from mmedit_cli import registry
from mmedit_cli.drawing.models.flow import packed, places, unpacked
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.prompts import Word
from mmedit_cli.errors import ModelError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.runtime import generator
from mmedit_cli.types import Concept, ConceptChange

PROMPTS = ["a dog", "a red cat on a table"]
FEW = ("steps=3", "learning_rate=1e-2")
TEXT = "transformer.context_embedder.weight"


@pytest.fixture(scope="module", params=["tiny-sd3", "tiny-flux"])
def model(request):
    return load_stable_diffusion(request.param, device="cpu")


@pytest.fixture
def concept(tmp_path):
    files = []
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    return Concept("<my-dog>", "dog", tuple(files))


def test_pictures_are_those_of_the_pipeline_itself(model):
    ours = draw(model, PROMPTS)
    theirs = model.pipe(
        PROMPTS,
        num_inference_steps=2,
        guidance_scale=model.guidance,
        height=model.resolution,
        width=model.resolution,
        generator=[generator(0), generator(0)],
        max_sequence_length=model.tokenizers[-1].model_max_length,
    ).images
    assert np.array_equal(ours, np.stack([np.asarray(image) for image in theirs]))
    assert not np.array_equal(ours[0], ours[1])


def test_latents_are_packed_as_flux_packs_them():
    pipe = load_stable_diffusion("tiny-flux", device="cpu").pipe
    latents = torch.randn(2, 4, 8, 6)
    tokens = packed(latents)
    assert torch.equal(tokens, pipe._pack_latents(latents, 2, 4, 8, 6))
    assert torch.equal(unpacked(tokens, 8, 6), latents)
    theirs = pipe._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32)
    assert torch.equal(places(8, 6), theirs)


def test_the_loss_is_that_of_the_flow_from_noise_to_picture(model, monkeypatch):
    latents = torch.randn(2, 4, 8, 8, generator=generator(1))
    tokens = model.tokenize(PROMPTS)
    seen = {}
    monkeypatch.setattr(
        model,
        "_predict",
        lambda noisy, sigmas, _: (
            seen.update(noisy=noisy, sigmas=sigmas) or torch.zeros_like(noisy)
        ),
    )
    with torch.no_grad():
        errors = model.errors(latents, model.encode(tokens), generator(2))
    level = seen["sigmas"][:, None, None, None]
    assert ((level > 0) & (level < 1)).all()
    noise = (seen["noisy"] - (1 - level) * latents) / level
    torch.testing.assert_close(errors, (noise - latents).square(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["dreambooth-lora", "multi-melo-diffusion"])
def test_a_subject_is_learned_and_read_by_diffusers(model, concept, tmp_path, method):
    before = draw(model, ["a dog", "a cat"])
    with make(method, model, *FEW, "train_text_encoder=false") as editor:
        learned = editor.learn(concept)
        named, other = draw(model, ["a <my-dog>", "a cat"])
        (tmp_path / "out").mkdir()
        editor.export("<my-dog>", tmp_path / "out" / "l.safetensors")
    assert any(tensor.any() for key, tensor in learned.tensors.items() if "_B" in key)
    assert all(
        key.startswith(("transformer.", "router_key")) for key in learned.tensors
    )
    assert not np.array_equal(named, before[0])
    assert np.array_equal(other, before[1]) is (method == "multi-melo-diffusion")
    assert np.array_equal(draw(model, ["a dog", "a cat"]), before)
    fresh = load_stable_diffusion(model.name, device="cpu")
    fresh.pipe.load_lora_weights(tmp_path / "out", weight_name="l.safetensors")
    called = f"a {learned.facts['identifier']} dog"
    theirs = draw(fresh, [called, called])[0].astype(int)
    assert np.abs(theirs - named).max() <= 2  # adapters round otherwise


def test_closed_forms_change_what_the_text_comes_through(model):
    weight = model.model.get_parameter(TEXT).detach().double()
    cls = registry.concept_editors.get("uce")
    hparams = load_hparams(registry.hparams_file("uce"), cls.Hparams)
    before = draw(model, PROMPTS)
    with cls(model, hparams) as editor:
        (number,) = editor.edit([ConceptChange("a dog", ("a red cat",), ("a toy",))])
        edit = editor.edits[number]
        assert len(edit.inputs) == len(model.spellings())
        left = 0.5 * weight
        right = 0.5 * torch.eye(weight.shape[1], dtype=torch.float64)
        pairs = list(zip(edit.inputs, edit.goals, strict=True))
        pairs += [(row, row) for row in edit.kept["a toy"]]
        for c, g in pairs:
            left = left + torch.outer(weight @ g.double(), c.double())
            right = right + torch.outer(c.double(), c.double())
        found = editor.changed_weights()
        wanted = (left @ torch.linalg.inv(right)).float()
        torch.testing.assert_close(found[TEXT], wanted, atol=1e-5, rtol=1e-4)
        assert not np.array_equal(draw(model, PROMPTS)[0], before[0])
    assert np.array_equal(draw(model, PROMPTS), before)


def test_a_folder_draws_as_the_model_does_and_is_exported(cli, model, tmp_path):
    model.pipe.save_pretrained(tmp_path / "folder")
    assert load_stable_diffusion(str(tmp_path / "folder"), device="cpu").guidance
    words = ("--model", tmp_path / "folder", "--device", "cpu", "--dtype", "float32")
    code, _, err = cli(
        "edit", "uce", "--erase", "a dog", "--into", tmp_path / "e", *words
    )
    assert code == 0, err
    code, out, err = cli(
        "edits", "export", tmp_path / "e", "--to", tmp_path / "x", "--json"
    )
    assert code == 0, err
    assert [file.rpartition("/")[2] for file in json.loads(out)["files"]] == [
        "changed.safetensors"
    ]


def test_what_does_not_fit_is_said(model):
    with pytest.raises(ModelError, match="no cross attention"):
        make("perfusion", model, covariance=None)
    model.words["<w>"] = Word("dog", (torch.zeros(1, 16),))
    try:
        with pytest.raises(ModelError, match="<w> has learned embeddings"):
            draw(model, ["a <w>"])
    finally:
        model.words.clear()
