"""The published weights of MGIE: random ones in their layout, tiny, become a pipeline that edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.models.shared import tiny as tiny_backbones
from mmedit_cli.picture_editing.methods.base import EditJob, EditSettings
from mmedit_cli.picture_editing.methods.mgie import Mgie
from mmedit_cli.picture_editing.methods.mgie.modules import MGIEEditHead
from mmedit_cli.picture_editing.methods.mgie.published import (
    PublishedMgie,
    convert,
    read_mllm,
    read_tensors,
)
from mmedit_cli.picture_editing.methods.shared import tiny
from mmedit_cli.runtime import LoadOptions

WIDTH = 48


@pytest.fixture
def published(tmp_path: Path) -> PublishedMgie:
    """Folders and files as they are published; the language model knows 8 tokens more than its tokenizer's 451."""
    llava, tokenizer, processor = tiny_backbones.build("tiny-llava")
    tokenizer.add_tokens(["<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    rows = len(tokenizer) + 8
    folder, vision = tmp_path / "llava", tmp_path / "vision"
    tokenizer.save_pretrained(folder)
    told = llava.config.text_config.to_dict() | {
        "mm_vision_select_layer": -2,
        "vocab_size": rows - 8,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(told | {"model_type": "llava"}))
    llava.model.vision_tower.save_pretrained(vision)
    processor.save_pretrained(vision)
    tensors = {
        f"model.{name.removeprefix('model.language_model.')}": value
        for name, value in llava.state_dict().items()
        if name.startswith("model.language_model.")
    }
    seeded = torch.Generator().manual_seed(0)
    tensors["model.mm_projector.weight"] = torch.randn(WIDTH, 32, generator=seeded)
    tensors["model.mm_projector.bias"] = torch.randn(WIDTH, generator=seeded)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    torch.save(tensors, folder / "pytorch_model-00001-of-00001.bin")
    head = MGIEEditHead(WIDTH, 32, 77, tiny.WIDTH, 2, 4, 64)
    mllm = {
        f"edit_head.{n}": v
        for n, v in head.state_dict().items()
        if not n.startswith("tokens.")
    }
    mllm["model.embed_tokens.weight"] = torch.randn(rows, WIDTH, generator=seeded)
    mllm["lm_head.weight"] = torch.randn(rows, WIDTH, generator=seeded)
    mllm["emb"] = torch.randn(1, 8, WIDTH, generator=seeded)
    torch.save(mllm, tmp_path / "mllm.pt")
    torch.save(tiny.unet().state_dict(), tmp_path / "unet.pt")
    return PublishedMgie(
        folder, vision, tmp_path / "mllm.pt", tmp_path / "unet.pt", "tiny-ip2p"
    )


def test_every_tensor_finds_its_place(published, tmp_path):
    convert(published, tmp_path / "mgie")
    editor = Mgie.load(str(tmp_path / "mgie"), LoadOptions(device="cpu"))
    mllm, unet = read_tensors(published.mllm), read_tensors(published.unet)
    guide, model = editor.guide, editor.pipeline.mllm
    assert torch.equal(
        model.get_input_embeddings().weight, mllm["model.embed_tokens.weight"][:-8]
    )
    assert torch.equal(
        model.get_output_embeddings().weight, mllm["lm_head.weight"][:-8]
    )
    assert torch.equal(guide.tokens.embed, mllm["emb"][0])
    assert torch.equal(guide.tokens.unembed, mllm["lm_head.weight"][-8:])
    own = editor.edit_head.state_dict()
    assert all(
        torch.equal(own[n.removeprefix("edit_head.")], v)
        for n, v in mllm.items()
        if n.startswith("edit_head.")
    )
    assert all(
        torch.equal(editor.unet.state_dict()[name], value)
        for name, value in unet.items()
    )
    llava = read_tensors(published.llava)
    name = "layers.3.mlp.down_proj.weight"
    assert torch.equal(model.get_decoder().state_dict()[name], llava[f"model.{name}"])
    seen = torch.randn(5, 32)
    expected = torch.nn.functional.linear(
        seen, llava["model.mm_projector.weight"], llava["model.mm_projector.bias"]
    )
    torch.testing.assert_close(
        model.model.multi_modal_projector(seen), expected, atol=1e-5, rtol=1e-5
    )


def test_it_edits(published, tmp_path, cli):
    code, out, err = cli(
        "convert",
        "mgie",
        tmp_path / "mgie",
        "--llava",
        published.llava,
        "--vision",
        published.vision,
        "--mllm",
        published.mllm,
        "--unet",
        published.unet,
        "--diffusion",
        "tiny-ip2p",
    )
    assert code == 0, err
    assert out.strip() == str(tmp_path / "mgie")
    editor = Mgie.load(str(tmp_path / "mgie"), LoadOptions(device="cpu"))
    assert "<im_start><image><im_end>" in editor.guide.prompt
    ids, _ = editor.guide.token_ids("paint it", None, 16)
    patch, start, end = editor.guide.tokenizer.convert_tokens_to_ids(
        ["<im_patch>", "<im_start>", "<im_end>"]
    )
    at = ids.index(patch)
    assert ids[at - 1 : at + 17] == [start, *[patch] * 16, end]
    assert (
        editor.edit(
            [EditJob(Image.new("RGB", (32, 32)), "paint it", expressive="a")],
            EditSettings(1),
        )[0].source
        == "user"
    )


def test_the_embeddings_of_the_visual_tokens_may_be_left_out(published):
    tensors = read_tensors(published.mllm)
    del tensors["emb"]
    found = read_mllm(tensors, "mllm.pt")
    assert torch.equal(found.visual_embed, tensors["model.embed_tokens.weight"][-8:])


@pytest.mark.parametrize("part", ["mllm", "unet"])
def test_what_is_missing_or_unknown_is_named(published, tmp_path, part):
    path = getattr(published, part)
    tensors = read_tensors(path)
    gone = "conv_out.bias" if part == "unet" else "edit_head.hid2feat.bias"
    del tensors[gone]
    tensors["surprise"] = torch.zeros(1)
    torch.save(tensors, path)
    with pytest.raises(ModelError) as caught:
        convert(published, tmp_path / "mgie")
    assert "surprise" in str(caught.value)
    assert not (tmp_path / "mgie").exists()
    assert not list(tmp_path.glob(".mgie*"))


def test_nothing_is_executed(published, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    published.unet.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ModelError, match="not a file of tensors"):
        convert(published, tmp_path / "mgie")
    assert not (tmp_path / "boom").exists()
