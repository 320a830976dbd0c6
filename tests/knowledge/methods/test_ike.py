"""ike: what stands in front of a question, and where it comes from."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import QUERIES, SHAPES

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.methods.ike import Ike, IkeHparams, read_demonstrations
from mmedit_cli.knowledge.methods.shared.sentences import sentence_encoder
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.types import Query

REQUEST = Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-blip2", device="cpu")


@pytest.fixture
def facts(tmp_path):
    """Training facts; the second says the same as REQUEST, of another picture."""
    rows = [
        ("What is it?", "a red dot", "x.png"),
        ("What is this?", "A blue star", "y.png"),
        ("Say 5", "five", None),
    ]
    lines = [
        {
            "id": str(i),
            "request": {
                "prompt": p,
                "target": t,
                **({"image": image} if image else {}),
            },
            "generality": {"text": [{"prompt": p + "!", "target": t}]},
            "locality": {"text": [{"prompt": "Where is Rome?", "target": "Italy"}]},
        }
        for i, (p, t, image) in enumerate(rows)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_the_fact_stands_in_front_and_goes_away_again(backbone, facts):
    editor = Ike(backbone, IkeHparams(demonstrations=1, facts=str(facts)))
    plain = backbone.encode(QUERIES[0]).ids
    edited = editor.edit([REQUEST])
    assert edited.info["form"] == "copied-answer"
    text = backbone.tokenizer.decode(
        backbone.encode(QUERIES[0]).ids, skip_special_tokens=True
    )
    assert (
        "New Fact: What is this? a blue star\nPrompt: What is this? a blue star" in text
    )
    assert isinstance(backbone.generate([QUERIES[0]], max_new_tokens=2)[0], str)
    editor.undo()
    assert backbone.encode(QUERIES[0]).ids == plain


def test_each_query_gets_the_fact_most_like_it(backbone, facts):
    editor = Ike(backbone, IkeHparams(demonstrations=0, facts=str(facts)))
    editor.edit([REQUEST, Query("What is the capital of Peru?", "Cusco")])
    assert "Cusco" in backbone.rewrite(QUERIES[1]).prompt
    assert "blue star" in backbone.rewrite(REQUEST).prompt
    editor.undo([2])
    assert "blue star" in backbone.rewrite(QUERIES[1]).prompt
    editor.undo()


def test_demonstrations_never_state_the_fact(backbone, facts):
    editor = Ike(backbone, IkeHparams(demonstrations=5, facts=str(facts)))
    editor.edit([REQUEST])
    assert [demo.prompt for demo in editor._demos[0]].count("What is this?") == 0
    assert len(editor._demos[0]) == 2
    editor.undo()
    of_the_facts = facts.parent / "y.png"
    of_the_facts.write_bytes(REQUEST.image.read_bytes())
    with pytest.raises(DataError, match="holds the request"):
        editor.edit([Query("What is this?", "a blue star", of_the_facts)])
    assert backbone.rewrite is None


def test_what_does_not_fit_is_left_out(backbone, facts):
    editor = Ike(backbone, IkeHparams(demonstrations=2, facts=str(facts)))
    editor.edit([REQUEST])
    long = Query(" ".join(["where"] * 40) + "?", "there")
    assert backbone.rewrite(Query("So?", "yes")).prompt.count("New Fact") >= 2
    assert backbone.rewrite(long).prompt.count("New Fact") == 1
    editor.undo()


def test_the_three_kinds_of_demonstrations(facts):
    shown = [demo.example for demo in read_demonstrations(facts)]
    assert shown == ["What is it?! a red dot", "Where is Rome? Italy", "Say 5 five"]


def test_bad_files_are_named(backbone, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Ike(backbone, IkeHparams(facts=str(tmp_path / "none.jsonl")))
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        Ike(backbone, IkeHparams(facts=str(tmp_path / "bad.jsonl")))
    with pytest.raises(ModelError, match="cannot be loaded"):
        sentence_encoder(str(tmp_path), backbone)
    with pytest.raises(ValueError, match="demonstrations"):
        IkeHparams(demonstrations=-1)


def test_a_sentence_encoder_of_transformers(backbone, tmp_path):
    """A tiny BERT in a folder: unit vectors that do not depend on what else is in the batch."""
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(
            vocab_size=len(backbone.tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    encode = sentence_encoder(str(tmp_path), backbone)
    vectors = encode(["a red dot", "what is this in the picture"])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(
        encode(["a red dot"])[0], vectors[0], atol=1e-5, rtol=1e-5
    )
