"""Qwen-VL: pictures of any size side by side, rotary positions in three axes, features added behind early layers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.patch import Patch
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

SIZES = ((40, 40), (96, 32), (20, 60), (200, 100))


@pytest.fixture(params=("tiny-qwen2-vl", "tiny-qwen2.5-vl", "tiny-qwen3-vl"))
def qwen(request):
    return load_backbone(request.param, device="cpu")


@pytest.fixture
def queries(tmp_path):
    """Pictures of different sizes, and a question without one between them."""
    paths = [
        noise(tmp_path / f"{width}x{height}.png", width, height)
        for width, height in SIZES
    ]
    asked = [
        Query(f"What is this{' here' * i}?", "a red star", path)
        for i, path in enumerate(paths)
    ]
    return [*asked[:2], Query("What is the capital of Peru?", "Lima"), *asked[2:]]


def noise(path, width, height, **options):
    generator = torch.Generator().manual_seed(width)
    pixels = torch.randint(
        0, 256, (height, width, 3), generator=generator, dtype=torch.uint8
    )
    Image.fromarray(pixels.numpy()).save(path, **options)
    return path


def published(qwen, batch):
    """The arguments of transformers' own forward and generate."""
    images = [load_picture(picture) for picture in batch.pictures]
    return {
        "input_ids": torch.where(
            batch.image_mask, qwen.model.config.image_token_id, batch.input_ids
        ),
        "attention_mask": batch.attention_mask,
        "mm_token_type_ids": batch.image_mask.int(),
        **qwen.image_processor(images=images, return_tensors="pt"),
    }


def test_each_picture_takes_the_tokens_it_needs(qwen, queries):
    batch = qwen.batch(queries)
    assert batch.image_mask.sum(1).tolist() == [4, 12, 0, 4, 10]
    assert [len(tokens) for tokens in qwen.image_features(batch.pictures)] == [
        4,
        12,
        4,
        10,
    ]
    assert torch.equal(qwen.logits(batch), qwen.model(**published(qwen, batch)).logits)


def test_every_layer_resumes_bit_for_bit(qwen, queries):
    batch = qwen.batch(queries)
    expected = qwen.logits(batch)
    for layer in range(qwen.n_layers + 1):
        with qwen.cached_activations(
            layer, queries, group=len(queries), budget=1 << 20
        ):
            kept = qwen.resume(qwen.prefix(batch, layer), batch.predicting)
        torch.testing.assert_close(kept, expected[batch.predicting], atol=1e-5, rtol=0)
        prefix = qwen.prefix(batch, layer)
        assert torch.equal(qwen.resume(prefix), expected), layer
        assert torch.equal(
            qwen.resume(qwen.prefix_of(prefix.hidden, batch, layer)), expected
        ), layer


def test_generation_is_that_of_the_published_code(qwen, queries):
    batch = qwen.batch(queries, with_answer=False, left_pad=True)
    tokens = qwen.model.generate(
        **published(qwen, batch), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    said = qwen.generate(queries, max_new_tokens=8)
    assert said == [
        qwen.decode(row) for row in tokens[:, batch.input_ids.shape[1] :].tolist()
    ]
    assert said == [qwen.generate([query], max_new_tokens=8)[0] for query in queries], (
        "batched equals single"
    )


@pytest.mark.parametrize(
    "size",
    [(1, 1), (7, 50), (16, 16), (33, 48), (64, 64), (65, 64), (500, 31), (31, 500)],
)
def test_the_count_is_that_of_the_image_processor(qwen, size, tmp_path):
    picture = Picture(noise(tmp_path / "picture.png", *size))
    grid = qwen.image_processor(images=load_picture(picture), return_tensors="pt")[
        "image_grid_thw"
    ]
    assert qwen.n_image_tokens(picture) == grid.prod() // 4


def test_a_picture_that_lies_on_its_side_is_measured_upright(qwen, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Picture(noise(tmp_path / "lying.jpg", 96, 32, exif=exif))
    batch = qwen.batch([Query("What is this?", "x", picture.path)])
    assert load_picture(picture).size == (32, 96)
    assert torch.equal(qwen.logits(batch), qwen.model(**published(qwen, batch)).logits)


def test_a_picture_out_of_all_proportion_is_named(qwen, tmp_path):
    path = noise(tmp_path / "thin.png", 402, 2)
    with pytest.raises(
        DataError, match=r"thin\.png: not a readable image \(402 x 2 pixels"
    ):
        qwen.batch([Query("What is this?", "x", path)])


def test_a_picture_that_changes_in_between_is_named(qwen, queries):
    batch = qwen.batch(queries[:1])
    noise(queries[0].image, 96, 32)
    with pytest.raises(
        ModelError, match=r"40x40\.png: 12 image tokens where 4 were expected"
    ):
        qwen.embed(batch)


@pytest.mark.parametrize(
    "qwen", ["tiny-qwen2-vl", "tiny-qwen2.5-vl"], indirect=True
)  # Qwen3-VL has none
def test_sliding_windows_are_refused(qwen):
    qwen.model.config.get_text_config().layer_types[-1] = "sliding_attention"
    with pytest.raises(ModelError, match="sliding-window attention is not supported"):
        type(qwen)("x", qwen.model, qwen.tokenizer, qwen.image_processor, "")


def test_deepstack_is_added_where_it_belongs_and_encoded_once(queries, monkeypatch):
    qwen = load_backbone("tiny-qwen3-vl", device="cpu")
    batch = qwen.batch(queries)
    with_it = [qwen.prefix(batch, layer).hidden for layer in range(3)]
    encoded = []
    real = qwen.image_features
    monkeypatch.setattr(
        qwen,
        "image_features",
        lambda pictures: encoded.extend(pictures) or real(pictures),
    )
    assert qwen.prefix(batch, 1).deepstack is not None
    assert qwen.prefix_of(with_it[2], batch, 2).deepstack is None
    assert len(encoded) == len(batch.pictures)
    monkeypatch.setattr(
        qwen,
        "image_features",
        lambda pictures: [tokens[:, : qwen.width] for tokens in real(pictures)],
    )
    without = [qwen.prefix(batch, layer).hidden for layer in range(3)]
    assert torch.equal(without[0], with_it[0])
    changed = (without[1] != with_it[1]).any(-1)
    assert torch.equal(changed, batch.image_mask), (
        "the first addition reaches the image positions and no other"
    )
    assert not torch.equal(without[2], with_it[2])
    assert all(not layer._forward_hooks for layer in qwen.layers)


def test_deepstack_is_added_behind_the_hook_of_an_editor(queries):
    qwen = load_backbone("tiny-qwen3-vl", device="cpu")
    batch = qwen.batch(queries)
    base = qwen.logits(batch)
    with Patch(qwen.model) as patch:
        patch.hook(qwen.anchors.path("layer", 0), lambda hidden: hidden * 2)
        edited = qwen.logits(batch)
        assert torch.equal(edited, qwen.model(**published(qwen, batch)).logits)
        assert torch.equal(qwen.resume(qwen.prefix(batch, 0)), edited)
    assert not torch.equal(edited, base)
