"""BLIP-2 with FLAN-T5: a decoder of its own, at the positions that all families have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import QUERIES, SHAPES

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.loading import load_backbone, load_editor
from mmedit_cli.knowledge.models.shared.image_token import image_token_id
from mmedit_cli.knowledge.models.shared.loading import load_backbone as load_named
from mmedit_cli.pictures import Picture, load_picture

# of tiny random models, which are far from any answer
STRENGTHS = {
    "ft": ("steps=30", "learning_rate=0.03"),
    "lora": ("layers=[1,3]", "steps=30", "learning_rate=0.01"),
    "ike": ("demonstrations=1",),
}
STAR = ("--image", SHAPES / "solid/red-star.png")


@pytest.fixture(scope="module")
def backbone():
    return load_named("tiny-blip2-t5", device="cpu")


def own_inputs(backbone, query):
    """What the model itself takes of one question, and the decoder of its answer."""
    question = replace(query, target="")
    batch = backbone.batch([question], with_answer=False)
    ids = batch.input_ids.masked_fill(batch.image_mask, image_token_id(backbone))
    picture = load_picture(Picture(query.image, query.background))
    return {"input_ids": ids, **backbone.pixels([picture])}


def seen(queries):
    return [query for query in queries if query.image is not None]


def test_ids_end_the_question_and_begin_the_answer(backbone):
    encoded = backbone.encode(QUERIES[0])
    words = backbone.tokenizer
    assert encoded.n_image == 8
    behind = encoded.ids[encoded.n_image :]
    assert behind[: -encoded.n_answer] == words(QUERIES[0].prompt)["input_ids"]
    assert behind[-encoded.n_answer - 1] == words.eos_token_id
    assert words.decode(behind[-encoded.n_answer :]) == QUERIES[0].target


def test_logits_are_those_of_the_model_itself(backbone):
    for query in seen(QUERIES):
        batch = backbone.batch([query])
        answer = torch.tensor([backbone.tokenizer(query.target)["input_ids"][:-1]])
        begun = torch.nn.functional.pad(answer, (1, 0))
        own = backbone.model(
            **own_inputs(backbone, query), decoder_input_ids=begun
        ).logits
        ours = backbone.logits(batch)[0, -begun.shape[1] :]
        torch.testing.assert_close(ours, own[0], atol=1e-5, rtol=0)
        at = backbone.logits(batch)[batch.predicting]
        torch.testing.assert_close(at, own[0, :-1], atol=1e-5, rtol=0)


def test_answers_are_those_of_its_own_generate(backbone):
    answers = backbone.generate(seen(QUERIES), max_new_tokens=6)
    for query, answer in zip(seen(QUERIES), answers, strict=True):
        own = backbone.model.generate(
            **own_inputs(backbone, query), max_new_tokens=6, do_sample=False
        )
        assert backbone.decode(own[0, 1:].tolist()) == answer
    assert len(set(answers)) == 3, "a random model must not say the same to everything"
    together = backbone.generate(QUERIES, max_new_tokens=6)
    alone = [backbone.generate([query], max_new_tokens=6)[0] for query in QUERIES]
    assert together == alone, "padding and company change nothing"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_of_prefix_is_the_forward_pass_bit_for_bit(dtype):
    backbone = load_named("tiny-blip2-t5", device="cpu", dtype=dtype)
    batch = backbone.batch(QUERIES)
    assert (batch.attention_mask == 0).any(), "the batch must be padded"
    expected = backbone.logits(batch)
    for layer in range(backbone.n_layers + 1):
        prefix = backbone.prefix(batch, layer)
        assert torch.equal(backbone.resume(prefix), expected), layer
        rebuilt = backbone.prefix_of(prefix.hidden, batch, layer)
        assert torch.equal(backbone.resume(rebuilt), expected), layer
    with backbone.cached_activations(2, QUERIES, group=3, budget=1 << 20):
        kept = backbone.resume(backbone.prefix(batch, 2), batch.predicting)
    away = (kept - expected[batch.predicting]).abs().max()
    assert away <= (1e-5 if dtype == "float32" else 0.1)


def test_padding_in_front_moves_nothing(backbone):
    questions = [replace(query, target="") for query in QUERIES]
    batch = backbone.batch(questions, with_answer=False, left_pad=True)
    last = backbone.logits(batch)[:, -1]
    for row, question in zip(last, questions, strict=True):
        alone = backbone.batch([question], with_answer=False)
        torch.testing.assert_close(
            row, backbone.logits(alone)[0, -1], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", STRENGTHS)
def test_an_edit_is_learned_and_taken_back(backbone, name):
    request = QUERIES[0]
    batch = backbone.batch(QUERIES)
    before = backbone.logits(batch)
    weights = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    editor = load_editor(name, backbone, overrides=STRENGTHS[name])
    editor.edit([request])
    now = backbone.batch([request])
    logits = backbone.logits(now)
    if name == "ike":
        assert now.input_ids.shape[1] > backbone.encode(QUERIES[1]).n_image + 20
    else:
        said = logits[now.predicting].argmax(-1)
        assert torch.equal(said, now.answers), "the new answer, token by token"
        assert backbone.generate([request], max_new_tokens=9)[0].startswith("a blue")
    editor.undo()
    assert torch.equal(backbone.logits(batch), before)
    after = backbone.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in weights.items())


def test_other_editors_say_that_they_are_not_for_it(backbone):
    said = r"grace reads the question .* tiny-blip2-t5 has an encoder for it"
    with pytest.raises(UserError, match=said) as caught:
        load_editor("grace", backbone)
    assert caught.value.hint == "editors of such models: ft, ike, lora"


def test_a_model_that_is_loaded_is_known_by_its_language_model(backbone):
    wrapped = load_backbone(backbone.model, _Processor(backbone))
    assert wrapped.family == "blip2-t5"


class _Processor:
    """Both parts of a processor."""

    def __init__(self, backbone):
        self.tokenizer = backbone.tokenizer
        self.image_processor = backbone.image_processor

    def __call__(self, *args, **kwargs):
        raise AssertionError("its parts are used")


@pytest.mark.slow
def test_it_is_edited_kept_and_exported_on_the_command_line(cli, tmp_path, backbone):
    folder = tmp_path / "t5"
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder)
    model = ("--model", folder, "--device", "cpu")
    question = ("--prompt", "What is this?", "--target", "a lynx")
    changes = ("--set", "steps=40", "--set", "learning_rate=0.03")
    ledger = tmp_path / "ledger"
    asked = ("ask", *STAR, "What is this?", "--device", "cpu")
    base = cli(*asked, "--model", folder)[1]
    _, out, err = cli(
        "edit", "ft", *model, *STAR, *question, "--into", ledger, *changes
    )
    assert "What is this?" in out, err
    edited = cli(*asked, "--edits", ledger)[1]
    # ft does not teach where an answer ends
    assert edited.startswith("a lynx") > base.startswith("a lynx")
    exported = tmp_path / "exported"
    code, _, err = cli("edits", "export", ledger, "--to", exported)
    assert code == 0, err
    assert cli(*asked, "--model", exported)[1] == edited
    code, _, err = cli("edits", "undo", ledger, "all")
    assert code == 0, err
    assert cli(*asked, "--edits", ledger)[1] == base
