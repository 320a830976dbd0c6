"""Checkpoints of one file become folders of diffusers."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from mmedit_cli.drawing.models import tiny
from mmedit_cli.drawing.models.foreign_lora import ldm_key
from mmedit_cli.drawing.models.loading import load_stable_diffusion

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.0\.resnets", "up.1.block"),
    (r"up_blocks\.1\.resnets", "up.0.block"),
    (r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])\.", r"\1."),
)


def unet_name(path, per_block, with_attention):
    """The name of a weight of a UNet with `per_block` layers a block in a checkpoint of one file."""
    module, _, kind = path.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    if ".attentions." in path:
        return ldm_key(path, per_block).removeprefix("model.diffusion_model.")
    found = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d))?\.(\w+)\.(\d)\.(\w+)", module)
    where, block, sort, number, layer = found.groups()
    place = (per_block + 1) * int(block or 0) + int(number)
    if sort == "downsamplers":
        return f"input_blocks.{(per_block + 1) * (int(block) + 1)}.0.op.{kind}"
    if sort == "upsamplers":
        last = (per_block + 1) * int(block) + per_block
        return f"output_blocks.{last}.{1 + with_attention[int(block)]}.conv.{kind}"
    start = {
        "down": f"input_blocks.{place + 1}.0",
        "up": f"output_blocks.{place}.0",
        "mid": f"middle_block.{2 * int(number)}",
    }[where]
    return f"{start}.{RESNET[layer]}.{kind}"


def one_file(pipe, path):
    """Write a pipeline of Stable Diffusion 1.x as a checkpoint of one file."""
    config = pipe.unet.config
    with_attention = ["CrossAttn" in kind for kind in config.up_block_types]
    tensors = {}
    for name, value in pipe.unet.state_dict().items():
        named = unet_name(name, config.layers_per_block, with_attention)
        tensors[f"model.diffusion_model.{named}"] = value
    for name, value in pipe.vae.state_dict().items():
        attention = "attentions" in name and "norm" not in name
        for old, new in VAE:
            name = re.sub(old, new, name)
        if attention and value.dim() == 2:
            value = value[:, :, None, None]
        tensors[f"first_stage_model.{name}"] = value
    start = "cond_stage_model.transformer.text_model."
    for name, value in pipe.text_encoder.state_dict().items():
        tensors[start + name.removeprefix("text_model.")] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    """A folder of a model of the same kind, with other weights."""
    folder = tmp_path_factory.mktemp("like") / "like"
    tiny.build("tiny-sd").save_pretrained(folder)
    return folder


def test_every_weight_is_that_of_the_file(cli, like, tmp_path):
    pipe = tiny.build("tiny-sd")
    source = torch.Generator().manual_seed(1)
    wanted = {}
    for part in ("unet", "vae", "text_encoder"):
        for name, parameter in getattr(pipe, part).named_parameters():
            parameter.data = torch.randn(parameter.shape, generator=source)
            wanted[f"{part}.{name}"] = parameter.data
    one_file(pipe, tmp_path / "dreamy.safetensors")
    to = tmp_path / "dreamy"
    words = ("convert", "checkpoint", tmp_path / "dreamy.safetensors", to)
    code, out, err = cli(*words, "--like", like)
    assert (code, out.strip()) == (0, str(to)), err
    found = dict(load_stable_diffusion(str(to), device="cpu").model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    code, _, err = cli(*words, "--like", like)
    assert (code, "there already" in err) == (2, True)


@pytest.mark.parametrize(
    ("tensors", "words", "said"),
    [
        ({"a.lora_down.weight": 1}, (), "not a checkpoint of Stable Diffusion"),
        ({"model.diffusion_model.x": 1}, ("--like", "mini-blip2"), "draws nothing"),
        ({"model.diffusion_model.x": 1}, ("--like", "tiny-sd"), "it has no folder"),
        ({"model.diffusion_model.x": 1}, ("--like", "LIKE"), "cannot be loaded"),
        (
            {"model.diffusion_model.x": 1, "conditioner.embedders.1.x": 1},
            ("--like", "LIKE"),
            "a checkpoint for StableDiffusionXLPipeline",
        ),
    ],
)
def test_what_cannot_be_converted(cli, like, tmp_path, tensors, words, said):
    file = tmp_path / "model.safetensors"
    save_file({key: torch.ones(size) for key, size in tensors.items()}, file)
    words = [like if word == "LIKE" else word for word in words]
    to = tmp_path / "out"
    code, _, err = cli("convert", "checkpoint", file, to, *words)
    assert (code, said in err) == (2, True), err
    assert not to.exists()


def test_pickles_are_not_opened(cli, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"0")
    code, _, err = cli("convert", "checkpoint", tmp_path / "model.ckpt", tmp_path / "m")
    assert (code, "they may run code" in err) == (2, True)
