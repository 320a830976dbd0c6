"""serac: what its scope sees, what the counterfactual model copies, and training with hard negatives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import QUERIES, SHAPES

from mmedit_cli import registry
from mmedit_cli.errors import DataError, MmeditError, StateError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.methods.serac.editor import Serac
from mmedit_cli.knowledge.methods.serac.hparams import SeracHparams, SeracTraining
from mmedit_cli.knowledge.methods.serac.networks import Counterfactual
from mmedit_cli.knowledge.methods.serac.training import losses_of
from mmedit_cli.knowledge.methods.shared.scope import codes
from mmedit_cli.knowledge.methods.shared.scope_training import (
    Asked,
    Pairs,
    choose,
    composed_questions,
)
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.training_loop import train_networks
from mmedit_cli.records import Run
from mmedit_cli.runtime import generator
from mmedit_cli.types import EditCase, Query

REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png"),
    Query("What is the capital of Peru?", "Cusco"),
)
CASES = read_data(SHAPES).cases
MADE = []


@pytest.fixture(scope="module")
def model():
    return load_backbone("tiny-llava", device="cpu")


@pytest.fixture(autouse=True)
def _taken_back():
    """A test that fails leaves the shared model as it was."""
    yield
    while MADE:
        MADE.pop().undo()


def make(backbone, *overrides):
    path = registry.hparams_file("serac")
    variant = backbone.name
    hparams = load_hparams(path, SeracHparams, variant=variant, overrides=overrides)
    MADE.append(Serac(backbone, hparams))
    return MADE[-1]


def logits(backbone, queries):
    with torch.no_grad():
        return [backbone.logits(backbone.batch([query])) for query in queries]


# -- the scope ----------------------------------------------------------------------------------------------------


def code_of(editor, *queries):
    backbone = editor.backbone
    with torch.no_grad():
        return codes(editor.networks.scope, backbone, backbone.batch(queries))


def test_the_answer_never_reaches_the_scope(model):
    editor = make(model)
    long = replace(REQUESTS[0], target="something else altogether")
    assert torch.equal(code_of(editor, REQUESTS[0]), code_of(editor, long))
    left = model.batch([REQUESTS[0]], with_answer=False, left_pad=True)
    bare = codes(editor.networks.scope, model, left)
    torch.testing.assert_close(code_of(editor, REQUESTS[0]), bare)


def test_a_code_needs_no_company(model):
    editor = make(model)
    together = code_of(editor, *REQUESTS)
    for row, request in zip(together, REQUESTS, strict=True):
        torch.testing.assert_close(row, code_of(editor, request)[0])


def test_the_score_is_an_offset_less_the_distances(model):
    scope = make(model).networks.scope
    values = 10 * scope.tenths.detach()
    request = REQUESTS[0]
    others = (
        replace(request, prompt="Which colour is it?"),
        replace(request, image=REQUESTS[1].image),
        replace(request, image=None),
    )
    known = code_of(MADE[-1], request)
    score = scope(code_of(MADE[-1], request, *others), known)[:, 0]
    assert score[0].item() == pytest.approx(values[-1].item(), abs=1e-4)
    assert (score[1:] < score[0] - 1e-4).all(), "picture and prompt both count"
    assert score[3] < -1000, "a fact about a picture never answers a text"
    asked, kept = (
        torch.split(c, scope.parts, 1) for c in (code_of(MADE[-1], others[0]), known)
    )
    naive = values[-1].clone()
    for i in (0, 2, 3):
        naive -= values[i].exp() * (1 - F.cosine_similarity(asked[i], kept[i])[0])
    assert score[1].item() == pytest.approx(naive.item(), abs=1e-3)


def test_an_empty_memory_and_what_no_edit_is_about_are_the_base_model(model):
    everything = (*QUERIES, *REQUESTS)
    base = logits(model, everything)
    said = model.generate(everything, max_new_tokens=4)
    editor = make(model, "threshold=1000")
    for operation in ([], REQUESTS):
        editor.edit(operation)
        for before, after in zip(base, logits(model, everything), strict=True):
            assert torch.equal(before, after)
        assert model.generate(everything, max_new_tokens=4) == said
        assert editor.affects(everything) == [False] * len(everything)


def test_rows_are_routed_one_by_one(model):
    """In a batch the rows that no edit is about keep their bits; one edit answers each of the others."""
    editor = make(model)
    queries = (Query("The sun is", "a shape"), *REQUESTS)
    batch = model.batch(queries)
    with torch.no_grad():
        base = model.logits(batch)
        ids = editor.edit(REQUESTS).ids
        edited = model.logits(batch)
    assert editor.routes(queries) == [None, *ids]
    assert editor.explain(queries)[1:] == [{i: 1.0} for i in ids]
    assert torch.equal(edited[0], base[0])
    ends = [int(batch.prompt_mask[row].nonzero().max()) for row in range(4)]
    for row in (1, 2, 3):
        assert torch.equal(edited[row, : ends[row]], base[row, : ends[row]])
        assert not torch.equal(edited[row, ends[row]], base[row, ends[row]])
        alone = logits(model, [queries[row]])[0][0]
        torch.testing.assert_close(
            edited[row, : len(alone)], alone, atol=1e-4, rtol=1e-4
        )


def test_a_question_is_routed_once(model, monkeypatch):
    """Tokens that are generated keep what their question was sent to."""
    editor = make(model)
    editor.edit(REQUESTS)
    calls = []
    about = editor._about

    def counted(batch):
        calls.append(len(batch.queries))
        return about(batch)

    monkeypatch.setattr(editor, "_about", counted)
    model.generate(REQUESTS, max_new_tokens=5)
    assert calls == [3]
    with pytest.raises(MmeditError, match="ask the backbone"):
        model.model.get_submodule(model.anchors.tail[0])(torch.zeros(1, 2, model.width))


def test_an_edit_that_repeats_another_hides_it(model):
    editor = make(model)
    first = editor.edit(REQUESTS[:1])
    again = editor.edit([replace(REQUESTS[0], target="green")])
    assert editor.routes(REQUESTS[:1]) == list(again.ids)
    editor.undo(again.ids)
    assert editor.routes(REQUESTS[:1]) == list(first.ids)


def test_edits_do_not_depend_on_each_other(model):
    editor = make(model)
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
    with pytest.raises(DataError, match="serac keeps 3") as caught:
        editor.edit([replace(REQUESTS[0], target="one two three four five")])
    assert "answer_tokens=" in caught.value.hint
    editor.edit([REQUESTS[1]])
    with pytest.raises(StateError, match="1 edits of this serac"):
        make(model, "answer_tokens=3")._load_tensors({}, REQUESTS[:1])


# -- the counterfactual model -------------------------------------------------------------------------------------


def test_what_is_alike_is_copied_from_the_start():
    torch.manual_seed(0)
    network = Counterfactual(32, 64)
    keys, words = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    used = torch.tensor([[True, True, True, False]])
    states = 5 * keys[:, :3]  # a state in a direction that is known
    with torch.no_grad():
        network.query.weight.mul_(30)
        network.key.weight.mul_(30)
        moved = network(states, keys, words, used) - states
    nearest = F.normalize(moved[0], dim=-1) @ F.normalize(words[0], dim=-1).T
    assert nearest.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(moved.norm(dim=-1), 2 * states.norm(dim=-1))


def test_what_is_not_used_counts_for_nothing():
    torch.manual_seed(0)
    network = Counterfactual(32, 16)
    keys, words = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    used = torch.tensor([[True, True, False, False]] * 2)
    states = torch.randn(2, 3, 32)
    whole = network(states, keys, words, used)
    padded = network(states, keys[:, :2], words[:, :2], used[:, :2])
    torch.testing.assert_close(whole, padded)


# -- training -----------------------------------------------------------------------------------------------------


def test_every_column_is_asked_and_what_must_stay_comes_last():
    asked = choose(CASES[:3], generator(0))
    firsts = asked.is_about.index(False)
    assert all(asked.is_about[:firsts])
    assert not any(asked.is_about[firsts:])
    columns = sum(
        1
        for case in CASES[:3]
        for name, queries in case.columns()
        if queries and not name.startswith(("portability", "needs"))
    )
    assert len(asked.queries) == columns


def test_pairs_against_loops():
    cases = [
        EditCase(str(i), REQUESTS[i % 2], concept=concept)
        for i, concept in enumerate(("a", "b", "a"))
    ]
    asked = Asked([REQUESTS[0]] * 3, [0, 1, 1], [True, True, False])
    pairs = Pairs.of(asked, cases)
    assert pairs.right.tolist() == [0, 1, 3]
    assert pairs.unknown.tolist() == [[False, False, True]] + [[False] * 3] * 2
    score = torch.randn(3, 3, generator=generator(1))
    none = torch.zeros(1)
    terms = [
        -torch.cat((score[0, :2], none)).log_softmax(0)[0],
        -torch.cat((score[1], none)).log_softmax(0)[1],
        -torch.cat((score[2], none)).log_softmax(0)[3],
    ]
    torch.testing.assert_close(pairs.loss(score, "choice"), torch.stack(terms).mean())
    right = -torch.stack((score[0, 0], score[1, 1])).sigmoid().log().mean()
    apart = (score[0, 1], score[1, 0], score[1, 2], *score[2])
    wrong = -(1 - torch.stack(apart).sigmoid()).log().mean()
    torch.testing.assert_close(pairs.loss(score, "binary"), (right + wrong) / 2)


def test_negatives_of_both_kinds_are_composed(model):
    """The question of one case about the picture of another: no edit is about it, unless both are of one sort."""
    editor = make(model)
    scope = editor.networks.scope
    sorts = ("name", "colour")
    cases = [EditCase(str(i), REQUESTS[i], type=sort) for i, sort in enumerate(sorts)]
    known = code_of(editor, *REQUESTS[:2])
    _, pairs = composed_questions(scope, known, cases, 2, generator(0))
    assert pairs.right.tolist() == [2, 2]
    alike = [replace(case, type="name") for case in cases]
    _, pairs = composed_questions(scope, known, alike, 2, generator(0))
    assert sorted(pairs.right.tolist()) == [0, 1]
    unnamed = [replace(case, type="") for case in cases]
    assert composed_questions(scope, known, unnamed, 2, generator(0)) is None
    mixed = scope.composed(known[:1], known[1:])
    whole = code_of(editor, replace(REQUESTS[0], image=REQUESTS[1].image))
    torch.testing.assert_close(mixed, whole)


@pytest.mark.parametrize("kind", ["choice", "binary"])
def test_every_loss_reaches_its_own_network(model, kind):
    editor = make(model, f"training.scope_loss={kind}")
    editor.networks.requires_grad_(True)
    losses = losses_of(
        editor.networks, model, editor.hparams, CASES[:3], CASES[3:5], generator(0)
    )
    assert {"scope", "answers"} <= set(losses)
    for name, network in (("scope", "scope"), ("answers", "counterfactual")):
        wanted = [
            parameter
            for key, parameter in editor.networks.named_parameters()
            if key.startswith(network)
        ]
        found = torch.autograd.grad(
            losses[name], wanted, allow_unused=True, retain_graph=True
        )
        assert any(gradient is not None and gradient.any() for gradient in found)


@pytest.mark.slow
def test_the_threshold_is_chosen_on_held_out_cases(model, tmp_path):
    editor = make(
        model,
        "training.steps=2",
        "training.batch_size=4",
        "training.validate_every=2",
        "training.others=2",
        "training.validation_edits=6",
    )
    with Run.open(tmp_path / "run", {"run": "same"}, {}) as run:
        report = train_networks(editor, CASES[:8], CASES[8:11], run)
    assert set(report["calibrated"]) == {"threshold"}
    assert report["calibrated"]["threshold"] in editor.calibrated["threshold"]


def test_bad_values_are_explained():
    for wrong in ({"prompt_dim": 0}, {"answer_tokens": 0}, {"answer_dim": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SeracHparams(**wrong)
    for wrong in ({"steps": 0}, {"patience": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SeracTraining(**wrong)
