"""What every backbone promises, on tiny random models of each family."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, QUERIES, SEEING, SHAPES, asked

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.models.shared.anchors import sizes
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

seeing = pytest.mark.parametrize(
    "backbone",
    SEEING,
    indirect=True,
    scope="session",
)


def test_resume_of_prefix_is_the_forward_pass_bit_for_bit(backbone):
    batch = backbone.batch(asked(backbone))
    assert (batch.attention_mask == 0).any(), "the batch must be padded"
    expected = backbone.logits(batch)
    assert expected.shape == (
        *batch.input_ids.shape,
        backbone.model.get_output_embeddings().weight.shape[0],
    )
    for layer in range(backbone.n_layers + 1):
        prefix = backbone.prefix(batch, layer)
        assert torch.equal(backbone.resume(prefix), expected), layer
        rebuilt = backbone.prefix_of(prefix.hidden, batch, layer)
        assert torch.equal(backbone.resume(rebuilt), expected), layer


def test_logits_are_those_of_the_published_forward(backbone):
    """Against transformers' own forward, with pictures as pixels and placeholders as ids."""
    queries = [query for query in asked(backbone) if query.image or not backbone.sees]
    batch = backbone.batch(queries)
    inputs = {}
    if backbone.sees:
        pictures = [load_picture(Picture(q.image, q.background)) for q in queries]
        inputs = backbone.pixels(pictures)
    expected = backbone.model(
        input_ids=backbone.own_ids(batch),
        attention_mask=batch.attention_mask,
        **backbone.token_types(batch),
        **inputs,
    ).logits
    assert torch.equal(backbone.logits(batch), expected)


def blip2_inputs(backbone, image, text):
    """The processor adds the placeholder itself, and fails on a tokenizer that names one (transformers 5.23)."""
    from transformers import Blip2Processor

    tokenizer = type(backbone.tokenizer)(
        tokenizer_object=backbone.tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    return Blip2Processor(backbone.image_processor, tokenizer, num_query_tokens=8)(
        images=image, text=text
    )


def llava_inputs(backbone, image, text):
    from transformers import LlavaProcessor

    processor = LlavaProcessor(
        backbone.image_processor,
        backbone.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return processor(images=image, text="<image>\n" + text)


def qwen_vl_inputs(backbone, image, text):
    """The processor wants a video processor, and that wants torchvision (transformers 5.23): one without videos."""
    from transformers import ProcessorMixin, Qwen2VLProcessor

    class ImagesOnly(Qwen2VLProcessor):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, tokenizer):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
                ["<|image_pad|>", "<|video_pad|>"]
            )
            ProcessorMixin.__init__(self, image_processor, tokenizer)

    processor = ImagesOnly(backbone.image_processor, backbone.tokenizer)
    return processor(
        images=image, text="<|vision_start|><|image_pad|><|vision_end|>" + text
    )


def minigpt4_inputs(backbone, image, text):
    """There is no processor: the published code tokenizes what stands before and behind <ImageHere> on its own."""
    behind = backbone.tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    return {
        "input_ids": [
            [
                backbone.tokenizer.bos_token_id,
                *[backbone.model.config.image_token_id] * 8,
                *behind,
            ]
        ]
    }


def generic_inputs(backbone, image, text):
    """Its own processor, on the text that it is given: the picture, what its chat format puts behind it, the text."""
    placed = backbone.image_token + backbone._between + text
    return backbone.image_processor(images=[[image]], text=[placed])


def causal_lm_inputs(backbone, image, text):
    """A tokenizer is all there is."""
    return backbone.tokenizer([text])


def test_our_ids_are_those_of_the_processor(backbone):
    inputs = globals().get(f"{backbone.family.replace('-', '_')}_inputs")
    if inputs is None:
        pytest.skip("a plug-in compares its ids in a test of its own")
    text, path = "What is this?", asked(backbone)[0].image
    image = path and load_picture(Picture(path))
    ids = torch.tensor(inputs(backbone, image, text)["input_ids"])
    batch = backbone.batch([Query(text, image=path)], with_answer=False)
    assert torch.equal(backbone.own_ids(batch), ids)


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
        backbone.image_processor,
        backbone.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    text = f"USER: <image>\n{chat.prompt} ASSISTANT: {chat.target}"
    ids = processor(
        images=load_picture(Picture(chat.image)), text=text, return_tensors="pt"
    )["input_ids"]
    batch = backbone.batch([chat])
    ours = torch.where(
        batch.image_mask, backbone.model.config.image_token_id, batch.input_ids
    )
    assert torch.equal(ours, ids)
    answer = backbone.encode(QUERIES[0]).n_answer
    assert backbone.encode(chat).n_answer == answer, (
        "the answer is the same, the question is framed"
    )
    said = backbone.tokenizer.decode(
        backbone.encode(replace(chat, image=None)).ids, skip_special_tokens=True
    )
    assert said == f"USER: {chat.prompt} ASSISTANT: {chat.target}"


