"""recipe: where soft tokens stand, which questions get them, and what the networks learn from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import QUERIES, SHAPES

from mmedit_cli import registry
from mmedit_cli.errors import DataError, HparamsError, MmeditError, StateError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.methods.recipe import training as recipe_training
from mmedit_cli.knowledge.methods.recipe.editor import Recipe
from mmedit_cli.knowledge.methods.recipe.edits import make as make_edits
from mmedit_cli.knowledge.methods.recipe.hparams import RecipeHparams, RecipeTraining
from mmedit_cli.knowledge.methods.recipe.prompts import SoftPrompts
from mmedit_cli.knowledge.methods.recipe.training import choose, hinged
from mmedit_cli.knowledge.methods.shared.question_features import question_features
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.runtime import generator
from mmedit_cli.types import EditCase, Query

REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png"),
    Query("What is the capital of Peru?", "Cusco"),
)
CASES = read_data(SHAPES).cases
MADE = []


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-blip2"])
def model(request):
    return load_backbone(request.param, device="cpu")


@pytest.fixture(autouse=True)
def _taken_back():
    """A test that fails leaves the shared model as it was."""
    yield
    while MADE:
        MADE.pop().undo()


def make(backbone, *overrides):
    path = registry.hparams_file("recipe")
    hparams = load_hparams(
        path, RecipeHparams, variant=backbone.name, overrides=overrides
    )
    MADE.append(Recipe(backbone, hparams))
    return MADE[-1]


def logits(backbone, query):
    with torch.no_grad():
        return backbone.logits(backbone.batch([query]))


ALWAYS, NEVER = "margin=-1000", "margin=1000"

# -- where soft tokens stand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_pad", [False, True])
def test_soft_tokens_stand_between_picture_and_question(model, left_pad):
    prompts = SoftPrompts(model, 3)
    queries = [REQUESTS[2], replace(REQUESTS[0], prompt="<pad> What is this thing?")]
    marked = [prompts.marked(query) for query in queries]
    batch = model.batch(marked, left_pad=left_pad)
    places = prompts.places(batch)
    assert places.sum(1).tolist() == [3, 3], "a mark that the user wrote stays text"
    for row, query in enumerate(queries):
        at = places[row].nonzero()[:, 0]
        assert at.tolist() == list(range(int(at[0]), int(at[0]) + 3))
        plain = model.encode(query).ids
        ids = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        start = int(at[0]) - (batch.input_ids.shape[1] - len(ids)) * left_pad
        assert ids[:start] + ids[start + 3 :] == plain
    in_picture = batch.image_mask[1].nonzero()[:, 0]
    assert int(places[1].nonzero()[0]) > int(in_picture[-1])


def test_they_are_added_to_what_is_there_and_nothing_else_changes(model):
    prompts = SoftPrompts(model, 2)
    batch = model.batch([prompts.marked(query) for query in REQUESTS])
    hidden = torch.randn(*batch.input_ids.shape, model.width)
    soft = torch.randn(2, 2, model.width)
    put = prompts.put(hidden, batch, [0, 2], soft)
    where = prompts.places(batch)
    where[1] = False
    assert torch.equal(put[~where], hidden[~where])
    torch.testing.assert_close(put[where], hidden[where] + soft.flatten(0, 1))
    with pytest.raises(MmeditError, match="not marked"):
        prompts.put(hidden, model.batch(REQUESTS), [0], soft[:1])


def test_a_model_that_does_not_read_the_marks_is_refused(model, monkeypatch):
    plain = model.encode(REQUESTS[2])
    monkeypatch.setattr(model, "encode", lambda _query: plain)
    with pytest.raises(HparamsError, match="does not read 3 padding tokens"):
        SoftPrompts(model, 3)


# -- which questions get them -----------------------------------------------------------------------------------------


def test_the_answer_never_reaches_the_router(model):
    long = replace(REQUESTS[0], target="something else altogether")
    found = question_features(model, model.batch([REQUESTS[0], REQUESTS[2]]))
    other = question_features(model, model.batch([long, REQUESTS[2]], left_pad=True))
    torch.testing.assert_close(found.words, other.words)
    torch.testing.assert_close(found.pictures, other.pictures)
    assert found.sees.tolist() == [True, False]


def test_what_no_edit_is_about_is_the_base_model(model):
    everything = (*QUERIES, *REQUESTS)
    base = [logits(model, query) for query in everything]
    said = model.generate(everything, max_new_tokens=4)
    editor = make(model, NEVER)
    for operation in ([], REQUESTS):
        editor.edit(operation)
        assert editor.routes(everything) == [None] * len(everything)
        for before, query in zip(base, everything, strict=True):
            assert torch.equal(before, logits(model, query))
        assert model.generate(everything, max_new_tokens=4) == said


def test_a_text_is_never_sent_to_a_picture(model):
    editor = make(model, ALWAYS)
    editor.edit(REQUESTS[:2])
    blind = replace(REQUESTS[0], image=None)
    assert editor.routes([REQUESTS[0], blind])[1] is None
    assert editor.affects([blind]) == [False]


def test_a_question_is_decided_once(model, monkeypatch):
    """Its generated tokens, the same question with an answer, and a second look keep the decision."""
    editor = make(model, ALWAYS)
    editor.edit(REQUESTS)
    calls = []
    about = editor._context._decide

    def counted(batch):
        calls.extend(batch.queries)
        return about(batch)

    monkeypatch.setattr(editor._context, "_decide", counted)
    model.generate(REQUESTS, max_new_tokens=5)
    for query in REQUESTS:
        logits(model, query)
    routes = editor.routes(REQUESTS)
    assert sorted(query.prompt for query in calls) == sorted(
        query.prompt for query in REQUESTS
    )
    assert not any(query.target for query in calls)
    assert editor.explain(REQUESTS) == [{i: 1.0} for i in routes]
    editor.edit([replace(REQUESTS[0], prompt="Who is it?")])
    editor.routes(REQUESTS[:1])
    assert len(calls) == 4, "another edit: decided anew"


def test_what_is_generated_begins_as_the_logits_say(model):
    """Left-padded beside a longer question, and alone."""
    editor = make(model, ALWAYS)
    editor.networks.copies.weight.data.mul_(30)
    plain = model.generate(REQUESTS, max_new_tokens=3)
    editor.edit(REQUESTS)
    together = model.generate(REQUESTS, max_new_tokens=3)
    alone = [model.generate([query], max_new_tokens=3)[0] for query in REQUESTS]
    assert together == alone != plain
    for query, text in zip(REQUESTS, alone, strict=True):
        batch = model.batch([query])
        with torch.no_grad():
            first = model.logits(batch)[batch.predicting][0].argmax()
        assert text.startswith(model.decode([int(first)]))


def test_an_edit_that_repeats_another_hides_it(model):
    editor = make(model, ALWAYS)
    first = editor.edit(REQUESTS[:1])
    again = editor.edit([replace(REQUESTS[0], target="green")])
    assert editor.routes(REQUESTS[:1]) == list(again.ids)
    editor.undo(again.ids)
    assert editor.routes(REQUESTS[:1]) == list(first.ids)


def test_edits_do_not_depend_on_each_other(model):
    editor = make(model, ALWAYS)
    ids = [editor.edit([request]).ids[0] for request in REQUESTS]
    editor.undo(ids[1:2])
    kept = editor.state()[0]
    editor.undo()
    editor.edit([REQUESTS[0]])
    editor.edit([REQUESTS[2]])
    for name, tensor in editor.state()[0].items():
        assert torch.equal(kept[name], tensor), name


def test_a_long_answer_is_refused_with_the_way_out(model):
    editor = make(model, "answer_tokens=3")
    with pytest.raises(DataError, match="recipe reads 3") as caught:
        editor.edit([replace(REQUESTS[0], target="one two three four five")])
    assert "answer_tokens=" in caught.value.hint
    editor.edit([REQUESTS[1]])
    with pytest.raises(StateError, match="1 edits of this recipe"):
        make(model)._load_tensors({}, REQUESTS[:1])


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_order_of_an_answer_counts(model):
    editor = make(model)
    requests = [
        replace(REQUESTS[0], target=text) for text in ("blue star", "star blue")
    ]
    made = make_edits(editor.networks, model, requests, 32)
    assert not torch.allclose(made.keys[0], made.keys[1])
    assert not torch.allclose(made.soft[0], made.soft[1])


@pytest.mark.parametrize("hinge", [None, 1.2])
def test_the_hinge_against_a_loop(hinge):
    logits = 2 * torch.randn(20, 5, generator=generator(0))
    right = torch.arange(20) % 5
    total = 0.0
    counted = 0
    for row, own in zip(logits, right.tolist(), strict=True):
        shares = row.softmax(0)
        best = max(share for i, share in enumerate(shares.tolist()) if i != own)
        if hinge is None or shares[own] < hinge * best:
            total -= float(shares[own].log())
            counted += 1
    assert hinge is None or 0 < counted < 20
    assert float(hinged(logits, right, hinge)) == pytest.approx(total / 20, rel=1e-5)


def test_routing_against_loops(model):
    editor = make(model)
    networks = editor.networks
    cases = [
        EditCase(
            str(i), REQUESTS[i % 2], concept=concept, locality={"far": QUERIES[:1]}
        )
        for i, concept in enumerate(("a", "b", "a"))
    ]
    asked = choose(cases, generator(0))
    made = make_edits(networks, model, [case.request for case in cases], 32)
    found = recipe_training._routing(networks, model, asked, cases, made, None)

    def scores(query):
        features = question_features(model, model.batch([query], with_answer=False))
        return networks.scores(features, made.keys, made.sees)[0]

    judged = {0: [0, 1, 3], 1: [0, 1, 2, 3], 2: [1, 2, 3]}  # not others of one thing
    terms = {"own": [], "prototype": [], "none": []}
    for i, _ in enumerate(cases):
        own = [-scores(asked.first[i])[judged[i]].log_softmax(0)[judged[i].index(i)]]
        without = [edit for edit in judged[i] if edit != i]
        terms["own"] += own
        terms["prototype"].append(-scores(asked.second[i])[without].log_softmax(0)[-1])
    for query, case in zip(asked.outside, asked.outside_case, strict=True):
        terms["none"].append(-scores(query)[judged[case]].log_softmax(0)[-1])
    for name, values in terms.items():
        torch.testing.assert_close(found[name], torch.stack(values).mean())


def test_every_loss_reaches_what_it_is_to_teach(model):
    editor = make(model, "training.hinge=null")
    editor.networks.requires_grad_(True)
    losses = editor.losses(CASES[:3], generator(0), others=CASES[3:5])
    assert set(losses) == {"own", "prototype", "none", "answers", "locality", "total"}
    parts = {
        "own": ("query", "key", "asked", "answered", "order"),
        "prototype": ("prototype_words", "query"),
        "none": ("prototype_words", "prototype_picture", "key"),
        "answers": ("transformer", "writes", "copies", "order"),
        "locality": ("writes", "copies"),
    }
    for name, wanted in parts.items():
        named = dict(editor.networks.named_parameters())
        gradients = torch.autograd.grad(
            losses[name], named.values(), allow_unused=True, retain_graph=True
        )
        reached = {
            key.partition(".")[0]
            for key, gradient in zip(named, gradients, strict=True)
            if gradient is not None and gradient.any()
        }
        assert set(wanted) <= reached, name
        assert ("writes" in reached) == (name in ("answers", "locality")), name
    weighted = sum(value for name, value in losses.items() if name != "total")
    torch.testing.assert_close(losses["total"], weighted)


def test_locality_is_kl_from_the_untouched_model(model):
    editor = make(model)
    prompts = SoftPrompts(model, 3)
    soft = torch.randn(1, 3, model.width, generator=generator(0))
    query = CASES[0].locality["far"][0] if "far" in CASES[0].locality else REQUESTS[1]
    loss = recipe_training._locality(model, prompts, [query], soft)
    plain = model.batch([query])
    marked = model.batch([prompts.marked(query)])
    with torch.no_grad():
        base = model.logits(plain)[plain.predicting].log_softmax(-1)
        with prompts.on(marked, [0], soft):
            new = model.logits(marked)[marked.predicting].log_softmax(-1)
    wanted = F.kl_div(new, base, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, wanted)
    assert loss > 0
    assert not editor.operations


def test_bad_values_are_explained():
    for wrong in ({"key_dim": 0}, {"soft_tokens": 0}, {"answer_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RecipeHparams(**wrong)
    for wrong in ({"steps": 0}, {"patience": 0}, {"hinge": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RecipeTraining(**wrong)
