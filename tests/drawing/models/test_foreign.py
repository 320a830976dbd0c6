"""LoRA files and embeddings of others: what they add is what their own libraries add."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmedit_cli import registry
from mmedit_cli.drawing.models.foreign_embeddings import read_embedding, split_token
from mmedit_cli.drawing.models.foreign_lora import (
    ldm_key,
    put,
    read_lora,
    split_weight,
)
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.workflow.concept_edits import (
    ConceptEditOptions,
    ConceptEdits,
    make_edits,
)
from mmedit_cli.drawing.workflow.generation import Added
from mmedit_cli.errors import DataError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.output import Output
from mmedit_cli.patch import Patch
from mmedit_cli.types import ConceptChange

RANK, ALPHA = 4, 2.0
NAMED = ("--superclass", "dog", "--token", "<d>")
LINEAR = ("attn2.to_k", "attn1.to_out.0", "ff.net.2")


@pytest.fixture(scope="module")
def model():
    return load_stable_diffusion("tiny-sd", device="cpu")


@pytest.fixture(scope="module")
def xl():
    return load_stable_diffusion("tiny-sdxl", device="cpu")


def weights(model):
    return {path: value.clone() for path, value in model.model.state_dict().items()}


def with_lora(model, path, weight=1.0):
    """The weights of a model with a LoRA, which leaves no trace."""
    before = weights(model)
    with Patch(model.model) as patch:
        put(patch, [(read_lora(path, model), weight)])
        found = weights(model)
    after = weights(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    return found


def factors(module, source):
    """Random factors for a layer: (down, up)."""
    out, inside, *kernel = module.weight.shape
    down = torch.randn(RANK, inside, *kernel, generator=source)
    up = torch.randn(out, RANK, *([1] * len(kernel)), generator=source)
    return down, up / 10


def layers(part, ends):
    return {p: m for p, m in part.named_modules() if p.endswith(tuple(ends))}


def kohya(names, path):
    """A file of kohya's scripts for layers by the name that it gives them."""
    source = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in names.items():
        down, up = factors(module, source)
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return tensors


def by_kohya(start, part, ends):
    found = layers(part, ends)
    return {f"{start}_{path.replace('.', '_')}": m for path, m in found.items()}


def old_diffusers(model, path):
    """As diffusers wrote it before it used peft."""
    source = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in layers(model.unet, ["attn2.to_k", "attn1.to_out.0"]).items():
        down, up = factors(module, source)
        block, _, role = name.removesuffix(".0").rpartition(".")
        start = f"unet.{block}.processor.{role}_lora"
        tensors |= {f"{start}.down.weight": down, f"{start}.up.weight": up}
    save_file(tensors, path)


def of_peft(unet):
    """An adapter of peft, with random factors."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=6, target_modules=["to_k", "to_out.0"], use_rslora=True
    )
    adapted = get_peft_model(unet, config)
    source = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=source)
            parameter.data = noise / 10
    return adapted


def of_diffusers(pipe, path):
    """A file that diffusers writes, with an alpha in its metadata."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["to_k", "ff.net.2"])
    pipe.unet.add_adapter(config)
    source = torch.Generator().manual_seed(0)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=source)
            parameter.data = noise / 10
    StableDiffusionPipeline.save_lora_weights(
        path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )


def fused(path, weight):
    """The weights of the UNet after diffusers itself has put a LoRA into it."""
    pipe = load_stable_diffusion("tiny-sd", device="cpu").pipe
    pipe.load_lora_weights(path)
    pipe.fuse_lora(lora_scale=weight)
    pipe.unload_lora_weights()
    return {f"unet.{key}": value for key, value in pipe.unet.state_dict().items()}


@pytest.mark.parametrize("maker", ["kohya", "old", "diffusers"])
def test_what_a_file_adds_is_what_diffusers_adds(model, tmp_path, maker):
    path = tmp_path / "lora.safetensors"
    if maker == "kohya":
        ends = (*LINEAR, "resnets.0.conv1", "proj_in")
        kohya(by_kohya("lora_unet", model.unet, ends), path)
    elif maker == "old":
        old_diffusers(model, path)
    else:
        of_diffusers(load_stable_diffusion("tiny-sd", device="cpu").pipe, tmp_path)
        path = tmp_path
    ours = with_lora(model, path, 0.7)
    theirs = fused(path, 0.7)
    base = weights(model)
    assert sum(not torch.equal(base[key], ours[key]) for key in base) >= 8
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)