def test_batched_equals_single(backbone):
    batch = backbone.batch(asked(backbone))
    together = backbone.logits(batch)
    for row, query in enumerate(asked(backbone)):
        alone = backbone.logits(backbone.batch([query]))[0]
        torch.testing.assert_close(
            together[row, : len(alone)], alone, atol=1e-5, rtol=0
        )
    texts = backbone.generate(asked(backbone), max_new_tokens=6)
    assert texts == [
        backbone.generate([query], max_new_tokens=6)[0] for query in asked(backbone)
    ]
    assert len(set(texts)) > 2, "a random model must not say the same to everything"


def test_generation_with_the_cache_is_greedy_decoding_without_it(backbone):
    query = asked(backbone)[0]
    batch = backbone.batch([query], with_answer=False)
    start = batch.input_ids.shape[1]
    for _ in range(5):
        token = backbone.logits(batch)[:, -1:].argmax(-1)
        batch = replace(
            batch,
            input_ids=torch.cat((batch.input_ids, token), 1),
            attention_mask=torch.nn.functional.pad(
                batch.attention_mask, (0, 1), value=1
            ),
            image_mask=torch.nn.functional.pad(batch.image_mask, (0, 1)),
        )
    said = backbone.tokenizer.decode(
        batch.input_ids[0, start:], skip_special_tokens=True
    )
    assert (
        backbone.generate([query], max_new_tokens=5)[0]
        == said.strip().split("\n")[0].strip()
    )


def test_masks_divide_the_sequence(backbone):
    queries = asked(backbone)
    batch = backbone.batch(queries)
    total = batch.image_mask.int() + batch.prompt_mask + batch.answer_mask
    assert total.max() == 1
    assert (total <= batch.attention_mask).all()
    seen = [query.image is not None for query in queries]
    assert batch.image_mask.any(1).tolist() == seen
    assert torch.equal(batch.labels != -100, batch.answer_mask)
    decoded = [
        backbone.tokenizer.decode(row[mask])
        for row, mask in zip(batch.labels, batch.answer_mask, strict=True)
    ]
    assert [text.removeprefix(" ") for text in decoded] == [q.target for q in queries]
    prompts = [
        backbone.tokenizer.decode(row[mask], skip_special_tokens=True).strip()
        for row, mask in zip(batch.input_ids, batch.prompt_mask, strict=True)
    ]
    assert prompts == [query.prompt for query in queries]
    assert torch.equal(batch.predicting[:, :-1], batch.answer_mask[:, 1:])
    assert batch.pictures == tuple(
        Picture(q.image, q.background) for q in queries if q.image
    )
    numbers = iter(range(3))
    assert batch.picture_of == tuple(next(numbers) if see else None for see in seen)


def test_logits_at_positions_are_the_same_rows(backbone):
    batch = backbone.batch(asked(backbone))
    torch.testing.assert_close(
        backbone.resume(backbone.prefix(batch, 3), batch.predicting),
        backbone.logits(batch)[batch.predicting],
        atol=1e-6,
        rtol=0,
    )


@seeing
def test_the_mean_image_token_is_that_of_the_embeddings(backbone, monkeypatch):
    batch = backbone.batch(asked(backbone))
    embeds, mask = backbone.embed(batch), batch.image_mask[..., None]
    expected = (embeds * mask).sum(1) / mask.sum(1).clamp(min=1)
    fresh = backbone.mean_image_tokens(backbone.batch(asked(backbone)))
    torch.testing.assert_close(fresh, expected)
    assert torch.equal(fresh[1], torch.zeros_like(fresh[1])), (
        "a query without a picture"
    )
    assert fresh.shape == (len(asked(backbone)), backbone.entry_width)
    with backbone.cached_activations(1, asked(backbone), group=2, budget=1 << 20):
        torch.testing.assert_close(
            backbone.mean_image_tokens(backbone.batch(asked(backbone))), expected
        )
    batch = backbone.batch(asked(backbone))
    backbone.prefix(batch, 1)
    monkeypatch.setattr(
        backbone, "image_features", None
    )  # the batch that entered last is not encoded again
    torch.testing.assert_close(backbone.mean_image_tokens(batch), expected)


def test_what_is_kept_changes_nothing(backbone, monkeypatch):
    encoded = []
    real = backbone.image_features
    batch = backbone.batch(asked(backbone))
    plain = backbone.logits(batch)
    monkeypatch.setattr(
        backbone, "image_features", lambda ps: encoded.extend(ps) or real(ps)
    )
    with backbone.cached_activations(2, asked(backbone), group=3, budget=1 << 20):
        assert torch.equal(backbone.logits(batch), plain)
        backbone.logits(backbone.batch(asked(backbone)[::-1]))
        pictures = 3 if backbone.sees else 0
        assert len(encoded) == pictures
        kept = backbone.resume(backbone.prefix(batch, 2), batch.predicting)
        torch.testing.assert_close(kept, plain[batch.predicting], atol=1e-5, rtol=0)
    backbone.logits(batch)
    assert len(encoded) == 2 * pictures


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query("", "x"), "the prompt is empty"),
        (Query("  \n", "x"), "the prompt is empty"),
        (Query("What?", ""), r"the target of 'What\?' is empty"),
        (Query("What?", " \t"), r"the target of 'What\?' is empty"),
        (
            Query("many words " * 100, "x"),
            r"takes \d+ tokens with its image; tiny-[\w.-]+ reads 128",
        ),
    ],
)
def test_a_query_that_cannot_be_used_is_named(backbone, query, message):
    with pytest.raises(DataError, match=message):
        backbone.batch([query])


