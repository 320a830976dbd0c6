"""Models that no family was written for: what is asked of them, and what becomes of one that is not understood."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import ASKED, QUERIES
from PIL import Image

from mmedit_cli import doctor
from mmedit_cli.errors import DataError, ModelError, UserError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.loading import load_editor
from mmedit_cli.knowledge.models import generic
from mmedit_cli.knowledge.models.generic import Generic
from mmedit_cli.knowledge.models.shared import self_check, tiny, tiny_generic
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.models.shared.processors import images_only, make_processor
from mmedit_cli.layers import at_depth
from mmedit_cli.pictures import Picture
from mmedit_cli.registry import editors, hparams_file
from mmedit_cli.types import Query

CHAT = (
    "{% for message in messages %}USER: {% for part in message.content %}{% if part.type == 'image' %}"
    "<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


SMOL = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
BUILD = tiny_generic.build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, where no check is kept yet."""
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def glm4v():
    """GLM-4V, for which nothing is written anywhere: positions on three axes, one matrix for gate and values."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration
    from transformers.models.glm4v.image_processing_pil_glm4v import (
        Glm4vImageProcessorPil,
    )

    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    around = ("<|begin_of_image|>", "<|end_of_image|>")
    words = tiny.tokenizer(*named.values(), *around, names=named)
    ids = words.convert_tokens_to_ids([*named.values(), *around])
    config = Glm4vConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 48,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "image_size": 64,
            "spatial_merge_size": 2,
        },
        text_config={
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "vocab_size": len(words),
            "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 2, 2],
                "partial_rotary_factor": 1.0,
            },
        },
        image_token_id=ids[0],
        video_token_id=ids[1],
        image_start_token_id=ids[2],
        image_end_token_id=ids[3],
    )
    torch.manual_seed(0)
    model = Glm4vForConditionalGeneration(config)
    tiny.spread(model)
    images = Glm4vImageProcessorPil(
        size={"shortest_edge": 32**2, "longest_edge": 64**2}, patch_size=8
    )
    return model, make_processor(config, images, words, {})


def ovis2():
    """Ovis2: the tokens that frame a picture and part its tiles are embedded by a table of the tower as well."""
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration
    from transformers.models.ovis2.image_processing_pil_ovis2 import (
        Ovis2ImageProcessorPil,
    )

    parts = ("START", "GRID", "COL", "ROW", "END")
    around = tuple(f"<IMG_{part}>" for part in parts)
    words = tiny.tokenizer("<IMG_ATOM>", *around)
    config = Ovis2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "hidden_stride": 2,
            "vocab_size": 37,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "vocab_size": len(words),
            "eos_token_id": 2,
        },
        image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=words.convert_tokens_to_ids(list(around)),
        vocab_size=len(words),
        hidden_size=48,
    )
    torch.manual_seed(0)
    model = Ovis2ForConditionalGeneration(config)
    tiny.spread(model)
    images = Ovis2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=3
    )
    return model, make_processor(config, images, words, {"image_seq_length": 4})


@pytest.mark.slow
@pytest.mark.parametrize("family", [glm4v, ovis2])
def test_a_family_that_nothing_is_written_for_works(tmp_path, cache, family):
    model, processor = family()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "new")
    backbone = load_backbone(str(tmp_path / "new"), device="cpu")
    assert (backbone.family, backbone.fast) == ("generic", True)
    queries = [replace(query, target="") for query in QUERIES]
    sizes = ((40, 40), (96, 32))
    for i, size in enumerate(sizes):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{i}.png")
        queries.append(Query("What is this here?", image=tmp_path / f"{i}.png"))
    answers = backbone.generate(queries, max_new_tokens=5)
    for query, answer in zip(queries, answers, strict=True):
        inputs = backbone.processed(query)
        own = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert backbone.decode(own[0, length:].tolist()) == answer
    before = model.state_dict()
    editor = load_editor("ft", backbone)
    editor.edit(QUERIES[:1])
    editor.undo()
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    found = {name: ok for name, ok, _ in doctor.check_model(str(tmp_path / "new"))}
    names = ["model", "ids", "logits", "batch", "answers", "left padding"]
    assert [found[name] for name in (*names, self_check.FAST)] == [True] * 7


@pytest.mark.slow
def test_smolvlm_says_what_its_processor_needs(tmp_path, cache, monkeypatch):
    """A SmolVLM with the weights and parts of an Idefics 3, which is built alike; its processor spells numbers."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.image_processing_pil_smolvlm import (
        SmolVLMImageProcessorPil,
    )

    idefics, words, _ = BUILD("tiny-idefics3")
    config = idefics.config.to_dict()
    known = ("vision_config", "text_config", "image_token_id", "scale_factor")
    parts = {name: config[name] for name in known}
    parts["vision_config"].pop("model_type")
    model = SmolVLMForConditionalGeneration(SmolVLMConfig(**parts, pad_token_id=0))
    model.load_state_dict(idefics.state_dict())
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    words.chat_template = SMOL
    for part in (model, words, images):
        part.save_pretrained(tmp_path / "smol")
    settings = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
    (tmp_path / "smol" / "processor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ModelError, match="no usable processor") as caught:
        load_backbone(str(tmp_path / "smol"), device="cpu")
    assert caught.value.hint == "pip install num2words"
    # it says how long a video is, and videos are not asked about here
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    smol = load_backbone(str(tmp_path / "smol"), device="cpu")
    found = {name: text for name, _, text in doctor.check_model(str(tmp_path / "smol"))}
    assert found["ids"] == "4 questions are those of the processor", "chats as well"
    assert smol.n_image_tokens(Picture(QUERIES[0].image)) == 31


def unsound():
    """A model that does more than its decoder says: its logits are scaled behind the head."""
    model, words, processor = BUILD("tiny-internvl")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = scaled
    return model, words, processor


def test_a_model_that_is_not_understood_is_refused_with_what_failed(cache, monkeypatch):
    monkeypatch.setattr(tiny_generic, "build", lambda name: unsound())
    said = r"tiny-internvl: InternVLForConditionalGeneration is not understood: logits: .* away"
    with pytest.raises(ModelError, match=said):
        load_backbone("tiny-internvl", device="cpu")
    monkeypatch.setattr(self_check, "self_check", lambda backbone: pytest.fail("kept"))
    with pytest.raises(ModelError, match=said) as caught:
        load_backbone("tiny-internvl", device="cpu")
    assert caught.value.hint.startswith("mmedit doctor tiny-internvl checks it again")
    monkeypatch.undo()
    monkeypatch.setenv("MMEDIT_CACHE", str(cache))
    monkeypatch.setattr(tiny_generic, "build", lambda name: unsound())
    found = {name: ok for name, ok, _ in doctor.check_model("tiny-internvl")}
    assert found["logits"] is False
    assert found["usable"] is False
    assert "answers" not in found


@pytest.mark.slow
def test_what_was_found_is_kept_by_fingerprint(cache, monkeypatch):
    ran = []
    real = self_check.self_check
    monkeypatch.setattr(
        self_check, "self_check", lambda backbone: ran.append(1) or real(backbone)
    )
    for _ in range(2):
        load_backbone("tiny-internvl", device="cpu")
    assert len(ran) == 1
    (kept,) = (cache / "checks").iterdir()
    names = [check["name"] for check in json.loads(kept.read_text())["checks"]]
    assert names == [
        "ids",
        "logits",
        "batch",
        "answers",
        "left padding",
        self_check.FAST,
    ]
    for damage in ("{", '{"checks": [{"name": "ids", "ok": 3, "found": ""}]}'):
        kept.write_text(damage)
        load_backbone("tiny-internvl", device="cpu")
        assert json.loads(kept.read_text())["checks"]
    assert len(ran) == 3


@pytest.mark.slow
def test_layers_that_cannot_be_run_one_by_one_are_run_in_whole_passes(
    cache, monkeypatch
):
    """The contexts of layers are spoiled: that alone fails, and editors that stop in the middle work all the same."""
    real = generic.record_layers

    def spoiled(forward, layers, start):
        hidden, contexts = real(forward, layers, start)
        turned = []
        for context in contexts:
            parts = context.get("position_embeddings", ())
            turned.append({**context, "position_embeddings": tuple(parts)[::-1]})
        return hidden, tuple(turned)

    fast = load_backbone("tiny-internvl", device="cpu")
    batch = fast.batch(QUERIES)
    expected = fast.logits(batch)
    middle = fast.prefix(batch, 2)
    moved = replace(middle, hidden=middle.hidden * 1.5)
    changed = fast.resume(moved)
    monkeypatch.setenv("MMEDIT_CACHE", str(cache / "other"))
    monkeypatch.setattr(generic, "record_layers", spoiled)
    slow = load_backbone("tiny-internvl", device="cpu")
    assert not slow.fast
    for layer in range(slow.n_layers + 1):
        prefix = slow.prefix(batch, layer)
        assert torch.equal(slow.resume(prefix), expected), layer
    prefix = slow.prefix_of(moved.hidden, batch, 2)
    assert torch.equal(slow.resume(prefix), changed)
    further = slow.advance(prefix, 4).hidden
    assert torch.equal(slow.resume(slow.prefix_of(further, batch, 4)), changed)
    found = {name: (ok, text) for name, ok, text in doctor.check_model("tiny-internvl")}
    assert found[self_check.FAST][0] is None
    assert found["usable"][1].startswith("yes, with whole forward passes")


@pytest.fixture(scope="module")
def internvl():
    return load_backbone("tiny-internvl", device="cpu")


def test_a_chat_is_what_the_processor_makes_of_it(internvl, monkeypatch):
    plain = internvl.encode(QUERIES[0], with_answer=False).ids
    made = Generic(
        "mine", internvl.model, internvl.tokenizer, internvl.image_processor, "0"
    )
    monkeypatch.setattr(internvl.tokenizer, "chat_template", CHAT)
    chat = replace(QUERIES[0], chat=True)
    ids = made.encode(chat, with_answer=False).ids
    assert ids == made.processed(chat)["input_ids"][0].tolist()
    said = made.tokenizer.decode(ids, skip_special_tokens=False)
    assert said.startswith("<s>USER: <img><IMG_CONTEXT>")
    assert said.endswith(f"</img>\n{chat.prompt} ASSISTANT:")
    # what the chat format puts between the two is there without it as well
    newline = made.tokenizer("\n", add_special_tokens=False)["input_ids"]
    end = made.tokenizer.convert_tokens_to_ids("</img>")
    place = plain.index(end) + 1
    assert made.encode(QUERIES[0], with_answer=False).ids == [
        *plain[:place],
        *newline,
        *plain[place:],
    ]
    alone = made.encode(replace(chat, image=None), with_answer=False).ids
    assert made.tokenizer.decode(alone) == f"<s>USER: {chat.prompt} ASSISTANT:"


def test_a_token_that_stands_for_pictures_is_refused_in_a_text():
    gemma = load_backbone("tiny-gemma3", device="cpu")
    for image in (QUERIES[0].image, None):
        with pytest.raises(DataError, match="the text has <image> in it"):
            gemma.encode(Query("What is an <image>?", "a token", image))


def test_tokens_between_tiles_belong_to_the_picture():
    """Idefics 3 parts the tiles of a picture: the embeddings at all positions are those that the model makes."""
    idefics = load_backbone("tiny-idefics3", device="cpu")
    batch = idefics.batch(QUERIES[:1], with_answer=False)
    (places,) = batch.image_mask.nonzero(as_tuple=True)[1:]
    inside = batch.input_ids[0, places[0] : places[-1] + 1]
    assert len(inside) == batch.image_mask.sum()
    parts = inside[inside != idefics.model.config.image_token_id]
    assert len(parts) == 11
    seen = []
    handle = idefics._stack.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]),
        with_kwargs=True,
    )
    try:
        idefics.model(**idefics.processed(QUERIES[0]))
    finally:
        handle.remove()
    assert torch.equal(idefics.embed(batch), seen[0])


