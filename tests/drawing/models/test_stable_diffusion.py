"""Prompts with tokens of one's own, seeded pictures, and pipelines from a folder."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.prompts import Word, check_token, tokenize
from mmedit_cli.drawing.models.stable_diffusion import Sampling
from mmedit_cli.errors import DataError, MmeditError, ModelError, TooLong
from mmedit_cli.knowledge.models.shared.loading import load_backbone

FEW = Sampling(steps=2)
PROMPTS = ["a photo of a dog", "a cat on the beach"]


@pytest.fixture(scope="module", params=["tiny-sd", "tiny-sdxl"])
def model(request):
    return load_stable_diffusion(request.param, device="cpu")


@pytest.fixture
def spoken(model):
    """The model with a token of two vectors, which are those of the word cat twice."""
    cat = tuple(vector.repeat(2, 1) for vector in model.embedding("cat"))
    model.words["<my-cat>"] = Word("stuffed animal", cat)
    yield model
    model.words.clear()


def same(some, others):
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def test_pictures_are_those_of_the_pipeline_and_of_their_seeds(model):
    drawn = model.generate(PROMPTS, [3, 4], FEW)
    sources = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    settings = {
        "num_inference_steps": 2,
        "guidance_scale": model.guidance,
        "generator": sources,
    }
    assert same(drawn, model.pipe(PROMPTS, **settings).images)
    assert same(drawn, model.generate(PROMPTS, [3, 4], FEW))
    assert not same(drawn, model.generate(PROMPTS, [3, 5], FEW))
    assert not same(
        drawn, model.generate(PROMPTS, [3, 4], Sampling(steps=2, guidance=1.0))
    )
    assert not same(
        drawn, model.generate(PROMPTS, [3, 4], Sampling(steps=2, negative="a toy"))
    )


def test_every_step_of_every_picture_is_told(model):
    steps = []
    model.generate(
        [*PROMPTS, "a toy"],
        [0, 1, 2],
        Sampling(steps=2, batch_size=2),
        tick=steps.append,
    )
    assert steps == [2, 2, 1, 1]


def test_a_size_that_cannot_be_drawn_is_refused(model):
    assert model.generate(PROMPTS[:1], [0], Sampling(steps=1, resolution=32))[
        0
    ].size == (
        32,
        32,
    )
    for side in (33, 36):
        with pytest.raises(DataError, match="not a multiple of 8 pixels"):
            model.generate(PROMPTS, [0, 1], Sampling(steps=1, resolution=side))


def test_key_and_value_projections_read_the_prompt(model):
    found = model.cross_attention()
    assert len(found) == 8
    assert {p.role for p in found} == {"k", "v"}
    for projection in found:
        weight = model.model.get_submodule(projection.path).weight
        assert weight.shape == (projection.outputs, model.width)
        assert "attn2" in projection.path
    paths = model.attention(("q", "v"), text=("q", "v"))
    assert len([p for p in paths if p.startswith("unet.")]) == 4 * 4
    assert len([p for p in paths if p.startswith("text_encoder")]) == 3 * 2 * len(
        model.text_encoders
    )


def test_a_prompt_without_own_tokens_is_tokenized_as_ever(spoken):
    tokens = spoken.tokenize(["a photo of a dog", "", "dog " * 40])
    for tokenizer, ids in zip(spoken.tokenizers, tokens.ids, strict=True):
        wanted = tokenizer(
            ["a photo of a dog", "", "dog " * 40], padding="max_length", truncation=True
        )["input_ids"]
        assert ids.tolist() == wanted
    assert tokens.lengths.tolist() == [7, 2, 24]
    assert not tokens.places["<my-cat>"].any()
    assert torch.equal(tokens.aligned, torch.arange(24).expand(3, -1))


def test_a_tokenizer_without_a_limit_gets_that_of_the_model(model, tmp_path):
    model.pipe.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(
        path.read_text().replace(
            '"model_max_length": 24', '"model_max_length": 1000000000000000'
        )
    )
    assert "1000000000000000" in path.read_text()
    assert load_stable_diffusion(str(tmp_path), device="cpu").tokenize(["a dog"]).ids[
        0
    ].shape == (1, 24)


def test_own_tokens_stand_where_they_are_written(spoken):
    tokens = spoken.tokenize(["a <my-cat> on a <my-cat>", "a <my-cat>."])
    assert tokens.places["<my-cat>"].nonzero().tolist() == [
        [0, 2],
        [0, 3],
        [0, 6],
        [0, 7],
        [1, 2],
        [1, 3],
    ]
    assert tokens.lengths.tolist() == [9, 6]
    plain = spoken.tokenizers[0](
        "a stuffed animal on a stuffed animal", padding="max_length"
    )["input_ids"]
    assert tokens.plain_ids[0][0].tolist() == plain
    # both vectors are aligned with `animal`, all else with itself
    assert tokens.aligned[0, :10].tolist() == [0, 1, 3, 3, 4, 5, 7, 7, 8, 9]
    said = spoken.encode(spoken.tokenize(["a <my-cat> on the beach"])).hidden
    meant = spoken.encode(spoken.tokenize(["a cat cat on the beach"])).hidden
    torch.testing.assert_close(said, meant, atol=1e-6, rtol=1e-6)
    plain = spoken.encode(
        spoken.tokenize(["a <my-cat> on the beach"]), plain=True
    ).hidden
    whole = spoken.encode(spoken.tokenize(["a stuffed animal on the beach"])).hidden
    torch.testing.assert_close(plain[0, 4:], whole[0, 4:], atol=1e-6, rtol=1e-6)
    assert torch.equal(plain[0, 2], plain[0, 3])


def test_gradients_reach_the_vectors_and_nothing_else(spoken):
    vectors = tuple(
        v.clone().requires_grad_() for v in spoken.words["<my-cat>"].vectors
    )
    spoken.words["<my-cat>"] = Word("cat", vectors)
    spoken.encode(spoken.tokenize(["a <my-cat>"])).hidden.square().mean().backward()
    assert all(v.grad.abs().sum() > 0 for v in vectors)
    assert all(p.grad is None for p in spoken.model.parameters())
    assert not spoken.model["text_encoder"].get_input_embeddings()._forward_hooks


def test_an_own_token_that_would_be_cut_off_is_an_error(spoken):
    spoken.tokenize(["dog " * 20 + "<my-cat>"])
    for count in (21, 22, 40):
        with pytest.raises(TooLong, match="<my-cat> stands beyond the 24 tokens"):
            spoken.tokenize(["dog " * count + "<my-cat>"])


def test_a_word_without_vectors_is_spelled_out(model):
    words = {"<x>": Word("sks dog")}
    one = tokenize(model.tokenizers, words, ["a <x> on snow"])
    assert torch.equal(one.ids[0], model.tokenize(["a sks dog on snow"]).ids[0])


@pytest.mark.parametrize(
    "token", ["dog", "<my dog>", "<>", "", "<a><b>", "<" + "x" * 41 + ">"]
)
def test_tokens_have_angle_brackets(token):
    check_token("<my-dog>")
    with pytest.raises(DataError):
        check_token(token)


def test_the_loss_is_small_for_the_noise_itself(model, monkeypatch):
    tokens = model.tokenize(PROMPTS)
    latents = model.latents(torch.rand(2, 3, 16, 16) * 2 - 1)[0]
    errors = model.errors(
        latents, model.encode(tokens), torch.Generator().manual_seed(0)
    )
    assert errors.shape == latents.shape
    assert 0.3 < errors.mean() < 3, (
        "an untrained model does not see noise of variance 1"
    )
    again = model.errors(
        latents, model.encode(tokens), torch.Generator().manual_seed(0)
    )
    assert torch.equal(errors, again)
    assert model.current_prompts is None
    with pytest.raises(MmeditError, match="rows that are not known"):
        model.rows(2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_a_folder(model, tmp_path, dtype):
    model.pipe.save_pretrained(tmp_path / "mine")
    loaded = load_stable_diffusion(
        str(tmp_path / "mine"),
        device="cpu",
        dtype=dtype,
        low_memory=dtype == "bfloat16",
    )
    assert (loaded.name, str(loaded.dtype)) == ("mine", f"torch.{dtype}")
    drawn = loaded.generate(PROMPTS, [3, 4], FEW)
    if dtype == "float32":
        assert same(drawn, model.generate(PROMPTS, [3, 4], FEW))
    (tmp_path / "mine" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="unet: no weights"):
        load_stable_diffusion(str(tmp_path / "mine"))


def test_float16_copies_alone_are_enough(model, tmp_path):
    model.pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert same(
        load_stable_diffusion(str(tmp_path / "half"), device="cpu").generate(
            PROMPTS, [3, 4], FEW
        ),
        model.generate(PROMPTS, [3, 4], FEW),
    )


def test_the_text_encoder_has_a_fingerprint_of_its_own(model, tmp_path):
    model.pipe.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "vae" / "config.json"
    path.write_text(path.read_text() + "\n")
    one, other = (
        load_stable_diffusion(str(tmp_path / name), device="cpu") for name in "ab"
    )
    assert one.fingerprint != other.fingerprint
    assert one.text_fingerprint == other.text_fingerprint


def test_a_folder_says_how_it_is_best_used(model, tmp_path):
    model.pipe.save_pretrained(tmp_path / "mine")
    path = tmp_path / "mine" / "settings.json"
    path.write_text('{"guidance": 1.5}')
    mine = load_stable_diffusion(str(tmp_path / "mine"), device="cpu")
    assert same(
        mine.generate(PROMPTS, [3, 4], FEW),
        model.generate(PROMPTS, [3, 4], Sampling(steps=2, guidance=1.5)),
    )
    assert (
        mine.fingerprint
        == load_stable_diffusion(str(tmp_path / "mine"), device="cpu").fingerprint
    )
    for text in ("[1]", "{", '{"guidance": null}', '{"guidance": "much"}'):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"settings\.json:"):
            load_stable_diffusion(str(tmp_path / "mine"))


def test_what_answers_does_not_draw_and_the_other_way_round():
    with pytest.raises(ModelError, match="it draws nothing"):
        load_stable_diffusion("tiny-blip2")
    with pytest.raises(ModelError, match="it answers nothing"):
        load_backbone("tiny-sd")