def test_what_an_adapter_adds_is_what_peft_adds(model, tmp_path):
    adapted = of_peft(load_stable_diffusion("tiny-sd", device="cpu").unet)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = adapted.merge_and_unload().state_dict()
    ours = with_lora(model, tmp_path / "adapter")
    base = weights(model)
    assert any(not torch.equal(base[key], ours[key]) for key in base)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[f"unet.{key}"], value, rtol=1e-5, atol=1e-6)


def test_text_encoders_of_kohya(model, xl, tmp_path):
    for loaded, starts in (
        (model, {"text_encoder": "lora_te_text_model"}),
        (
            xl,
            {
                "text_encoder": "lora_te1_text_model",
                "text_encoder_2": "lora_te2",
            },
        ),
    ):
        names = {}
        for part, start in starts.items():
            names |= by_kohya(start, loaded.model[part], ["q_proj", "fc1"])
        tensors = kohya(names, tmp_path / "lora.safetensors")
        before = weights(loaded)
        after = with_lora(loaded, tmp_path / "lora.safetensors")
        for part, start in starts.items():
            for path in layers(loaded.model[part], ["q_proj", "fc1"]):
                name = f"{start}_{path.replace('.', '_')}"
                down = tensors[f"{name}.lora_down.weight"]
                up = tensors[f"{name}.lora_up.weight"]
                key = f"{part}.{path}.weight"
                wanted = before[key] + ALPHA / RANK * up @ down
                torch.testing.assert_close(after[key], wanted)


def test_kohya_names_the_blocks_of_xl_as_its_checkpoints_do(xl, tmp_path):
    """As in `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k`."""
    start = "model.diffusion_model."
    names = {}
    per_block = xl.unet.config.layers_per_block
    for path, module in layers(xl.unet, ["attn2.to_v"]).items():
        name = ldm_key(path, per_block).removeprefix(start).replace(".", "_")
        names[f"lora_unet_{name}"] = module
    assert any("input_blocks" in name for name in names)
    kohya(names, tmp_path / "sgm.safetensors")
    plain = by_kohya("lora_unet", xl.unet, ["attn2.to_v"])
    kohya(plain, tmp_path / "plain.safetensors")
    one = with_lora(xl, tmp_path / "sgm.safetensors")
    other = with_lora(xl, tmp_path / "plain.safetensors")
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert any(not torch.equal(v, one[k]) for k, v in weights(xl).items())


def test_several_add_up_and_weights_count(model, tmp_path):
    names = by_kohya("lora_unet", model.unet, ["attn2.to_k"])
    kohya(names, tmp_path / "one.safetensors")
    change = read_lora(tmp_path / "one.safetensors", model)
    once = with_lora(model, tmp_path / "one.safetensors", 0.5)
    with Patch(model.model) as patch:
        put(patch, [(change, 0.75), (change, -0.25)])
        both = weights(model)
    for key, value in once.items():
        torch.testing.assert_close(both[key], value)


@pytest.mark.parametrize(
    ("text", "weight"),
    [("a.safetensors", 1), ("a.safetensors:0.8", 0.8), ("C:/x/a.safetensors", 1)],
)
def test_a_weight_follows_a_colon(text, weight):
    path, found = split_weight(text)
    assert (path.name, found) == ("a.safetensors", weight)


NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {f"{NAME}.lora_down.weight": (2, 32), f"{NAME}.lora_up.weight": (32, 2)}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({f"{NAME}.hada_w1_a": (2, 2)}, "a LoHa"),
        ({**GOOD, f"{NAME}.dora_scale": (2,)}, "a DoRA"),
        ({"model.weight": (2, 2)}, "not the name of a tensor of a LoRA"),
        ({f"{NAME}.lora_down.weight": (2, 32)}, "its factor up is missing"),
        ({key.replace("mid", "low"): s for key, s in GOOD.items()}, "no such layer"),
        ({**GOOD, f"{NAME}.lora_down.weight": (2, 77)}, "do not fit a weight of"),
        ({}, "no tensors"),
    ],
)
def test_files_that_do_not_fit(model, tmp_path, shapes, said):
    path = tmp_path / "lora.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    with pytest.raises(DataError, match=said):
        read_lora(path, model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lora", "gone.safetensors"), "gone.safetensors: no such file"),
        (("--lora", "x.safetensors:much"), "'much' is no number"),
        (("--lora", "old.pt"), "others are not opened: they may run code"),
        (("--embedding", "old.pt"), "others are not opened: they may run code"),
        (("--embedding", "gone.safetensors"), "no such file"),
        (("--embedding", "two.safetensors"), "not an embedding of one word"),
        (("--embedding", "wide.safetensors"), "vectors of 7 numbers, tiny-sd needs 32"),
        (("--embedding", "my.safetensors"), "no concept <other>"),
    ],
)
def test_wrong_input_is_one_line(cli, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.pt").write_bytes(b"0")
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, "two.safetensors")
    save_file({"<w>": torch.ones(2, 7)}, "wide.safetensors")
    save_file({"<my>": torch.ones(2, 32)}, "my.safetensors")
    prompt = "a <other>" if words[-1] == "my.safetensors" else "a dog"
    code, _, err = cli("generate", prompt, "--model", "tiny-sd", *words)
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "generated.png").exists()