def test_a_picture_that_the_processor_cannot_take_is_named(internvl, monkeypatch):
    def fail(*_size):
        raise ValueError("absolute aspect ratio must be smaller than 200")

    monkeypatch.setattr(internvl, "_of_size", fail)
    said = r"red-circle\.png: \d+ x \d+ pixels cannot be used: absolute aspect ratio"
    with pytest.raises(DataError, match=said):
        internvl.n_image_tokens(Picture(QUERIES[0].image))


def test_the_answers_are_streamed_without_the_question(internvl):
    class Kept:
        def __init__(self):
            self.parts = []
            self.ended = False

        def put(self, tokens):
            self.parts.append(tokens)

        def end(self):
            self.ended = True

    streamer = Kept()
    (answer,) = internvl.generate(QUERIES[:1], max_new_tokens=4, streamer=streamer)
    assert streamer.ended
    assert streamer.parts[0].numel() == 0
    tokens = [int(part) for part in streamer.parts[1:]]
    assert internvl.decode(tokens) == answer


def test_a_processor_leaves_out_what_needs_torchvision():
    from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

    assert images_only(LlavaNextProcessor) is LlavaNextProcessor
    kind = images_only(LlavaOnevisionProcessor)
    assert kind.get_attributes() == ["image_processor", "tokenizer"]
    assert kind.__name__ == "LlavaOnevisionProcessor"


