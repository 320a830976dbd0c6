"""Pictures that are found again by the name that the untouched model gives them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import QUERIES
from test_editor_contract import REQUESTS, make

from mmedit_cli.knowledge.loading import resolve_editor
from mmedit_cli.knowledge.methods.liveedit.names import (
    LENGTH,
    UNLIKELY,
    agreement,
    likeliest,
    no_names,
    spoken,
)
from mmedit_cli.knowledge.methods.liveedit.naming import Naming
from mmedit_cli.knowledge.models.shared.loading import load_backbone

END = 9
QUESTION = "What can be seen?"


def name(*tokens_and_logits):
    """Return the name whose tokens are given with the logits (V,) they were said by: (1, n, 1 + 2 L)."""
    found = no_names(1)
    for place, (token, logits) in enumerate(tokens_and_logits):
        found[0, place, 0] = token
        found[0, place, 1:] = likeliest(logits)
    return found


def shares(**by_token):
    """Return logits (10,) with these probabilities, by `t<token>`; the others share what is left."""
    given = {int(key[1:]): share for key, share in by_token.items()}
    rest = (1 - sum(given.values())) / (10 - len(given))
    every = [given.get(token, rest) for token in range(10)]
    return torch.tensor(every).log()


def test_the_agreement_of_two_names_by_hand():
    # "a b" of probability 0.8 * 0.9 (and its end 1.0) against "a c", which parts from it behind the first token
    ab = name(
        (1, shares(t1=0.8)), (2, shares(t2=0.9, t3=0.05)), (END, shares(t9=0.991))
    )
    ac = name((1, shares(t1=0.6)), (3, shares(t3=0.7, t2=0.2)), (END, shares(t9=0.991)))
    found = agreement(ab, torch.cat((ab, ac)))
    alone = math.log(0.8) + math.log(0.9) + math.log(0.991)
    there = math.log(0.8) + math.log(0.05)
    back = math.log(0.6) + math.log(0.2)
    wanted = torch.tensor([[alone, (there + back) / 2]])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_picture_without_a_name_agrees_with_none():
    a = name((1, shares(t1=0.9)), (END, shares(t9=0.991)))
    found = agreement(torch.cat((a, no_names(1))), torch.cat((a, no_names(1))))
    assert found[0, 0] > -0.2
    assert found.flatten()[1:].tolist() == [UNLIKELY] * 3


def test_what_is_said_greedily_stops_at_the_end_and_at_a_limit():
    four = shares(t4=0.9)
    five = shares(t5=0.9)
    seven = shares(t7=0.9)
    table = {
        (): four,
        (4,): five,
        (4, 5): seven,
    }

    def by_table(tokens):
        return table[tuple(tokens)]

    def always_four(_tokens):
        return four

    def always_seven(_tokens):
        return seven

    said = spoken(by_table, {7, END}, END)
    assert said[0, :4, 0].tolist() == [4, 5, END, -1]
    endless = spoken(always_four, {END}, END)
    assert endless[0, :, 0].tolist() == [4] * LENGTH
    nothing = spoken(always_seven, {7}, END)
    assert torch.equal(nothing, no_names(1))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-blip2", device="cpu")


def test_a_name_is_what_the_model_answers(backbone):
    naming = Naming(backbone, QUESTION)
    queries = [query for query in QUERIES if query.image is not None]
    batch = backbone.batch(queries)
    names = naming.of(batch)
    assert len(names) == len(queries)
    for query, row in zip(queries, names, strict=True):
        asked = backbone.batch(
            [type(query)(QUESTION, image=query.image, background=query.background)],
            with_answer=False,
            left_pad=True,
        )
        tokens = backbone.continued(asked, LENGTH)[0].tolist()
        said = [int(token) for token in row[:, 0] if token >= 0]
        assert said[:-1] == tokens[: len(said) - 1]


@pytest.mark.parametrize(
    "changed", ["variant=paper", "whole_picture=false"], ids=["paper", "no-wholes"]
)
def test_the_published_form_of_a_model_with_names_compares_none(changed):
    """The documented `--set variant=paper` is enough, whatever the variant of the model says of names."""
    _, named = resolve_editor("liveedit", "mini-blip2", None, ())
    _, published = resolve_editor("liveedit", "mini-blip2", None, (changed,))
    assert named.naming == "What is this?"
    assert published.naming is None


def test_a_picture_is_encoded_once_for_its_name(backbone, monkeypatch):
    encoded = []
    features = backbone.image_features

    def counted(pictures):
        encoded.extend(pictures)
        return features(pictures)

    monkeypatch.setattr(backbone, "image_features", counted)
    batch = backbone.batch(REQUESTS)
    names = Naming(backbone, QUESTION).of(batch)
    assert (names[:, 0, 0] >= 0).all(), "what has a name is read twice"
    assert len(encoded) == len(batch.pictures)


def test_text_alone_has_no_name_and_nobody_is_asked(backbone, monkeypatch):
    monkeypatch.setattr(backbone, "continued", None)
    text = type(REQUESTS[0])("What is the capital of Peru?", "Lima")
    names = Naming(backbone, QUESTION).of(backbone.batch([text]))
    assert torch.equal(names, no_names(1))


def test_each_picture_is_asked_about_once_while_activations_are_kept(
    backbone, monkeypatch
):
    asked = []
    continued = backbone.continued
    monkeypatch.setattr(
        backbone,
        "continued",
        lambda batch, limit: (asked.extend(batch.queries), continued(batch, limit))[1],
    )
    with backbone.cached_activations(None, REQUESTS, group=2, budget=1 << 20):
        for _ in range(2):
            for request in REQUESTS:
                Naming(backbone, QUESTION).of(backbone.batch([request]))
    assert len(asked) == len({request.image for request in REQUESTS})


@pytest.mark.slow  # networks are trained
def test_the_model_is_asked_before_the_pass_and_without_edits(backbone):
    editor = make("liveedit", (f"naming={QUESTION}",), backbone)
    untouched = Naming(backbone, QUESTION).of(backbone.batch(REQUESTS))
    editor.edit(REQUESTS)
    assert torch.equal(editor.tensors()["names"], untouched)
    backbone.generate(list(REQUESTS))
    assert len(backbone.before_pass) == 1
    again = backbone.batch(REQUESTS)
    backbone.logits(again)
    assert torch.equal(editor._names_of(again), untouched)
    editor.undo()
    assert backbone.before_pass == []
