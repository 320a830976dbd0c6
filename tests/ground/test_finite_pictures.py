"""Pictures of NaN are never written: whatever draws or edits names the first broken module."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmedit_cli import runtime
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.stable_diffusion import Sampling
from mmedit_cli.errors import NotFinite
from mmedit_cli.picture_editing.methods.base import EditJob, EditSettings
from mmedit_cli.picture_editing.methods.instruct_pix2pix import InstructPix2Pix
from mmedit_cli.runtime import LoadOptions


@pytest.fixture
def broken():
    """Make one number of a parameter NaN; all are as before afterwards."""
    kept = []

    def breaks(module: torch.nn.Module, name: str) -> None:
        parameter = module.get_parameter(name)
        kept.append((parameter, parameter.detach().clone()))
        with torch.no_grad():
            parameter.view(-1)[0] = torch.nan

    yield breaks
    with torch.no_grad():
        for parameter, value in kept:
            parameter.copy_(value)


@pytest.fixture(scope="module")
def drawing():
    return load_stable_diffusion("tiny-sd", device="cpu")


@pytest.fixture(scope="module")
def editor():
    return InstructPix2Pix.load("tiny-ip2p", LoadOptions(device="cpu"))


def first(module: torch.nn.Module, word: str) -> str:
    return next(
        name
        for name, value in module.named_parameters()
        if word in name and value.ndim > 1
    )


@pytest.mark.parametrize(
    ("part", "word", "what"),
    [
        ("unet", "mid_block", "the latents of step 1 of 2"),
        ("text_encoder", "mlp.fc1", "the encodings of the prompts"),
        ("vae", "decoder.conv_out", "the pictures"),
    ],
)
def test_drawing(drawing, broken, part, word, what):
    name = first(drawing.model, word)
    broken(drawing.model, name)
    with pytest.raises(
        NotFinite, match=f"tiny-sd: {what} are not finite: {name} holds NaN or infinity"
    ):
        drawing.generate(["a dog"], [0], Sampling(steps=2))


def test_learning(drawing, broken):
    pixels = torch.zeros(1, 3, drawing.resolution, drawing.resolution)
    latents, _ = drawing.latents(pixels)
    encoding = drawing.encode(drawing.tokenize(["a dog"]))
    name = first(drawing.model, "mid_block")
    broken(drawing.model, name)
    with pytest.raises(
        NotFinite, match=f"the predicted noise are not finite: {name} holds NaN"
    ):
        drawing.errors(latents, encoding, runtime.generator(0))
    name = first(drawing.model, "encoder.conv_in")
    broken(drawing.model, name)
    with pytest.raises(
        NotFinite, match=f"the latents of the pictures are not finite: {name} holds NaN"
    ):
        drawing.latents(pixels)


@pytest.mark.parametrize(
    ("part", "word", "what"),
    [
        ("unet", "mid_block", "the latents of step 1 of 2"),
        ("text_encoder", "mlp.fc1", "tiny-ip2p: what the instructions became"),
        ("vae", "encoder.conv_in", "the latents of the picture"),
        ("vae", "decoder.conv_out", "the edited pictures"),
    ],
)
def test_editing(editor, broken, part, word, what):
    module = getattr(editor, part)
    name = first(module, word)
    broken(module, name)
    with pytest.raises(
        NotFinite, match=f"{what} are not finite: {part}.{name} holds NaN or infinity"
    ):
        editor.edit(
            [EditJob(Image.new("RGB", (32, 32)), "make it red")], EditSettings(steps=2)
        )
