"""Scores of edited pictures: by hand, and what they must be at their ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmedit_cli.drawing.evaluation import picture_scores
from mmedit_cli.picture_editing.methods.shared import tiny


def noise(seed: int, height: int = 16, width: int = 20) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def test_a_picture_is_itself():
    x = noise(0)
    assert picture_scores.l1(x, x) == picture_scores.l2(x, x) == 0
    assert picture_scores.ssim(x, x) == pytest.approx(1, abs=1e-9)
    assert picture_scores.similarity(x.flatten(), 2 * x.flatten()) == pytest.approx(
        100, abs=1e-4
    )
    assert picture_scores.preserved(x, x, x) == 0


def test_by_hand():
    black, half = torch.zeros(3, 12, 12), torch.full((3, 12, 12), 0.5)
    assert picture_scores.l1(black, half) == 0.5
    assert picture_scores.l2(black, half) == 0.25
    assert picture_scores.ssim(black, half) == pytest.approx(
        1e-4 / (0.25 + 1e-4), rel=1e-6
    )


def test_ssim_of_one_window_by_hand():
    o, g = noise(1, 11, 11), noise(2, 11, 11)
    at = np.arange(11) - 5
    row = np.exp(-(at**2) / 4.5)
    weights = np.outer(row, row) / row.sum() ** 2
    scores = []
    for x, y in zip(o.double().numpy(), g.double().numpy(), strict=True):
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        both = (weights * (x - mx) * (y - my)).sum()
        scores.append(
            (2 * mx * my + 1e-4)
            * (2 * both + 9e-4)
            / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
        )
    assert picture_scores.ssim(o, g) == pytest.approx(np.mean(scores), rel=1e-6)
    with pytest.raises(ValueError, match="11 pixels"):
        picture_scores.ssim(noise(1, 5, 20), noise(2, 5, 20))


def test_what_should_stay_is_where_source_and_goal_agree():
    v, g = noise(3), noise(3)
    g[:, :, 10:] = 1 - g[:, :, 10:]
    o = v.clone()
    o[:, :, 10:] = 0.3
    assert picture_scores.preserved(o, v, g) == 0
    o[:, :, :10] = v[:, :, :10] + 0.1
    assert picture_scores.preserved(o, v, g) == pytest.approx(0.1, abs=1e-6)
    assert picture_scores.preserved(o, v, (v + 0.5) % 1) is None


def test_the_direction_of_a_change():
    v, o = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    assert picture_scores.direction(v, o, v, o) == pytest.approx(1)
    assert picture_scores.direction(v, o, o, v) == pytest.approx(-1)
    assert picture_scores.direction(v, 5 * o, 3 * v, o) == pytest.approx(
        1
    )  # lengths do not count
    assert picture_scores.direction(v, v, v, o) is None


def test_an_output_of_another_size_is_resized_first():
    goal = Image.new("RGB", (20, 10), (255, 0, 0))
    assert picture_scores.pixels(
        Image.new("RGB", (40, 40), (255, 0, 0)), goal
    ).shape == (3, 10, 20)
    assert (
        picture_scores.l1(
            picture_scores.pixels(Image.new("RGB", (40, 40), (255, 0, 0)), goal),
            picture_scores.pixels(goal),
        )
        == 0
    )


def test_clip():
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=tiny.text_encoder().config.to_dict(),
        projection_dim=16,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    encoder = picture_scores.ClipEncoder(
        CLIPModel(config), CLIPProcessor(processor, tiny.clip_tokenizer()), "tiny-clip"
    )
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    found = encoder.pictures(pictures)
    assert found.shape == (2, 16)
    torch.testing.assert_close(
        found[1], encoder.pictures(pictures[1:])[0], atol=1e-5, rtol=1e-5
    )
    texts = encoder.texts(["a red picture", "x" * 200])
    assert texts.shape == (2, 16)
    torch.testing.assert_close(
        texts[0], encoder.texts(["a red picture"])[0], atol=1e-5, rtol=1e-5
    )


def test_dino():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    encoder = picture_scores.DinoEncoder(
        ViTModel(config, add_pooling_layer=False), "tiny-dino", resize=32, crop=24
    )
    picture = Image.new("RGB", (64, 40), "green")
    picture.paste("red", (0, 0, 8, 40))  # outside the crop
    assert encoder.pictures([picture]).shape == (1, 16)
    same = encoder.pictures([Image.new("RGB", (64, 40), "green")])
    assert picture_scores.similarity(
        encoder.pictures([picture])[0], same[0]
    ) == pytest.approx(100, abs=1e-3)
    prepared = encoder._prepare(Image.new("RGB", (30, 30), "white"))
    assert prepared[0, 0, 0] == pytest.approx((1 - 0.485) / 0.229, rel=1e-4)
