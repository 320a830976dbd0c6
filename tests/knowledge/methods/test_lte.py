"""lte: how a fact is told, where the follower is on, and what it learns from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import QUERIES, SHAPES

from mmedit_cli import registry
from mmedit_cli.errors import StateError, TooLong
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.methods.lte.editor import Lte
from mmedit_cli.knowledge.methods.lte.follower import Follower
from mmedit_cli.knowledge.methods.lte.hparams import LteHparams, LteTraining
from mmedit_cli.knowledge.methods.lte.training import Teaching, answers, locality
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.runtime import generator
from mmedit_cli.types import Query

REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png"),
    Query("What is the capital of Peru?", "Cusco"),
)
CASES = read_data(SHAPES).cases
MADE = []
NEVER = "threshold=1000"


@pytest.fixture(scope="module")
def model():
    return load_backbone("tiny-blip2", device="cpu")


@pytest.fixture(autouse=True)
def _taken_back():
    """A test that fails leaves the shared model as it was."""
    yield
    while MADE:
        MADE.pop().undo()


def make(backbone, *overrides, loud=False):
    """An editor; `loud`: its follower, which is silent before any training, says something."""
    path = registry.hparams_file("lte")
    hparams = load_hparams(path, LteHparams, variant=backbone.name, overrides=overrides)
    editor = Lte(backbone, hparams)
    if loud:
        for number, up in enumerate(editor.networks.follower.ups):
            torch.nn.init.normal_(up, std=0.3, generator=generator(number))
    MADE.append(editor)
    return editor


def logits(backbone, query):
    with torch.no_grad():
        return backbone.logits(backbone.batch([query]))


def test_a_fact_stands_between_the_parts_of_the_template(model):
    editor = make(model, "template='Now: {fact}! Then: {question}?'")
    fact = replace(REQUESTS[0], target="a {question}")
    told = editor._told(fact, REQUESTS[1])
    assert told.prompt == "Now: What is this? a {question}! Then: Which colour is it??"
    assert replace(told, prompt=REQUESTS[1].prompt) == REQUESTS[1]


def test_what_no_edit_is_about_is_the_base_model(model):
    everything = (*QUERIES, *REQUESTS)
    base = [logits(model, query) for query in everything]
    said = model.generate(everything, max_new_tokens=4)
    editor = make(model, NEVER, loud=True)
    for operation in ([], REQUESTS):
        editor.edit(operation)
        assert editor.routes(everything) == [None] * len(everything)
        for before, query in zip(base, everything, strict=True):
            assert torch.equal(before, logits(model, query))
        assert model.generate(everything, max_new_tokens=4) == said


def test_the_follower_is_on_for_its_rows_alone(model):
    """A row of a batch is answered as alone: with its fact and the follower, or as by the base model."""
    stranger = Query("The sun is", "a shape")
    base = logits(model, stranger)[0]
    editor = make(model, loud=True)
    silent = make(model)
    told = [editor._told(request, request) for request in REQUESTS]
    plain = [logits(model, query)[0] for query in told]
    ids = editor.edit(REQUESTS).ids
    queries = (stranger, *REQUESTS)
    assert editor.routes(queries) == [None, *ids]
    assert editor.explain(queries)[1:] == [{i: 1.0} for i in ids]
    with torch.no_grad():
        together = model.logits(model.batch(queries))
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(together[0, : len(base)], base, **close)
    for row, request in enumerate(REQUESTS, 1):
        alone = logits(model, request)[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, **close)
        assert not torch.allclose(alone, plain[row - 1], **close), "it says something"
    editor.undo()
    silent.edit(REQUESTS)
    for row, request in enumerate(REQUESTS):
        torch.testing.assert_close(logits(model, request)[0], plain[row])


def test_what_it_adds_against_a_loop():
    torch.manual_seed(0)
    follower = Follower({"a.b": (6, 5)}, rank=2, alpha=8.0)
    torch.nn.init.normal_(follower.ups[0])
    entering, leaving = torch.randn(3, 4, 6), torch.randn(3, 4, 5)
    found = follower.added(0, entering, leaving, torch.tensor([0, 2]))
    assert torch.equal(found[1], leaving[1])
    for row in (0, 2):
        for token in range(4):
            change = entering[row, token] @ follower.downs[0] @ follower.ups[0]
            wanted = leaving[row, token] + 4.0 * change
            torch.testing.assert_close(found[row, token], wanted)


def test_a_question_is_decided_once_and_answered_alike_alone_and_in_company(
    model, monkeypatch
):
    plain = model.generate(REQUESTS, max_new_tokens=4)
    editor = make(model, loud=True)
    editor.edit(REQUESTS)
    calls = []
    decide = editor._context._decide

    def counted(batch):
        calls.extend(batch.queries)
        return decide(batch)

    monkeypatch.setattr(editor._context, "_decide", counted)
    together = model.generate(REQUESTS, max_new_tokens=4)
    alone = [model.generate([query], max_new_tokens=4)[0] for query in REQUESTS]
    assert together == alone != plain
    assert len(calls) == 3
    assert not any(query.target for query in calls)


def test_the_newest_of_two_facts_about_the_same_is_told(model):
    editor = make(model)
    first = editor.edit(REQUESTS[:1])
    again = editor.edit([replace(REQUESTS[0], target="green")])
    assert editor.routes(REQUESTS[:1]) == list(again.ids)
    assert model.rewrite(REQUESTS[0]).prompt.startswith("What is this? green.")
    editor.undo(again.ids)
    assert editor.routes(REQUESTS[:1]) == list(first.ids)
    assert model.rewrite(REQUESTS[0]).prompt.startswith("What is this? a blue star.")


def test_a_fact_that_cannot_be_read_in_front_is_refused(model):
    editor = make(model)
    with pytest.raises(TooLong):
        editor.edit([replace(REQUESTS[2], target="a word " * model.max_length)])
    assert model.rewrite is None
    with pytest.raises(StateError, match="1 edits of this lte"):
        editor._load_tensors({}, REQUESTS[:1])


# -- training ---------------------------------------------------------------------------------------------------------


def test_every_loss_reaches_its_own_network(model):
    editor = make(model, loud=True)
    editor.networks.requires_grad_(True)
    losses = editor.losses(CASES[:3], generator(0), others=CASES[3:5])
    assert {"scope", "answers", "locality", "total"} <= set(losses)
    named = dict(editor.networks.named_parameters())
    for name, network in (
        ("scope", "scope"),
        ("answers", "follower"),
        ("locality", "follower"),
    ):
        gradients = torch.autograd.grad(
            losses[name], named.values(), allow_unused=True, retain_graph=True
        )
        for key, gradient in zip(named, gradients, strict=True):
            reached = gradient is not None and bool(gradient.any())
            assert not reached or key.startswith(network), (name, key)
            if name != "scope" and key.startswith("follower"):
                assert reached, key
    parts = sum(value for name, value in losses.items() if name != "total")
    torch.testing.assert_close(losses["total"], parts)


def test_answers_and_locality_against_one_question_at_a_time(model):
    editor = make(model, "teach_end=false", loud=True)
    teaching = Teaching(editor.networks, model, editor.hparams, editor._told)
    pairs = [(REQUESTS[0], REQUESTS[1]), (REQUESTS[2], QUERIES[0])]
    sums, divergences = [], []
    for fact, query in pairs:
        told = model.batch([editor._told(fact, query)])
        plain = model.batch([query])
        with torch.no_grad():
            base = model.logits(plain)[plain.predicting].log_softmax(-1)
            with editor.networks.follower.on(model.model, torch.tensor([0])):
                new = model.logits(told)[told.predicting].log_softmax(-1)
        sums += list(-new.gather(1, told.answers[:, None])[:, 0])
        each = F.kl_div(new, base, log_target=True, reduction="none").sum(-1)
        divergences += list(each)
    with torch.no_grad():
        found = answers(teaching, pairs)
        moved = locality(teaching, pairs)
    torch.testing.assert_close(found, torch.stack(sums).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        moved, torch.stack(divergences).mean(), atol=1e-4, rtol=1e-4
    )


def test_bad_values_are_explained():
    for wrong in (
        {"rank": 0},
        {"roles": ()},
        {"template": "{question} {fact}"},
        {"template": "{fact}"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LteHparams(**wrong)
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"patience": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LteTraining(**wrong)