@seeing
@pytest.mark.parametrize("image", [QUERIES[0].image, None], ids=["picture", "text"])
def test_an_image_token_inside_a_text_is_text(backbone, image):
    token = backbone.image_token
    plain = backbone.encode(Query("What does it mean?", "a mark", image))
    found = backbone.encode(Query(f"What does {token} mean?", f"a {token}", image))
    assert found.n_image == plain.n_image
    text = [
        *found.ids[: found.image_start],
        *found.ids[found.image_start + found.n_image :],
    ]
    text = [i for i in text if i not in backbone.frame[0]]  # Gemma 3 has it there
    assert backbone.tokenizer.convert_tokens_to_ids(token) not in text
    assert token in backbone.tokenizer.decode(text).replace("\ufdd0", "?")
    assert token in backbone.tokenizer.decode(found.ids[-found.n_answer :])
    assert (
        backbone.logits(backbone.batch([Query(f"What does {token} mean?", "x", image)]))
        .isfinite()
        .all()
    )


def test_a_target_without_tokens_is_refused(backbone, monkeypatch):
    real = backbone.tokenizer

    class Deaf:
        """The tokenizer, but for one character."""

        def __call__(self, text, **options):
            text = text if isinstance(text, str) else text[0]
            return real(text.replace("\u200b", "").rstrip(), **options)

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(backbone, "tokenizer", Deaf())
    with pytest.raises(DataError, match="has no tokens in this model's vocabulary"):
        backbone.batch([Query("What?", "\u200b")])


@seeing
def test_images_are_read_late_and_a_broken_one_is_named(backbone, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes((SHAPES / "solid/red-circle.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"broken\.png: not a readable image"):
        backbone.embed(backbone.batch([Query("What?", "x", path)]))


def test_layers_outside_are_refused(backbone):
    with pytest.raises(ModelError, match="has the layers 0 to 5"):
        backbone.prefix(backbone.batch(asked(backbone)), 7)


def test_anchors_find_their_modules(backbone):
    anchors = backbone.anchors
    for role in anchors.roles:
        assert anchors.module(role, 2) is backbone.model.get_submodule(
            anchors.path(role, 2)
        )
    assert sizes(anchors.module("ffn_out", -1))[1] == backbone.width
    assert sizes(anchors.module("ffn_in", 0))[0] == backbone.width
    assert anchors.path("layer", -1) == anchors.path("layer", 5)
    assert anchors.module("head").out_features == len(backbone.tokenizer)
    with pytest.raises(
        ModelError, match=r"no anchor 'fnn_out' \(did you mean ffn_out\?\)"
    ):
        anchors.path("fnn_out", 0)
    with pytest.raises(ModelError, match="layer 6 is outside 0 to 5"):
        anchors.path("ffn_out", 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_resumes_bit_for_bit(name):
    backbone = load_backbone(name, device="cpu", dtype="bfloat16")
    batch = backbone.batch(asked(backbone))
    expected = backbone.logits(batch)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(backbone.resume(backbone.prefix(batch, 3)), expected)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory) -> Path:
    """A model folder as save_pretrained writes it, with a tokenizer and an image processor."""
    backbone = load_backbone(request.param, device="cpu")
    folder = tmp_path_factory.mktemp("models") / request.param
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        if part is not None:
            part.save_pretrained(folder)
    return folder


def test_a_local_folder_is_the_same_model(saved):
    loaded = load_backbone(str(saved), device="cpu")
    original = load_backbone(saved.name, device="cpu")
    expected = original.logits(original.batch(asked(original)))
    assert torch.equal(loaded.logits(loaded.batch(asked(loaded))), expected)
    assert loaded.fingerprint != original.fingerprint
    assert loaded.fingerprint == load_backbone(str(saved), device="cpu").fingerprint
    spread = load_backbone(str(saved), device="cpu", device_map="cpu")
    assert torch.equal(spread.logits(spread.batch(asked(spread))), expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "model.safetensors").unlink(),
            r"no weights \(\*\.safetensors\)",
        ),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            "type 'bert' is not supported",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"short"),
            "not a safetensors file, or cut off",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:9999]
            ),
            "safetensors",
        ),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            # some families make an empty one then
            r"no usable tokenizer|the tokenizer has \d+ of the \d+ tokens",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "its weights are pickled",
        ),
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