def picture(path):
    with Image.open(path) as found:
        return np.asarray(found)


@pytest.mark.parametrize(
    ("key", "token"),
    [("<my-cat>", "<my-cat>"), ("emb_params", "<my-file>"), ("sks", "<sks>")],
)
def test_an_embedding_is_drawn_as_its_vectors_say(cli, model, tmp_path, key, token):
    (vector,) = model.embedding("cat")
    save_file({key: vector[None]}, tmp_path / "my-file.safetensors")
    few = ("--model", "tiny-sd", "--steps", 2, "--device", "cpu", "-o")
    embedding = ("--embedding", tmp_path / "my-file.safetensors")
    prompt = f"a {token} on the beach"
    code, _, err = cli("generate", prompt, *embedding, *few, tmp_path / "ours.png")
    assert code == 0, err
    cli("generate", "a cat on the beach", *few, tmp_path / "cat.png")
    ours, cat = picture(tmp_path / "ours.png"), picture(tmp_path / "cat.png")
    assert np.array_equal(ours, cat)


def test_an_embedding_of_xl_has_vectors_for_both_encoders(xl, tmp_path):
    widths = [e.get_input_embeddings().weight.shape[1] for e in xl.text_encoders]
    vectors = {
        name: torch.randn(3, width)
        for name, width in zip(("clip_l", "clip_g"), widths, strict=True)
    }
    path = tmp_path / "word.safetensors"
    save_file(vectors, path)
    named, chosen = split_token(f"{path}:<mine>")
    token, word = read_embedding(named, chosen, xl)
    assert (token, word.text) == ("<mine>", "mine")
    for found, wanted in zip(word.vectors, vectors.values(), strict=True):
        assert torch.equal(found, wanted)
    save_file({**vectors, "clip_g": torch.randn(2, widths[1])}, path)
    with pytest.raises(DataError, match="not as many vectors"):
        read_embedding(path, "", xl)


def test_generate_draws_with_a_lora_and_beside_without(cli, model, tmp_path):
    kohya(by_kohya("lora_unet", model.unet, LINEAR), tmp_path / "l.safetensors")
    words = ("generate", "a dog", "--model", "tiny-sd", "--steps", 2, "--device", "cpu")
    named = ("--lora", f"{tmp_path / 'l.safetensors'}:0.5", "--compare", "--json")
    code, out, err = cli(*words, *named, "-o", tmp_path / "both")
    assert code == 0, err
    assert json.loads(out)["lora"] == [named[1]]
    base, edited = (tmp_path / "both" / f"000-0-{s}.png" for s in ("base", "edited"))
    assert not np.array_equal(picture(base), picture(edited))
    cli(
        *words, "--lora", f"{tmp_path / 'l.safetensors'}:0", "-o", tmp_path / "zero.png"
    )
    assert np.array_equal(picture(tmp_path / "zero.png"), picture(base))


def adopt(cli, *words):
    return cli(
        "edit",
        "multi-melo-diffusion",
        "--into",
        "mine",
        "--model",
        "tiny-sd",
        "--device",
        "cpu",
        *words,
    )


