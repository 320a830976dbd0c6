"""What every backbone promises, on tiny random models of each family."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, QUERIES, SHAPES

from mmedit_cli.backbones._loading import load_backbone
from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.prefix import RowCache
from mmedit_cli.types import Query


def test_resume_of_prefix_is_the_forward_pass_bit_for_bit(backbone):
    batch = backbone.batch(QUERIES)
    assert (batch.attention_mask == 0).any(), "the batch must be padded"
    expected = backbone.logits(batch)
    assert expected.shape == (*batch.input_ids.shape, backbone.model.get_output_embeddings().weight.shape[0])
    for layer in range(backbone.n_layers + 1):
        prefix = backbone.prefix(batch, layer)
        assert torch.equal(backbone.resume(prefix), expected), layer
        rebuilt = backbone.prefix_of(prefix.hidden, batch.attention_mask, layer)
        assert torch.equal(backbone.resume(rebuilt), expected), layer


def test_logits_are_those_of_the_published_forward(backbone):
    """Against transformers' own forward, with pictures as pixels and placeholders as ids."""
    queries = [query for query in QUERIES if query.image]
    batch = backbone.batch(queries)
    ids = torch.where(batch.image_mask, backbone.model.config.image_token_id, batch.input_ids)
    images = [load_picture(Picture(q.image, q.background)) for q in queries]
    pixels = backbone.image_processor(images=images, return_tensors="pt")["pixel_values"]
    expected = backbone.model(input_ids=ids, attention_mask=batch.attention_mask, pixel_values=pixels).logits
    assert torch.equal(backbone.logits(batch), expected)


def test_our_ids_are_those_of_the_processor(backbone):
    from transformers import Blip2Processor, LlavaProcessor

    text, image = "What is this?", load_picture(Picture(QUERIES[0].image))
    if backbone.family == "blip2":
        # the processor adds the placeholder itself, and fails on a tokenizer that names one (transformers 5.23)
        tokenizer = type(backbone.tokenizer)(
            tokenizer_object=backbone.tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        processor = Blip2Processor(backbone.image_processor, tokenizer, num_query_tokens=8)
        ids = processor(images=image, text=text, return_tensors="pt")["input_ids"]
    else:
        processor = LlavaProcessor(
            backbone.image_processor, backbone.tokenizer, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
        ids = processor(images=image, text="<image>\n" + text, return_tensors="pt")["input_ids"]
    batch = backbone.batch([Query(text, image=QUERIES[0].image)], with_answer=False)
    ours = torch.where(batch.image_mask, backbone.model.config.image_token_id, batch.input_ids)
    assert torch.equal(ours, ids)


CHAT = (
    "{{ bos_token }}{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def test_a_chat_is_what_the_processor_makes_of_it():
    from transformers import LlavaProcessor

    backbone = load_backbone("tiny-llava", device="cpu")
    chat = replace(QUERIES[0], chat=True)
    with pytest.raises(ModelError, match="tiny-llava has no chat template"):
        backbone.encode(chat)
    backbone.tokenizer.chat_template = CHAT
    processor = LlavaProcessor(
        backbone.image_processor, backbone.tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    text = f"USER: <image>\n{chat.prompt} ASSISTANT: {chat.target}"
    ids = processor(images=load_picture(Picture(chat.image)), text=text, return_tensors="pt")["input_ids"]
    batch = backbone.batch([chat])
    ours = torch.where(batch.image_mask, backbone.model.config.image_token_id, batch.input_ids)
    assert torch.equal(ours, ids)
    answer = backbone.encode(QUERIES[0]).n_answer
    assert backbone.encode(chat).n_answer == answer, "the answer is the same, the question is framed"
    said = backbone.tokenizer.decode(backbone.encode(replace(chat, image=None)).ids, skip_special_tokens=True)
    assert said == f"USER: {chat.prompt} ASSISTANT: {chat.target}"


def test_batched_equals_single(backbone):
    batch = backbone.batch(QUERIES)
    together = backbone.logits(batch)
    for row, query in enumerate(QUERIES):
        alone = backbone.logits(backbone.batch([query]))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=0)
    texts = backbone.generate(QUERIES, max_new_tokens=6)
    assert texts == [backbone.generate([query], max_new_tokens=6)[0] for query in QUERIES]
    assert len(set(texts)) > 2, "a random model must not say the same to everything"


def test_generation_with_the_cache_is_greedy_decoding_without_it(backbone):
    query = QUERIES[0]
    said = ""
    tokens: list[int] = []
    for _ in range(5):
        batch = backbone.batch([query], with_answer=False)
        embeds = backbone.embed(batch)
        if tokens:
            embeds = torch.cat((embeds, backbone.model.get_input_embeddings()(torch.tensor([tokens]))), 1)
        logits = backbone.forward_embeds(embeds, torch.ones(embeds.shape[:2], dtype=torch.long))
        tokens.append(int(logits[0, -1].argmax()))
        said = backbone.tokenizer.decode(tokens, skip_special_tokens=True)
    assert backbone.generate([query], max_new_tokens=5)[0] == said.strip().split("\n")[0].strip()


def test_masks_divide_the_sequence(backbone):
    batch = backbone.batch(QUERIES)
    total = batch.image_mask.int() + batch.prompt_mask + batch.answer_mask
    assert total.max() == 1
    assert (total <= batch.attention_mask).all()
    assert batch.image_mask.any(1).tolist() == [True, False, True, True]
    assert torch.equal(batch.labels != -100, batch.answer_mask)
    decoded = [backbone.tokenizer.decode(row[mask]) for row, mask in zip(batch.labels, batch.answer_mask, strict=True)]
    assert decoded == [" " + query.target for query in QUERIES]
    prompts = [
        backbone.tokenizer.decode(row[mask], skip_special_tokens=True).strip()
        for row, mask in zip(batch.input_ids, batch.prompt_mask, strict=True)
    ]
    assert prompts == [query.prompt for query in QUERIES]
    assert torch.equal(batch.predicting[:, :-1], batch.answer_mask[:, 1:])
    assert batch.pictures == tuple(Picture(q.image, q.background) for q in QUERIES if q.image)
    assert batch.picture_of == (0, None, 1, 2)


def test_logits_at_positions_are_the_same_rows(backbone):
    batch = backbone.batch(QUERIES)
    torch.testing.assert_close(
        backbone.resume(backbone.prefix(batch, 3), batch.predicting), backbone.logits(batch)[batch.predicting],
        atol=1e-6, rtol=0,
    )  # fmt: skip


def test_features_from_a_cache_change_nothing(backbone):
    cache = RowCache(lambda pictures: list(backbone.image_features(pictures)), group=3)
    batch = backbone.batch(QUERIES)
    assert torch.equal(backbone.logits(batch, cache), backbone.logits(batch))
    backbone.logits(backbone.batch(QUERIES[::-1]), cache)
    assert cache.computed == 3


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query("", "x"), "the prompt is empty"),
        (Query("  \n", "x"), "the prompt is empty"),
        (Query("What?", ""), r"the target of 'What\?' is empty"),
        (Query("What?", " \t"), r"the target of 'What\?' is empty"),
        (Query("<image> and <image>", "x", QUERIES[0].image), "one image a query, several are not supported"),
        (Query("many words " * 100, "x"), r"takes \d+ tokens with its image; tiny-\w+ reads 128"),
    ],
)
def test_a_query_that_cannot_be_used_is_named(backbone, query, message):
    with pytest.raises(DataError, match=message):
        backbone.batch([query])


