"""FLUX.1 Kontext behind the same verb, on a tiny random pipeline."""

from __future__ import annotations

import pytest
from conftest import SHAPES

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.picture_editing.methods.base import EditJob, EditSettings
from mmedit_cli.picture_editing.methods.flux_kontext import FluxKontext
from mmedit_cli.picture_editing.methods.instruct_pix2pix import InstructPix2Pix
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.runtime import LoadOptions

CPU = LoadOptions(device="cpu")
SMALL = EditSettings(2, resolution=32)


@pytest.fixture(scope="module")
def editor() -> FluxKontext:
    return FluxKontext.load("tiny-flux-kontext", CPU)


@pytest.fixture(scope="module")
def picture():
    return load_picture(Picture(SHAPES / "solid" / "red-circle.png")).resize((45, 31))


def test_the_seed_and_the_instruction_decide(editor, picture):
    ticks = []
    first = editor.edit(
        [EditJob(picture, "paint it blue", 1)], SMALL, tick=ticks.append
    )[0]
    assert first.picture.size == (45, 31)
    assert ticks == [1, 1]
    assert (
        editor.edit([EditJob(picture, "paint it blue", 1)], SMALL)[0].picture
        == first.picture
    )
    assert (
        editor.edit([EditJob(picture, "paint it blue", 2)], SMALL)[0].picture
        != first.picture
    )
    assert (
        editor.edit([EditJob(picture, "make it a house", 1)], SMALL)[0].picture
        != first.picture
    )


def test_it_has_no_guidance_by_the_picture(editor, picture):
    with pytest.raises(DataError, match="no guidance by the picture"):
        editor.edit(
            [EditJob(picture, "paint it blue")], EditSettings(2, image_guidance=1.5)
        )


def test_the_editor_and_the_model_must_fit():
    with pytest.raises(
        ModelError,
        match="a FluxKontextPipeline, where StableDiffusionInstructPix2PixPipeline",
    ):
        InstructPix2Pix.load("tiny-flux-kontext", CPU)


def test_the_command(cli, tmp_path):
    code, out, err = cli(
        "image-edit",
        "flux-kontext",
        "--model",
        "tiny-flux-kontext",
        "-i",
        SHAPES / "solid" / "red-circle.png",
        "paint it blue",
        "-o",
        tmp_path / "o.png",
        "--steps",
        1,
        "--resolution",
        32,
        "--device",
        "cpu",
    )
    assert (code, out.strip()) == (0, str(tmp_path / "o.png")), err
