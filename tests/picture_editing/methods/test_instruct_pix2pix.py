"""InstructPix2Pix: guidance in coefficient form, against the published formula and the pipeline of diffusers."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.picture_editing.methods.base import EditJob, EditSettings, working_size
from mmedit_cli.picture_editing.methods.instruct_pix2pix import InstructPix2Pix
from mmedit_cli.picture_editing.methods.shared import tiny
from mmedit_cli.picture_editing.methods.shared.latent import (
    encode_pictures,
    to_pictures,
    to_pixels,
)
from mmedit_cli.picture_editing.methods.shared.sampling import (
    DenoiserInputs,
    coefficients,
    combine,
    denoise,
)
from mmedit_cli.runtime import LoadOptions


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    values = torch.rand(
        1, 3, height, width, generator=torch.Generator().manual_seed(seed)
    )
    return to_pictures(values * 2 - 1)[0]


@pytest.fixture(scope="module")
def editor() -> InstructPix2Pix:
    return InstructPix2Pix.load("tiny-ip2p", LoadOptions(device="cpu"))


class Rows:
    """Counts the rows that go through a denoiser."""

    def __init__(self, unet):
        self.counts: list[int] = []
        self._handle = unet.register_forward_pre_hook(
            lambda _m, inputs: self.counts.append(len(inputs[0]))
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._handle.remove()


def test_published_guidance(golden):
    tensors = load_file(golden / "ip2p_guidance.safetensors")
    limits = json.loads((golden / "ip2p_guidance.json").read_text())["tolerance"]
    predictions = tensors["noise_pred"].unflatten(0, (3, 2))
    cases = [name.partition(".")[0] for name in tensors if name.endswith(".out")]
    assert len(cases) == 4
    for case in cases:
        text, image = tensors[f"{case}.scales"].tolist()
        torch.testing.assert_close(
            combine(predictions, coefficients(text, image, 2)),
            tensors[f"{case}.out"],
            **limits,
        )


def test_coefficients_sum_to_one_and_take_a_scale_a_picture():
    weights = coefficients(
        torch.tensor([7.5, 1.0, 0.5]), torch.tensor([1.5, 1.0, 0.9]), 3
    )
    torch.testing.assert_close(weights.sum(0), torch.ones(3, dtype=torch.float64))
    assert weights.count_nonzero(0).tolist() == [3, 1, 3]


@pytest.mark.parametrize(
    ("text", "image", "rows"),
    [
        (7.5, 1.5, 3),
        (7.5, 1.0, 2),
        (2.0, 2.0, 2),
        (0.0, 3.0, 2),
        (1.0, 1.0, 1),
        (0.0, 1.0, 1),
        (0.0, 0.0, 1),
    ],
)
def test_branches_without_weight_are_not_run(editor, text, image, rows):
    with Rows(editor.unet) as passed:
        result = editor.edit(
            [EditJob(picture(), "paint it blue")], EditSettings(2, text, image)
        )[0]
    assert passed.counts == [rows, rows]
    assert result.rows == 2 * rows


def published(editor, told, seed: int, text: float, image: float, steps: int) -> Tensor:
    """The three branches in a row each, added up as the paper writes it."""
    scheduler, generator = tiny.scheduler(), torch.Generator().manual_seed(seed)
    source, condition, null = told
    latents = torch.randn(source.shape, generator=generator)
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, step)

        def eps(
            v: Tensor, c: Tensor, scaled: Tensor = scaled, step: Tensor = step
        ) -> Tensor:
            return editor.unet(
                torch.cat([scaled, v], 1), step, encoder_hidden_states=c
            ).sample

        nothing, pictured, full = (
            eps(0 * source, null),
            eps(source, null),
            eps(source, condition),
        )
        guided = nothing + image * (pictured - nothing) + text * (full - pictured)
        latents = scheduler.step(guided, step, latents, generator=generator).prev_sample
    return latents


@pytest.mark.parametrize(
    "scales", [(7.5, 1.5), (7.5, 0.9), (0.8, 0.4), (1.0, 3.0), (3.0, 3.0), (1.0, 1.0)]
)
@torch.no_grad()
def test_every_pair_of_scales_is_the_published_sum(editor, scales):
    job = EditJob(picture(), "paint it blue", seed=5)
    told = (
        encode_pictures(editor.vae, [job.picture]),
        editor.encode([job.instruction]),
        editor.encode([""]),
    )
    expected = published(editor, told, 5, *scales, 3)
    got = denoise(
        editor.unet,
        editor.scheduler,
        DenoiserInputs(*told),
        coefficients(*scales, 1),
        3,
        [5],
    )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_pipeline_of_diffusers_agrees_where_it_honours_the_scales():
    pipeline = tiny.build("tiny-ip2p")
    pipeline.set_progress_bar_config(disable=True)
    editor = InstructPix2Pix(pipeline, "tiny-ip2p", "")
    stock = pipeline(
        "paint it blue",
        picture(),
        num_inference_steps=4,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    job = EditJob(picture(), "paint it blue", 3)
    ours = editor.edit([job], EditSettings(4, 7.5, 1.5))[0].picture
    expected = to_pixels([ours])[0].permute(1, 2, 0) / 2 + 0.5
    assert (
        torch.from_numpy(stock) - expected
    ).abs().max() <= 0.51 / 255  # ours went through bytes


def test_scales_below_one_count(editor):
    results = {
        scales: to_pixels(
            [
                editor.edit(
                    [EditJob(picture(), "paint it blue")], EditSettings(2, *scales)
                )[0].picture
            ]
        )
        for scales in [(1.0, 1.0), (1.0, 1.5), (1.0, 3.0), (7.5, 0.9), (0.5, 1.0)]
    }
    values = list(results.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_the_source_is_the_mode_and_is_not_scaled(editor):
    moments = editor.vae.encode(to_pixels([picture()])).latent_dist
    assert torch.equal(encode_pictures(editor.vae, [picture()]), moments.mean)


@pytest.mark.parametrize("size", [(333, 257), (32, 32), (1, 1), (500, 3), (7, 900)])
def test_a_picture_keeps_its_size(editor, size):
    result = editor.edit([EditJob(picture(*size), "paint it blue")], EditSettings(1))[0]
    assert result.picture.size == size
    free = editor.edit(
        [EditJob(picture(*size), "paint it blue")], EditSettings(1, restore=False)
    )[0]
    assert max(free.picture.size) == 32
    assert all(side % 2 == 0 and side >= 4 for side in free.picture.size)


def test_working_sizes():
    assert working_size((1024, 768), 512, 8) == (512, 384)
    assert working_size((64, 64), 512, 8) == (512, 512)
    assert working_size((10_000, 1), 512, 8) == (512, 64)
    assert working_size((333, 257), 512, 8) == (512, 392)


def test_company_does_not_matter_and_a_seed_repeats(editor):
    jobs = [
        EditJob(picture(seed=i), text, seed)
        for i, (text, seed) in enumerate([("a", 1), ("b c", 2), ("d", 1)])
    ]
    alone = [
        to_pixels([editor.edit([job], EditSettings(2))[0].picture]) for job in jobs
    ]
    together = editor.edit(
        [*jobs, EditJob(picture(64, 16), "e")], EditSettings(2), batch_size=4
    )
    for one, other in zip(alone, together[:3], strict=True):
        assert (one - to_pixels([other.picture])).abs().max() <= 1.01 / 127.5
    assert torch.equal(
        alone[0], to_pixels([editor.edit([jobs[0]], EditSettings(2))[0].picture])
    )
    reseeded = editor.edit(
        [EditJob(jobs[0].picture, jobs[0].instruction, 9)], EditSettings(2)
    )[0]
    assert not torch.equal(alone[0], to_pixels([reseeded.picture]))


def test_no_instruction_gives_the_picture_back(editor):
    result = editor.edit([EditJob(picture(), "  ")])[0]
    assert result.picture == picture()
    assert result.warnings


def test_what_cannot_be_done_is_said(editor):
    with pytest.raises(DataError, match="80 tokens; tiny-ip2p reads 77"):
        editor.edit([EditJob(picture(), "x" * 78)], EditSettings(1))
    with pytest.raises(DataError, match="derives no expressive instruction"):
        editor.edit([EditJob(picture(), "x", expressive="y")], EditSettings(1))
    with pytest.raises(DataError, match="steps 0") as caught:
        editor.edit([EditJob(picture(), "x")], EditSettings(0, resolution=9999))
    assert len(caught.value.problems) == 2
    pipeline = tiny.build("tiny-ip2p")
    pipeline.register_modules(unet=tiny.unet(4))
    with pytest.raises(ModelError, match="denoiser of 4 channels"):
        InstructPix2Pix(pipeline, "drawn", "")
    with pytest.raises(ModelError, match="did you mean tiny-ip2p"):
        InstructPix2Pix.load("tiny-ip2", LoadOptions(device="cpu"))


def test_a_folder_loads_and_another_class_is_refused(tmp_path, editor):
    tiny.build("tiny-ip2p").save_pretrained(tmp_path / "mine")
    loaded = InstructPix2Pix.load(str(tmp_path / "mine"), LoadOptions(device="cpu"))
    job = EditJob(picture(), "paint it blue")
    assert (
        loaded.edit([job], EditSettings(2))[0].picture
        == editor.edit([job], EditSettings(2))[0].picture
    )
    assert loaded.model == "mine"
    index = tmp_path / "mine" / "model_index.json"
    index.write_text(
        index.read_text().replace(
            "StableDiffusionInstructPix2PixPipeline", "FluxPipeline"
        )
    )
    with pytest.raises(ModelError, match="a FluxPipeline, where"):
        InstructPix2Pix.load(str(tmp_path / "mine"), LoadOptions(device="cpu"))
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        InstructPix2Pix.load(str(tmp_path), LoadOptions(device="cpu"))


@pytest.mark.slow
def test_bfloat16():
    editor = InstructPix2Pix.load(
        "tiny-ip2p", LoadOptions(device="cpu", dtype="bfloat16")
    )
    result = editor.edit([EditJob(picture(), "paint it blue")], EditSettings(2))[0]
    assert editor.unet.dtype == torch.bfloat16
    assert result.picture.size == (32, 32)


def test_latents_that_are_no_numbers_stop_the_edit():
    from mmedit_cli.errors import MmeditError

    editor = InstructPix2Pix.load("tiny-ip2p", LoadOptions(device="cpu"))
    with torch.no_grad():
        editor.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(
        MmeditError, match=r"step 1 of 3 are not finite: unet\.conv_out"
    ):
        editor.edit([EditJob(picture(), "paint it blue")], EditSettings(3))


def test_with_little_memory_a_row_at_a_time_goes_through_the_denoiser():
    usual, lean = (
        InstructPix2Pix.load("tiny-ip2p", LoadOptions(device="cpu")) for _ in range(2)
    )
    lean.save_memory()
    jobs = [EditJob(picture(seed=i), "paint it blue", i) for i in range(2)]
    with Rows(lean.unet) as passed:
        edited = lean.edit(jobs, EditSettings(2), batch_size=2)
    assert passed.counts == [1] * 12, "three branches of two pictures, two steps"
    for one, other in zip(edited, usual.edit(jobs, EditSettings(2)), strict=True):
        gap = (to_pixels([one.picture]) - to_pixels([other.picture])).abs().max()
        assert gap <= 2 / 127.5, "a level or two of 256"