def test_a_target_without_tokens_is_refused(backbone, monkeypatch):
    real = backbone.tokenizer
    monkeypatch.setattr(backbone, "tokenizer", lambda text: real(text.replace("\u200b", "").rstrip()))
    with pytest.raises(DataError, match="has no tokens in this model's vocabulary"):
        backbone.batch([Query("What?", "\u200b")])


def test_images_are_read_late_and_a_broken_one_is_named(backbone, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes((SHAPES / "solid/red-circle.png").read_bytes()[:60])
    batch = backbone.batch([Query("What?", "x", path)])
    with pytest.raises(DataError, match=r"broken\.png: not a readable image"):
        backbone.embed(batch)


def test_layers_outside_are_refused(backbone):
    with pytest.raises(ModelError, match="has the layers 0 to 5"):
        backbone.prefix(backbone.batch(QUERIES), 7)


def test_anchors_find_their_modules(backbone):
    anchors = backbone.anchors
    for role in anchors.roles:
        assert anchors.module(role, 2) is backbone.model.get_submodule(anchors.path(role, 2))
    assert anchors.module("ffn_out", -1).out_features == backbone.width
    assert anchors.module("ffn_in", 0).in_features == backbone.width
    assert anchors.path("layer", -1) == anchors.path("layer", 5)
    assert anchors.module("head").out_features == len(backbone.tokenizer)
    with pytest.raises(ModelError, match=r"no anchor 'fnn_out' \(did you mean ffn_out\?\)"):
        anchors.path("fnn_out", 0)
    with pytest.raises(ModelError, match="layer 6 is outside 0 to 5"):
        anchors.path("ffn_out", 6)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_resumes_bit_for_bit(name):
    backbone = load_backbone(name, device="cpu", dtype="bfloat16")
    batch = backbone.batch(QUERIES)
    expected = backbone.logits(batch)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(backbone.resume(backbone.prefix(batch, 3)), expected)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory) -> Path:
    """A model folder as save_pretrained writes it, with a tokenizer and an image processor."""
    backbone = load_backbone(request.param, device="cpu")
    folder = tmp_path_factory.mktemp(request.param)
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder)
    return folder


def test_a_local_folder_is_the_same_model(saved):
    loaded = load_backbone(str(saved), device="cpu")
    original = load_backbone(loaded.family.join(("tiny-", "")), device="cpu")
    assert torch.equal(loaded.logits(loaded.batch(QUERIES)), original.logits(original.batch(QUERIES)))
    assert loaded.fingerprint != original.fingerprint
    assert loaded.fingerprint == load_backbone(str(saved), device="cpu").fingerprint
    spread = load_backbone(str(saved), device="cpu", device_map="cpu")
    assert torch.equal(spread.logits(spread.batch(QUERIES)), original.logits(original.batch(QUERIES)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"no weights \(\*\.safetensors\)"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "model_type 'bert' is not supported"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "not a complete safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9999]),
            "safetensors",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "no usable tokenizer"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no weights"),
    ],
)
def test_an_incomplete_folder_is_one_clear_error(saved, tmp_path, spoil, message):
    folder = shutil.copytree(saved, tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_backbone(str(folder), device="cpu")


def test_unknown_and_absent_models_are_explained():
    with pytest.raises(ModelError, match=r"did you mean tiny-llava\?"):
        load_backbone("tiny-lava")
    with pytest.raises(ModelError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        load_backbone("llava-1.5-7b")
