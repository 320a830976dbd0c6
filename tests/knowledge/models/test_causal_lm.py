"""Language models: what is special about models that read text alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import QUERIES, SHAPES, TEXTS, asked

from mmedit_cli import catalog
from mmedit_cli.errors import DataError, ModelError, UserError
from mmedit_cli.knowledge.loading import load_backbone, load_editor
from mmedit_cli.knowledge.models.causal_lm import CausalLM
from mmedit_cli.types import Query

CHAT = (
    "{% for message in messages %}{{ '<s>' + message.role + ': ' + message.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' answer:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llama():
    return load_backbone("tiny-llama-lm", device="cpu")


def test_a_question_with_a_picture_is_refused_in_one_line(llama):
    said = r"red-circle\.png: tiny-llama-lm is a language model and sees no pictures"
    with pytest.raises(DataError, match=said) as caught:
        llama.batch(QUERIES[:1])
    assert len(caught.value.problems) == 1
    assert "leave the picture out" in caught.value.hint


def test_a_chat_is_what_the_tokenizer_makes_of_it(llama, monkeypatch):
    chat = replace(TEXTS[0], chat=True)
    with pytest.raises(ModelError, match="tiny-llama-lm has no chat template"):
        llama.encode(chat)
    monkeypatch.setattr(llama.tokenizer, "chat_template", CHAT)
    llama._encode.cache_clear()
    messages = [{"role": "user", "content": chat.prompt}]
    expected = llama.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True
    )["input_ids"]
    assert llama.encode(chat, with_answer=False).ids == expected
    llama._encode.cache_clear()


def test_the_first_token_of_a_chat_stays_if_the_tokenizer_adds_none(monkeypatch):
    """SmolLM2 begins every turn with its bos token, and puts none in front of a text."""
    qwen = load_backbone("tiny-qwen2-lm", device="cpu")
    monkeypatch.setattr(qwen.tokenizer, "chat_template", CHAT)
    ids = qwen.encode(replace(TEXTS[0], chat=True), with_answer=False).ids
    assert ids[0] == qwen.tokenizer.bos_token_id
    assert ids.count(qwen.tokenizer.bos_token_id) == 1


def test_a_decoder_of_an_unknown_type_is_tried_out(tmp_path, llama):
    """Its type is not in the list, but it is built like Llama; or it only seems to be."""
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=len(llama.tokenizer),
        hidden_size=48,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    assert config.model_type not in catalog.FAMILIES
    for scaling in (1.0, 3.0):
        config.logits_scaling = scaling
        folder = tmp_path / str(scaling)
        GraniteForCausalLM(config).save_pretrained(folder)
        llama.tokenizer.save_pretrained(folder)
    assert catalog.family_of(tmp_path / "1.0") == "causal-lm"
    found = load_backbone(str(tmp_path / "1.0"), device="cpu")
    assert found.logits(found.batch(asked(found))).isfinite().all()
    said = "GraniteForCausalLM does more than its layers, norm and head"
    with pytest.raises(ModelError, match=said):
        load_backbone(str(tmp_path / "3.0"), device="cpu")


def test_layers_that_attend_differently_are_refused(llama, monkeypatch):
    config = llama.model.config
    kinds = ["sliding_attention", "full_attention"]
    monkeypatch.setattr(config, "layer_types", kinds, raising=False)
    with pytest.raises(ModelError, match="its layers attend in different ways"):
        CausalLM("mine", llama.model, llama.tokenizer, None, "")


def test_editors_that_route_by_the_picture_say_so(llama, cli, tmp_path):
    said = "liveedit routes by the picture, and tiny-llama-lm is a language model"
    with pytest.raises(UserError, match=said):
        load_editor("liveedit", llama)
    commands = (
        ("eval", "liveedit", "--model", "tiny-llama-lm"),
        ("train-editor", "liveedit", "--model", "tiny-llama-lm"),
    )
    for command in commands:
        code, _, err = cli(*command)
        assert code == 2, command
        assert said in err
        assert "editors of facts in text: " in err
        assert "liveedit," not in err.partition("hint: ")[2]
    fact = ("--prompt", "What is a star?", "--target", "blue", "--into", tmp_path / "e")
    code, _, err = cli("edit", "liveedit", "--model", "tiny-llama-lm", *fact)
    assert code == 2
    assert "liveedit routes by the picture, and this fact has none" in err
    assert not (tmp_path / "e").exists()


def test_data_with_pictures_are_refused_before_the_model_is_loaded(cli):
    code, _, err = cli("eval", "ft", "--model", "tiny-llama-lm", "--data", SHAPES)
    assert code == 2
    assert "cases have pictures, and tiny-llama-lm is a language model" in err


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # of peft, when it loads an adapter
@pytest.mark.parametrize("editor", ["ft", "lora", "multi-melo"])
def test_a_fact_in_text_is_edited_asked_undone_and_exported(cli, tmp_path, editor):
    ledger, fact = tmp_path / "edits", "The capital of France is"
    code, said, err = cli(
        *("edit", editor, "--model", "tiny-llama-lm", "--into", ledger, "--json"),
        *("--prompt", fact, "--target", "Lima"),
    )
    assert code == 0, err
    report = json.loads(said)
    assert all(probe["picture"] == "" for probe in report["locality"])
    assert report["edits"][0]["holds"]
    code, said, err = cli("edits", "export", ledger, "--to", tmp_path / "out")
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "text-generation" in card
    assert cli("ask", "--edits", ledger, fact)[0] == 0
    assert cli("edits", "undo", ledger, "1")[0] == 0


def test_gpt2_has_its_parts_where_editors_look():
    gpt2 = load_backbone("tiny-gpt2-lm", device="cpu")
    assert "attn_qkv" in gpt2.anchors.roles
    assert "attn_q" not in gpt2.anchors.roles
    with pytest.raises(ModelError, match="no anchor 'attn_q'"):
        load_editor("lora", gpt2, overrides=["roles=[attn_q]"])
    batch = gpt2.batch([Query("The sun is", "yellow"), TEXTS[2]], left_pad=True)
    assert batch.attention_mask[0, 0] == 0
    assert torch.is_tensor(gpt2.logits(batch))
