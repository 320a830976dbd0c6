"""LLaVA with other towers than CLIP: how many tokens a picture takes is asked of the tower."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPES
from PIL import Image

from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.models.llava import Llava
from mmedit_cli.knowledge.models.shared import tiny
from mmedit_cli.types import Query

PICTURE = SHAPES / "solid/red-circle.png"


def llava(vision, processor, words, image="<image>", **more):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=tiny._llama(words).to_dict(),
        image_token_index=words.convert_tokens_to_ids(image),
        vision_feature_layer=-1,
        **more,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    tiny.spread(model)
    return Llava("mine", model, words, processor, "0" * 32)


@pytest.mark.parametrize(("strategy", "patches"), [("full", 16), ("default", 15)])
def test_a_siglip_tower_has_no_class_token(strategy, patches):
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.image_processing_pil_siglip import (
        SiglipImageProcessorPil,
    )

    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    backbone = llava(
        vision, processor, tiny.tokenizer(), vision_feature_select_strategy=strategy
    )
    batch = backbone.batch([Query("What is this?", "a star", PICTURE)])
    assert int(batch.image_mask.sum()) == patches
    assert backbone.logits(batch).isfinite().all()
    assert backbone.generate([Query("What is this?", image=PICTURE)], max_new_tokens=2)


def pixtral(*more):
    from transformers import PixtralVisionConfig
    from transformers.models.pixtral.image_processing_pil_pixtral import (
        PixtralImageProcessorPil,
    )

    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        image_size=64,
        patch_size=8,
    )
    processor = PixtralImageProcessorPil(
        size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}
    )
    words = tiny.tokenizer("[IMG]", *more)
    return llava(
        vision, processor, words, "[IMG]", vision_feature_select_strategy="full"
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of other shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("wide", (60, 30)), ("tall", (24, 64))):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{name}.png")
    return [folder / "wide.png", folder / "tall.png"]


def test_a_pixtral_tower_has_as_many_tokens_as_the_picture_has_patches(pictures):
    backbone = pixtral()
    batch = backbone.batch(
        [Query("What is this?", "a star", path) for path in pictures]
    )
    assert batch.image_mask.sum(1).tolist() == [8 * 4, 3 * 8]
    whole = backbone.logits(batch)
    assert torch.equal(backbone.resume(backbone.prefix(batch, 3)), whole)
    alone = backbone.logits(backbone.batch([batch.queries[1]]))
    torch.testing.assert_close(whole[1, : alone.shape[1]], alone[0], atol=1e-4, rtol=0)


def test_the_rows_of_a_pixtral_tower_end_as_in_transformers(pictures):
    """The layout is that of PixtralProcessor, which needs torchvision: rows end with a break."""
    backbone = pixtral("[IMG_BREAK]", "[IMG_END]")
    image, row_end, last = backbone.tokenizer.convert_tokens_to_ids(
        ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    )
    for path, (rows, columns) in zip(pictures, ((4, 8), (8, 3)), strict=True):
        grid = ([image] * columns + [row_end]) * rows
        start, *text = backbone.tokenizer("\nWhat is this?")["input_ids"]
        ids = torch.tensor([[start, *grid[:-1], last, *text]])
        inputs = backbone.image_processor(
            images=[Image.open(path)], return_tensors="pt"
        )
        with torch.no_grad():
            expected = backbone.model(input_ids=ids, **inputs).logits
        batch = backbone.batch([Query("What is this?", image=path)], with_answer=False)
        torch.testing.assert_close(backbone.logits(batch), expected, atol=1e-4, rtol=0)


def test_a_tokenizer_without_the_image_token_is_refused():
    from transformers import CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(ModelError, match="the tokenizer has no image token with id"):
        llava(vision, CLIPImageProcessorPil(), tiny.tokenizer(), "a")