def test_edits_that_need_their_own_runtime_do_not_leave_a_model_with_masks_by_type():
    gemma = load_backbone("tiny-gemma3", device="cpu")
    editor = load_editor("multi-melo", gemma, overrides=["steps=1"])
    editor.edit(QUERIES[:1])
    with pytest.raises(UserError, match="tiny-gemma3 makes the masks of its layers"):
        editor.standalone()
    editor.undo()


@pytest.mark.slow
def test_doctor_knows_models_of_other_families_too(cli):
    code, said, _ = cli("doctor", "tiny-llava", "--json")
    assert code == 0
    found = {row["check"]: row["ok"] for row in json.loads(said)}
    assert found["ids, logits, answers"] is None
    assert found["batch"] is True
    assert found[self_check.FAST] is True


# strengths that were found for one tiny model hold for others of its size
SMALL = {
    "ft": "steps=20",
    "grace": "steps=20",
    "ultraedit": "values=raw",
    "lora": "steps=20",
}


@pytest.mark.slow
@pytest.mark.parametrize("editor", SMALL)
@pytest.mark.parametrize("family", ASKED)
def test_an_edit_is_learned_and_taken_back(family, editor):
    """Half the model is run anew for each: prefixes, hooks and gradients meet windows, tiles and other masks."""
    backbone = load_backbone(family, device="cpu")
    overrides = [SMALL[editor]]
    if (family, editor) == ("tiny-qwen3.5", "lora"):
        overrides.append("roles=[ffn_in,ffn_out]")  # not all its layers attend
    hparams = load_hparams(
        hparams_file(editor),
        editors.get(editor).Hparams,
        variant="tiny-llava",
        overrides=overrides,
    )
    made = editors.get(editor)(backbone, at_depth(hparams, backbone.n_layers))
    batch = backbone.batch(QUERIES)
    before = backbone.logits(batch)
    weights = {
        name: value.clone() for name, value in backbone.model.state_dict().items()
    }
    made.edit(QUERIES[:2])
    after = backbone.logits(batch)
    told = likelihoods(batch, after) - likelihoods(batch, before)
    assert (told[:2] > 0).all()
    made.undo()
    assert torch.equal(backbone.logits(batch), before)
    now = backbone.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in weights.items())


def likelihoods(batch, logits):
    """The mean log-likelihood of each answer."""
    found = []
    for row, where, labels in zip(logits, batch.predicting, batch.labels, strict=True):
        answer = labels[labels != -100]
        steps = torch.log_softmax(row[where], -1)
        found.append(steps.gather(1, answer[:, None]).mean())
    return torch.stack(found)