def test_a_lora_of_others_becomes_a_block(cli, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = (*LINEAR, "resnets.0.conv1", "proj_in")
    kohya(by_kohya("lora_unet", model.unet, ends), tmp_path / "l.safetensors")
    named = ("--lora", "l.safetensors:0.5", "--superclass", "dog", "--token", "<d>")
    code, _, err = adopt(cli, *named, "--set", "identifier=sks")
    assert code == 0, err
    assert "there already" in adopt(cli, *named)[2]
    draw = ("generate", "--steps", 2, "--device", "cpu", "-o")
    for prompt, name in (("a <d> on a table", "block"), ("a cat", "other")):
        cli(*draw, f"{name}.png", prompt, "--edits", "mine")
    plain = ("--model", "tiny-sd")
    cli(*draw, "whole.png", "a sks dog on a table", *plain, *named[:2])
    cli(*draw, "cat.png", "a cat", *plain)
    shown = {path.stem: picture(path).astype(int) for path in tmp_path.glob("*.png")}
    assert np.array_equal(shown["other"], shown["cat"])
    assert np.abs(shown["block"] - shown["whole"]).max() <= 1  # rounded otherwise
    cli("edits", "export", "mine", "--to", "out")
    (exported,) = (tmp_path / "out").glob("*.safetensors")
    ours = with_lora(model, exported)
    for key, value in with_lora(model, tmp_path / "l.safetensors", 0.5).items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)


def test_a_block_may_come_with_an_embedding(cli, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (vector,) = model.embedding("cat")
    save_file({"emb_params": vector[None]}, "e.safetensors")
    kohya(by_kohya("lora_unet", model.unet, LINEAR), tmp_path / "l.safetensors")
    word = ("--superclass", "cat", "--embedding", "e.safetensors", "--token")
    for token, more in (("<e>", ()), ("<both>", ("--lora", "l.safetensors"))):
        code, _, err = adopt(cli, *word, token, *more)
        assert code == 0, err
    draw = ("generate", "--steps", 2, "--device", "cpu", "-o")
    cli(*draw, "word.png", "a <e> on a table", "--edits", "mine")
    cli(*draw, "both.png", "a <both> on a table", "--edits", "mine")
    plain = ("--model", "tiny-sd")
    cli(*draw, "cat.png", "a cat on a table", *plain)
    cli(*draw, "lora.png", "a cat on a table", *plain, "--lora", "l.safetensors")
    shown = {path.stem: picture(path).astype(int) for path in tmp_path.glob("*.png")}
    assert np.array_equal(shown["word"], shown["cat"])
    assert np.abs(shown["both"] - shown["lora"]).max() <= 1
    assert not np.array_equal(shown["both"], shown["word"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lora", "l.safetensors", "--token", "<d>"), "--superclass and --token"),
        (("--lora", "none.safetensors", *NAMED), "no such file"),
        (("--embedding", "none.safetensors", *NAMED), "no such file"),
        (("--lora", "l.safetensors", "--images", ".", *NAMED), "was learned already"),
    ],
)
def test_what_cannot_be_adopted_is_one_line(
    cli, model, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    kohya(by_kohya("lora_unet", model.unet, LINEAR), tmp_path / "l.safetensors")
    code, _, err = adopt(cli, *words)
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "mine" / "index.json").exists()


def test_other_methods_take_no_adapters(cli, model, tmp_path):
    lora = ("--lora", tmp_path / "l.safetensors")
    code, _, err = cli("edit", "perfusion", "--into", tmp_path / "p", *lora, *NAMED)
    assert (code, "takes no adapters" in err) == (2, True), err


def test_edits_are_solved_from_weights_with_the_lora(model, tmp_path):
    kohya(by_kohya("lora_unet", model.unet, ["attn2.to_v"]), tmp_path / "l.safetensors")
    change = ConceptChange("a dog", ("a cat",))
    made = ConceptEditOptions("uce", "tiny-sd", (change,), tmp_path, device="cpu")
    make_edits(made, Output(quiet=True))
    before = weights(model)
    loras = [(read_lora(tmp_path / "l.safetensors", model), 1.0)]
    with Added(ConceptEdits(tmp_path), loras).to(model, ()):
        both = weights(model)
    with Patch(model.model) as patch:
        put(patch, loras)
        only_lora = weights(model)
        cls = registry.concept_editors.get("uce")
        hparams = load_hparams(registry.hparams_file("uce"), cls.Hparams)
        with cls(model, hparams) as editor:
            editor.edit([change])
            wanted = weights(model)
    after = weights(model)
    for key, value in both.items():
        assert torch.equal(value, wanted[key])
        assert torch.equal(after[key], before[key])
    path = next(key for key in before if key.endswith("attn2.to_v.weight"))
    assert not torch.equal(both[path], only_lora[path])
    assert not torch.equal(only_lora[path], before[path])
