"""MiniGPT-4 from files in the published layout, against the published architecture written out in plain tensors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import QUERIES

from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.models.shared.minigpt4_weights import (
    PublishedMiniGPT4,
    convert,
)
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

V, Q, D, MLP, BLOCKS, SIDE, PATCH, N = 176, 128, 48, 32, 40, 32, 8, 8


def tensors(shapes):
    """Random numbers of a size that lets pictures through: the scales of norms lie around 1."""
    generator = torch.Generator().manual_seed(len(shapes))
    drawn = {
        name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    return {
        name: t * 2 * t[0].numel() ** -0.5
        if t.dim() > 1
        else t * 0.1 + ("norm" in name.lower() and "weight" in name)
        for name, t in drawn.items()
    }


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_shapes():
    shapes = {"cls_token": (1, 1, V), "pos_embed": (1, 1 + (SIDE // PATCH) ** 2, V)}
    shapes |= {
        "patch_embed.proj.weight": (V, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (V,),
    }
    for i in range(BLOCKS):
        at = f"blocks.{i}."
        shapes |= (
            norm(f"{at}norm1", V)
            | norm(f"{at}norm2", V)
            | linear(f"{at}attn.proj", V, V)
        )
        shapes |= {
            f"{at}attn.qkv.weight": (3 * V, V),
            f"{at}attn.q_bias": (V,),
            f"{at}attn.v_bias": (V,),
        }
        shapes |= linear(f"{at}mlp.fc1", MLP, V) | linear(f"{at}mlp.fc2", V, MLP)
    return (
        shapes | norm("norm", V) | linear("head", 10, V)
    )  # of the tower's own training: not used


def qformer_shapes():
    shapes = (
        {"query_tokens": (1, N, Q)} | norm("ln_vision", V) | linear("t5_proj", 9, Q)
    )
    shapes |= {
        "Qformer.bert.embeddings.word_embeddings.weight": (20, Q),
        "Qformer.cls.predictions.bias": (20,),
    }
    shapes |= norm("Qformer.bert.embeddings.LayerNorm", Q)
    for i in range(4):
        at = f"Qformer.bert.encoder.layer.{i}."
        for block, source in (
            ("attention", Q),
            *((("crossattention", V),) if i % 2 == 0 else ()),
        ):
            shapes |= linear(f"{at}{block}.self.query", Q, Q) | linear(
                f"{at}{block}.self.key", Q, source
            )
            shapes |= linear(f"{at}{block}.self.value", Q, source) | linear(
                f"{at}{block}.output.dense", Q, Q
            )
            shapes |= norm(f"{at}{block}.output.LayerNorm", Q)
        for branch in ("", "_query"):  # the branch for text is not used
            shapes |= linear(f"{at}intermediate{branch}.dense", MLP, Q) | linear(
                f"{at}output{branch}.dense", Q, MLP
            )
            shapes |= norm(f"{at}output{branch}.LayerNorm", Q)
    return shapes


def attention(p, x, source, names, heads):
    """softmax(q k^T / sqrt(d)) v over heads, with three (weight, bias) pairs of `p`."""
    (q, k, v) = (
        F.linear(s, *p[name]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name, s in zip(names, (x, source, source), strict=True)
    )
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Pairs(dict):
    """Looks up `name` as (name.weight, name.bias)."""

    def __missing__(self, name):
        return self[f"{name}.weight"], self[f"{name}.bias"]


def image_tokens(vision, qformer, projection, pixels):
    """What MiniGPT-4's encode_img computes, from its tensors under their published names."""
    p = Pairs(vision)
    x = (
        F.conv2d(pixels, *p["patch_embed.proj"], stride=PATCH)
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat((p["cls_token"].expand(len(x), -1, -1), x), 1) + p["pos_embed"]
    for i in range(BLOCKS - 1):
        at = f"blocks.{i}."
        for part, weight in zip("qkv", p[f"{at}attn.qkv.weight"].chunk(3), strict=True):
            p[part] = (
                weight,
                torch.zeros(V) if part == "k" else p[f"{at}attn.{part}_bias"],
            )
        h = F.layer_norm(x, (V,), *p[f"{at}norm1"], eps=1e-6)
        x = x + F.linear(attention(p, h, h, "qkv", 2), *p[f"{at}attn.proj"])
        h = F.layer_norm(x, (V,), *p[f"{at}norm2"], eps=1e-6)
        x = x + F.linear(F.gelu(F.linear(h, *p[f"{at}mlp.fc1"])), *p[f"{at}mlp.fc2"])
    p = Pairs(qformer)
    image = F.layer_norm(x, (V,), *p["ln_vision"], eps=1e-5)
    x = F.layer_norm(
        p["query_tokens"], (Q,), *p["Qformer.bert.embeddings.LayerNorm"], eps=1e-12
    )
    x = x.expand(len(image), -1, -1)
    for i in range(4):
        at = f"Qformer.bert.encoder.layer.{i}."
        for block in ("attention", "crossattention")[: 2 - i % 2]:
            names = [f"{at}{block}.self.{part}" for part in ("query", "key", "value")]
            h = attention(p, x, x if block == "attention" else image, names, 2)
            h = F.linear(h, *p[f"{at}{block}.output.dense"]) + x
            x = F.layer_norm(h, (Q,), *p[f"{at}{block}.output.LayerNorm"], eps=1e-12)
        h = (
            F.linear(
                F.gelu(F.linear(x, *p[f"{at}intermediate_query.dense"])),
                *p[f"{at}output_query.dense"],
            )
            + x
        )
        x = F.layer_norm(h, (Q,), *p[f"{at}output_query.LayerNorm"], eps=1e-12)
    return F.linear(x, *Pairs(projection)["llama_proj"])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> PublishedMiniGPT4:
    """Four files as they are published, with random numbers."""
    folder = tmp_path_factory.mktemp("published")
    parts = PublishedMiniGPT4(
        folder / "eva.pth",
        folder / "qformer.pth",
        folder / "projection.pth",
        folder / "vicuna",
    )
    torch.save(
        {
            k: t.half() if t.dim() > 1 else t
            for k, t in tensors(vision_shapes()).items()
        },
        parts.vision,
    )
    torch.save({"model": tensors(qformer_shapes())}, parts.qformer)
    state = tensors(linear("llama_proj", D, Q))
    torch.save(
        {
            "model": state,
            "optimizer": {"lr": 0.1},
            "config": {"run": ["x"]},
            "epoch": 3,
        },
        parts.projection,
    )
    tiny = load_backbone("tiny-minigpt4", device="cpu")
    tiny.model.language_model.save_pretrained(parts.llm)
    tiny.tokenizer.save_pretrained(parts.llm)
    return parts


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    return load_backbone(
        str(convert(published, tmp_path_factory.mktemp("out") / "minigpt4")),
        device="cpu",
    )


def test_the_image_tokens_are_those_of_the_published_architecture(published, converted):
    images = [load_picture(Picture(query.image)) for query in QUERIES if query.image]
    pixels = converted.image_processor(images=images, return_tensors="pt")[
        "pixel_values"
    ]
    assert pixels.shape == (3, 3, SIDE, SIDE)
    vision = {
        name: tensor.float()
        for name, tensor in torch.load(published.vision, weights_only=True).items()
    }
    qformer, projection = (
        torch.load(p, weights_only=True)["model"]
        for p in (published.qformer, published.projection)
    )
    expected = image_tokens(vision, qformer, projection, pixels)
    found = torch.stack(
        converted.image_features(
            [Picture(query.image) for query in QUERIES if query.image]
        )
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (expected - expected[:1]).abs().max() > 0.1, "the pictures must differ"


def test_the_language_model_is_the_one_that_was_given(published, converted):
    from transformers import LlamaForCausalLM

    llm = LlamaForCausalLM.from_pretrained(published.llm, local_files_only=True)
    batch = converted.batch([Query("What is the capital of Peru?", "Lima")])
    expected = llm(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    ).logits
    torch.testing.assert_close(converted.logits(batch), expected)
    assert converted.family == "minigpt4"
    assert converted.generate(QUERIES, max_new_tokens=4)


def test_tensors_keep_their_number_format(published, tmp_path):
    from safetensors.torch import load_file

    saved = load_file(convert(published, tmp_path / "new") / "model.safetensors")
    assert saved["vision_model.encoder.layers.0.mlp.fc1.weight"].dtype == torch.float16
    assert saved["query_tokens"].dtype == torch.float32
    assert (
        json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "float32"
    )


def test_the_command(published, tmp_path, cli):
    words = (
        "--vision",
        published.vision,
        "--qformer",
        published.qformer,
        "--projection",
        published.projection,
    )
    code, out, err = cli(
        "convert",
        "minigpt4",
        tmp_path / "new",
        *words,
        "--llm",
        published.llm,
        "--json",
    )
    assert (code, json.loads(out)) == (
        0,
        {"model": str(tmp_path / "new"), "family": "minigpt4"},
    )
    assert f"writing {tmp_path / 'new'}" in err
    code, _, err = cli(
        "convert", "minigpt4", tmp_path / "new", *words, "--llm", published.llm
    )
    assert (code, err.splitlines()[0]) == (
        2,
        f"error: {tmp_path / 'new'}: exists already",
    )


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def spoiled(path, change):
    """A copy of a published file with its tensors changed in place."""
    content = torch.load(path, weights_only=True)
    change(content.get("model", content))
    return content


@pytest.mark.parametrize(
    ("part", "make", "message"),
    [
        (
            "vision",
            lambda f, b: Path(f).write_bytes(b[: len(b) // 2]),
            "not a file of tensors",
        ),
        ("vision", lambda f, b: Path(f).write_bytes(b""), "not a file of tensors"),
        ("vision", lambda f, b: Path(f).unlink(), "no such file"),
        (
            "projection",
            lambda f, b: torch.save({"model": Evil(f.with_name("evil"))}, f),
            "not a file of tensors",
        ),
        (
            "projection",
            lambda f, b: torch.save({"model": torch.ones(2)}, f),
            "no tensor llama_proj.weight",
        ),
        (
            "projection",
            lambda f, b: torch.save([1, 2], f),
            "no tensor llama_proj.weight",
        ),
        (
            "qformer",
            lambda f, b: torch.save(spoiled(f, lambda t: t.pop("query_tokens")), f),
            "no tensor query_tokens",
        ),
        (
            "qformer",
            lambda f, b: torch.save(spoiled(f, lambda t: t.pop("ln_vision.bias")), f),
            r"no tensor for vision_model\.post_layernorm\.bias",
        ),
        (
            "vision",
            lambda f, b: torch.save(
                spoiled(f, lambda t: t.pop("blocks.3.attn.q_bias")), f
            ),
            "3.attn.q_bias",
        ),
        (
            "projection",
            lambda f, b: torch.save(
                spoiled(f, lambda t: t.update({"llama_proj.bias": torch.ones(5)})), f
            ),
            r"language_projection\.bias: shape \(5,\) where \(48,\) is needed",
        ),
        (
            "llm",
            lambda f, b: (f / "config.json").write_text('{"model_type": "opt"}'),
            "MiniGPT-4 needs a llama",
        ),
        ("llm", lambda f, b: (f / "config.json").write_text("{"), "not valid JSON"),
        ("llm", lambda f, b: (f / "config.json").unlink(), "no config.json"),
        ("llm", lambda f, b: (f / "model.safetensors").unlink(), "cannot be loaded"),
    ],
)
def test_what_cannot_be_converted_is_named_and_leaves_nothing(
    published, tmp_path, part, make, message
):
    source = getattr(published, part)
    copy = tmp_path / "in" / source.name
    (shutil.copytree if source.is_dir() else shutil.copy)(
        source, copy.parent.mkdir() or copy
    )
    make(copy, b"" if source.is_dir() else copy.read_bytes())
    with pytest.raises(ModelError, match=message):
        convert(replace(published, **{part: copy}), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert not (tmp_path / "in" / "evil").exists()
