"""Perfusion on tiny models: what is trained, what is locked, when a gate opens, and how small a file is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from drawing.methods.conftest import covariance, draw, make, snapshot
from mmedit_cli.drawing.covariance import Covariance
from mmedit_cli.drawing.methods.base import LearnedConcept
from mmedit_cli.drawing.methods.perfusion.personalizer import (
    Perfusion,
    PerfusionTraining,
)
from mmedit_cli.drawing.methods.shared.photos import (
    Photos,
    masked_loss,
    normalized,
    open_squares,
)
from mmedit_cli.drawing.models.stable_diffusion import Encoding
from mmedit_cli.errors import DataError, StateError
from mmedit_cli.runtime import generator

QUICK = ("steps=3", "batch_size=2")
NAMED = "a photo of a <my-dog>"


def projections(model, prompts, unconditional=0):
    """The output of every key and value projection, (B, N, d) by path, and the tokens."""
    tokens = model.tokenize(prompts, unconditional=unconditional)
    seen = {}
    handles = [
        model.model.get_submodule(p.path).register_forward_hook(
            lambda m, i, o, path=p.path: seen.update({path: o})
        )
        for p in model.cross_attention()
    ]
    with torch.no_grad():
        encoding = model.encode(tokens)
        with model.running(tokens, encoding):
            model.errors(torch.zeros(len(prompts), 4, 8, 8), encoding, generator(0))
    for handle in handles:
        handle.remove()
    return seen, tokens, encoding


@pytest.fixture
def editor(model):
    made = make("perfusion", model, *QUICK)
    yield made
    made.close()


@pytest.fixture
def lesson(editor, concept):
    """The middle of learning: the editor as `_learn` has it."""
    editor._lock = "local"
    made = PerfusionTraining(editor, concept, generator(0))
    yield made
    editor.model.words.clear()
    editor._loaded = []
    editor._hook()


def test_exactly_the_embedding_and_the_values_are_trained(lesson):
    layers = [layer for layer in lesson.editor.layers if layer.role == "v"]
    assert lesson.values.numel() == sum(layer.outputs for layer in layers)
    assert lesson.keys is None
    assert sum(v.numel() for v in lesson.vectors) == lesson.model.width


def test_learning_moves_nothing_but_what_is_learned(editor, concept):
    before = snapshot(editor.model)["tensors"]
    learned = editor.learn(concept)
    assert all(
        torch.equal(t, before[k]) for k, t in editor.model.model.state_dict().items()
    )
    start = torch.cat(editor.model.embedding("dog"))
    assert (learned.tensors["embedding"][0].float() - start).abs().max() > 1e-3
    layer = next(layer for layer in editor.layers if layer.role == "v")
    weight = editor.model.model.get_submodule(layer.path).weight
    first = weight @ learned.tensors["superclass_input"].float()
    assert (learned.tensors["values"][: len(first)].float() - first).abs().max() > 1e-3


def test_gradients_reach_both(lesson, photos, editor):
    some = Photos(editor.model, open_squares(photos, editor.model.resolution))
    lesson._accumulate(some)
    assert lesson.values.grad.abs().sum() > 0
    assert all(v.grad.abs().sum() > 0 for v in lesson.vectors)
    assert all(p.grad is None for p in editor.model.model.parameters())


def test_running_means(lesson):
    width = lesson.model.width
    seen, superclass = torch.rand(width), torch.rand(width)
    for _ in range(3):
        lesson.step(seen, superclass)
        torch.testing.assert_close(lesson.input_mean, seen)
    weights = {
        p.path: lesson.model.model.get_submodule(p.path).weight
        for p in lesson.editor.layers
    }
    for layer in lesson.editor.layers:
        if layer.role == "v":
            wanted = weights[layer.path] @ superclass
            torch.testing.assert_close(
                lesson.values.detach()[lesson.editor._slices[layer.path]], wanted
            )
    other, kind = torch.rand(width), torch.rand(width)
    lesson.step(other, kind)
    torch.testing.assert_close(lesson.input_mean, 0.99 * seen + 0.01 * other)
    torch.testing.assert_close(lesson.superclass_mean, 0.99 * superclass + 0.01 * kind)
    layer = lesson.editor.layers[
        0
    ]  # a mean of projections is the projection of the mean
    mean = 0.99 * weights[layer.path] @ superclass + 0.01 * weights[layer.path] @ kind
    torch.testing.assert_close(weights[layer.path] @ lesson.superclass_mean, mean)


def test_straight_through_changes_the_gradient_and_not_the_value(
    model, concept, photos
):
    found = []
    for flag in ("true", "false"):
        editor = make("perfusion", model, *QUICK, f"straight_through={flag}")
        lesson = PerfusionTraining(editor, concept, generator(0))
        loss = lesson._accumulate(Photos(model, open_squares(photos, model.resolution)))
        found.append((loss, lesson.vectors[0].grad.clone()))
        model.words.clear()
        editor._loaded = []
        editor._hook()
    assert found[0][0] == found[1][0]
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-3)


def test_keys_are_locked_to_the_superclass_locally(model, concept):
    with make("perfusion", model, *QUICK, "file_dtype=float32") as editor:
        learned = editor.learn(concept)
        path = next(p.path for p in editor.layers if p.role == "k")
        linear = model.model.get_submodule(path)
        tokens = model.tokenize([NAMED])
        # an encoding that is the target input itself, everywhere
        target = (
            learned.tensors["target_input"]
            .expand(1, tokens.ids[0].shape[1], -1)
            .contiguous()
        )
        with torch.no_grad(), model.running(tokens, Encoding(target)):
            key = linear(target)[0, 0]
        locked = linear.weight @ learned.tensors["superclass_input"]
        gate = torch.sigmoid(torch.tensor((1 - 0.70) / 0.15))
        torch.testing.assert_close(key, gate * locked, atol=1e-4, rtol=1e-4)
        assert torch.cosine_similarity(key, locked, dim=0) > 1 - 1e-6


def test_a_global_lock_takes_the_keys_of_the_plain_prompt(model, concept):
    plain, _, _ = projections(model, ["a photo of a dog on the beach"])
    prompt = "a photo of a <my-dog> on the beach"
    with make("perfusion", model, *QUICK) as editor:
        learned = editor.learn(concept)
        local, _, _ = projections(model, [prompt])
    outputs = {}
    for lock in ("global", "global_gated"):
        with make("perfusion", model, *QUICK, f"key_lock={lock}") as editor:
            editor.add(learned)
            outputs[lock], _, _ = projections(model, [prompt])
    for layer in model.cross_attention():
        if layer.role == "k":
            assert torch.equal(outputs["global"][layer.path], plain[layer.path])
            assert not torch.equal(local[layer.path], plain[layer.path])
            assert not torch.equal(
                outputs["global_gated"][layer.path], plain[layer.path]
            )
        else:
            assert torch.equal(outputs["global"][layer.path], local[layer.path]), (
                "values do not know of it"
            )


def test_learned_keys_for_the_ablation(model, concept, tmp_path):
    with make("perfusion", model, *QUICK, "key_lock=none") as editor:
        learned = editor.learn(concept)
        drawn = draw(model, [NAMED])
        editor.save("<my-dog>", tmp_path / "c.safetensors")
    assert learned.tensors["keys"].shape == learned.tensors["values"].shape
    with make("perfusion", model, *QUICK, "key_lock=none") as editor:
        editor.load(tmp_path / "c.safetensors")
        assert np.array_equal(draw(model, [NAMED]), drawn)


def test_the_gate_can_be_moved_after_learning(editor, concept):
    editor.learn(concept)
    drawn = draw(editor.model, [NAMED])
    editor.set_gate("<my-dog>", beta=0.4)
    assert not np.array_equal(draw(editor.model, [NAMED]), drawn)
    editor.set_gate("<my-dog>", beta=0.7)
    assert np.array_equal(draw(editor.model, [NAMED]), drawn)
    editor.set_gate(
        "<my-dog>", beta=1e6
    )  # shut: what is left is the part that is not along the target
    outputs, _, encoding = projections(editor.model, [NAMED])
    active = editor._loaded[0]
    share = (encoding.hidden @ active.dual) / (active.target_input @ active.dual)
    rest = encoding.hidden - share[..., None] * active.target_input
    for layer in editor.layers:
        weight = editor.model.model.get_submodule(layer.path).weight
        torch.testing.assert_close(
            outputs[layer.path], rest @ weight.T, atol=1e-4, rtol=1e-3
        )
    with pytest.raises(StateError, match="tau must be above 0"):
        editor.set_gate("<my-dog>", tau=0.0)
    with pytest.raises(StateError, match="no concept <x>"):
        editor.set_gate("<x>", beta=1.0)


def test_the_paper_scope_touches_every_prompt_and_spares_the_unconditional_rows(
    model, concept
):
    base, _, _ = projections(model, ["", "a cat"], 1)
    for uncond in ("false", "true"):
        with make(
            "perfusion", model, *QUICK, "gate_scope=paper", f"edit_uncond={uncond}"
        ) as editor:
            editor.learn(concept)
            outputs, _, _ = projections(model, ["", "a cat"], 1)
        for path, output in outputs.items():
            assert not torch.equal(output[1], base[path][1])
            assert torch.equal(output[0], base[path][0]) == (uncond == "false")


def test_two_loaded_and_one_named_is_as_one_loaded(model, concept):
    with make("perfusion", model, *QUICK) as editor:
        editor.learn(concept)
        alone, _, _ = projections(model, [NAMED])
        editor.learn(replace(concept, token="<toy>", superclass="toy"))
        both, _, _ = projections(model, [NAMED])
        order = list(editor.concepts.values())
        two, _, _ = projections(model, ["a <my-dog> with a <toy>"])
    for path, output in alone.items():
        torch.testing.assert_close(both[path], output, atol=1e-6, rtol=1e-5)
    with make("perfusion", model, *QUICK) as editor:
        for learned in reversed(order):
            editor.add(learned)
        swapped, _, _ = projections(model, ["a <my-dog> with a <toy>"])
    for path, output in two.items():
        torch.testing.assert_close(swapped[path], output, atol=1e-4, rtol=1e-4)


def test_concepts_of_different_covariances_do_not_mix(model, concept):
    matrix = covariance(model).matrix
    half = torch.randn(
        model.width, model.width, generator=generator(5), dtype=torch.float64
    )
    other = Covariance(half @ half.T + 0.1 * matrix)
    with make("perfusion", model, *QUICK, covariance=other) as editor:
        foreign = editor.learn(replace(concept, token="<toy>", superclass="toy"))
    with make("perfusion", model, *QUICK) as editor:
        editor.learn(concept)
        with pytest.raises(StateError, match="learned with different covariances"):
            editor.add(foreign)
        assert list(editor.concepts) == list(editor.model.words) == ["<my-dog>"]


def test_learning_needs_a_covariance(model, concept):
    editor = make("perfusion", model, *QUICK, covariance=None)
    with pytest.raises(StateError, match="needs the covariance"):
        editor.learn(concept)


def test_several_vectors_a_concept(model, concept, tmp_path):
    with make("perfusion", model, *QUICK, "vectors=3") as editor:
        learned = editor.learn(concept)
        assert learned.tensors["embedding"].shape == (3, model.width)
        drawn = draw(model, [NAMED])
        editor.save("<my-dog>", tmp_path / "c.safetensors")
    with make("perfusion", model, *QUICK) as editor:
        editor.load(tmp_path / "c.safetensors")
        assert np.array_equal(draw(model, [NAMED]), drawn)


EACH = (
    *QUICK,
    "vectors=3",
    "gate_scope=places",
    "key_lock=none",
    "outputs_from=concept",
    "file_dtype=float32",
)


def test_each_of_several_vectors_is_edited_where_it_stands(model, concept):
    prompt = "a photo of a <my-dog> on a table"
    with make("perfusion", model, *EACH) as editor:
        learned = editor.learn(concept)
        outputs, tokens, encoding = projections(model, [prompt])
    wanted = learned.tensors
    inputs, duals = wanted["target_input"], wanted["target_dual"]
    assert len(inputs) == len(wanted["values"]) == len(wanted["keys"]) == 3
    (places,) = tokens.places["<my-dog>"].nonzero()[:, 1].split(3)
    for layer in editor.layers:
        weight = model.model.get_submodule(layer.path).weight
        expected = encoding.hidden[0] @ weight.T
        learnt = wanted["values" if layer.role == "v" else "keys"]
        for j, place in enumerate(places.tolist()):
            e = encoding.hidden[0, place]
            r = (e @ duals[j]) / (inputs[j] @ duals[j])
            gate = torch.sigmoid((r - 0.70) / 0.15)
            output = learnt[j, editor._slices[layer.path]]
            expected[place] = (e - r * inputs[j]) @ weight.T + gate * output
        torch.testing.assert_close(
            outputs[layer.path][0], expected, atol=1e-4, rtol=1e-4
        )


def test_a_concept_of_several_edits_is_kept_and_drawn_with_others(
    model, concept, tmp_path
):
    both = ["a <my-dog> and a <my-dog> with a <toy>"]
    with make("perfusion", model, *EACH) as editor:
        editor.learn(concept)
        editor.learn(replace(concept, token="<toy>", superclass="toy"))
        drawn = draw(model, both)
        for token in ("<my-dog>", "<toy>"):
            editor.save(token, tmp_path / f"{token[1]}.safetensors")
    before = draw(model, ["a cat"])
    with make("perfusion", model, *EACH) as editor:
        for file in sorted(tmp_path.glob("*.safetensors")):
            editor.load(file)
        assert np.array_equal(draw(model, both), drawn)
        assert np.array_equal(draw(model, ["a cat"]), before)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"coloured": 0.3}, "coloured needs colours"),
        ({"coloured": 0.3, "colours": ("red #ff0000",), "mask": "file"}, "one of them"),
        ({"vectors": 2, "gate_scope": "places"}, "outputs_from=concept"),
    ],
)
def test_values_that_make_no_sense(wrong, said):
    with pytest.raises(ValueError, match=said):
        Perfusion.Hparams(**wrong)


def test_photos_on_a_colour_are_learned_with_its_name(model, concept, tmp_path):
    cut_out = []
    for i in range(2):
        path = tmp_path / f"cut-{i}.png"
        Image.new("RGBA", (16, 16), (200, 0, 0, 0)).save(path)
        cut_out.append(path)
    subject = replace(concept, images=tuple(cut_out))
    more = (
        "coloured=0.9",
        'colours=["blue #0000ff"]',
        "batch_size=8",
        'templates=["a {}"]',
    )
    with make("perfusion", model, *QUICK, *more) as editor:
        seen = []
        tokenize = model.tokenize
        model.tokenize = lambda prompts, **kw: (
            seen.extend(prompts) or tokenize(prompts, **kw)
        )
        try:
            editor.learn(subject)
        finally:
            del model.tokenize
    assert {"a <my-dog>", "a <my-dog> on a blue background"} == set(seen)
    assert seen[2:].count("a <my-dog> on a blue background") > 12


@pytest.mark.parametrize(("dtype", "most"), [("float16", 34_000), ("float32", 66_000)])
def test_a_file_for_stable_diffusion_15_is_small(tmp_path, dtype, most):
    class Shaped:
        name, fingerprint, text_fingerprint, words = (
            "stable-diffusion-v1-5",
            "0" * 32,
            "0" * 32,
            {},
        )
        former = former_text = ""

    editor = object.__new__(Perfusion)
    editor.model, editor.seed, editor.hparams = (
        Shaped(),
        0,
        Perfusion.Hparams(file_dtype=dtype),
    )
    number = getattr(torch, dtype)
    sizes = {
        "values": (12_480,),
        "target_input": (768,),
        "target_dual": (768,),
        "superclass_input": (768,),
        "embedding": (1, 768),
    }
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    layers = str([[path, 1280]] * 16).replace(" ", "").replace("'", '"')
    facts = {
        "layers": layers,
        "covariance": "0" * 16,
        "covariance_tokens": "valid",
        "ridge": "0",
    }
    tensors = {key: torch.zeros(shape, dtype=number) for key, shape in sizes.items()}
    editor.concepts = {"<my-dog>": LearnedConcept("<my-dog>", "dog", tensors, facts)}
    editor.save("<my-dog>", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_size <= most


def test_photos_are_drawn_as_they_are_and_mirrored(model, photos):
    squares = open_squares(photos, model.resolution)
    marks = torch.zeros(3, 16, 16)
    marks[:, :, :8] = 1
    for flip, left in ((0.0, 1.0), (1.0, 0.0)):
        some = Photos(model, squares, marks, flip)
        latents, masks = some.sample(5, generator(0))
        assert latents.shape == (5, 4, 8, 8)
        assert (masks[..., 0] == left).all()
        again, _ = some.sample(5, generator(0))
        assert torch.equal(latents, again)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, deviation = model.latents(pixels)
    with torch.no_grad():
        wanted = model.pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, wanted.mean * model.pipe.vae.config.scaling_factor)
    torch.testing.assert_close(
        deviation, wanted.std * model.pipe.vae.config.scaling_factor
    )


def test_masks_weigh_the_loss():
    errors = torch.rand(3, 4, 8, 8)
    ones = torch.ones(3, 1, 8, 8)
    assert masked_loss(errors, ones) == errors.mean() == masked_loss(errors, None)
    assert masked_loss(errors, 0 * ones) == 0
    masks = torch.rand(3, 8, 8)
    torch.testing.assert_close(normalized(masks * 7), normalized(masks))
    assert normalized(masks).amax((1, 2)).tolist() == [1, 1, 1], (
        "each by its own largest value"
    )
    assert not normalized(torch.zeros(1, 8, 8)).any()


def test_masks_from_files(model, concept):
    with make("perfusion", model, *QUICK) as editor:
        plain = editor.learn(concept)
    with make("perfusion", model, *QUICK, "mask=file") as editor:
        with pytest.raises(DataError, match=r"masks/0\.png: no such mask") as caught:
            editor.learn(concept)
        assert len(caught.value.problems) == 3
        folder = concept.images[0].parent / "masks"
        folder.mkdir()
        for path in concept.images:
            mask = np.zeros((40, 32), np.uint8)
            mask[8:30, 6:24] = 255
            Image.fromarray(mask).save(folder / path.name)
        masked = editor.learn(concept)
    assert not torch.equal(masked.tensors["values"], plain.tensors["values"])


def test_masks_from_clipseg(model, concept, tmp_path):
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    words = model.tokenizers[0]
    config = CLIPSegConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=16,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    folder = tmp_path / "clipseg"
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    words.save_pretrained(folder)
    with make(
        "perfusion", model, *QUICK, "mask=clipseg", f"mask_model={folder}"
    ) as editor:
        assert np.isfinite(editor.learn(concept).info["loss_last"])
