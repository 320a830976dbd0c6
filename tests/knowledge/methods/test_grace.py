"""GRACE: radii and the search against naive versions, what is outside all radii, one decision a question."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import QUERIES, SHAPES, editors_of

from mmedit_cli.errors import HparamsError, MmeditError, StateError
from mmedit_cli.knowledge.methods.grace.codebook import NONE, Choice, Codebook
from mmedit_cli.knowledge.methods.grace.editor import Grace
from mmedit_cli.knowledge.methods.grace.hparams import GraceHparams
from mmedit_cli.knowledge.methods.shared.unrelated import unrelated
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.types import Query

STAR = Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png")
CROSS = Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png")
FACT = Query("The capital of France is", "Rome")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-llava", device="cpu")


@pytest.fixture
def make(backbone):
    with editors_of(Grace, backbone, "steps=20") as made:
        yield made


def rows_of(keys, radius):
    keys = torch.tensor(keys)
    return {
        "key": keys,
        "value": keys + 1,
        "start": torch.full((len(keys),), radius),
    }


def naive_radii(keys, starts, labels):
    """For each key its starting radius, or half way to a key with another answer, pair by pair."""
    radii = []
    for i, key in enumerate(keys):
        radius = starts[i]
        for j, other in enumerate(keys):
            if labels[i] != labels[j]:
                radius = min(radius, float((key - other).norm()) / 2)
        radii.append(radius)
    return radii


@pytest.mark.parametrize("together", [True, False], ids=["at once", "one by one"])
def test_radii_are_those_of_every_pair(together):
    source = torch.Generator().manual_seed(0)
    keys = torch.randn(40, 6, generator=source, dtype=torch.float64)
    starts = torch.rand(40, generator=source, dtype=torch.float64) * 3
    labels = [(int(i),) for i in torch.randint(4, (40,), generator=source)]
    codebook = Codebook(split=True)
    rows = {"key": keys, "value": keys, "start": starts}
    size = 40 if together else 1
    for at in range(0, 40, size):
        part = slice(at, at + size)
        codebook.insert({n: t[part] for n, t in rows.items()}, labels[part])
    expected = naive_radii(keys, starts.tolist(), labels)
    assert codebook.radii.tolist() == pytest.approx(expected, abs=1e-12)
    assert codebook.radii.dtype == torch.float64


def test_the_search_finds_the_nearest_key_within_reach():
    source = torch.Generator().manual_seed(1)
    keys = torch.randn(30, 4, generator=source, dtype=torch.float64)
    codebook = Codebook(split=False)
    starts = torch.rand(30, generator=source, dtype=torch.float64) * 2
    codebook.insert({"key": keys, "value": keys, "start": starts}, [(0,)] * 30)
    asked = torch.randn(200, 4, generator=source, dtype=torch.float64)
    expected = []
    for question in asked:
        apart = [float((question - key).norm()) for key in keys]
        inside = [i for i, d in enumerate(apart) if d <= starts[i]]
        expected.append(min(inside, key=lambda i: apart[i]) if inside else NONE)
    assert NONE in expected
    assert len(set(expected)) > 5
    assert codebook.search(asked).tolist() == expected


def test_edits_with_other_answers_share_the_way_between_them():
    codebook = Codebook(split=True)
    codebook.insert(rows_of([[0.0], [3.0], [100.0]], 2.0), [(1,), (2,), (1,)])
    assert codebook.radii.tolist() == [1.5, 1.5, 2.0]
    same = Codebook(split=True)
    same.insert(rows_of([[0.0], [3.0]], 2.0), [(1,), (1,)])
    assert same.radii.tolist() == [2.0, 2.0]
    fixed = Codebook(split=False)
    fixed.insert(rows_of([[0.0], [3.0]], 2.0), [(1,), (2,)])
    assert fixed.radii.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("split", [True, False])
def test_of_two_answers_to_one_question_the_newer_counts(split):
    codebook = Codebook(split=split)
    codebook.insert(rows_of([[5.0]], 1.0), [(1,)])
    codebook.insert(rows_of([[5.0]], 1.0), [(2,)])
    assert codebook.hidden.tolist() == [True, False]
    assert codebook.search(torch.tensor([[5.0], [5.5], [9.0]])).tolist() == [1, 1, NONE]


def test_the_value_stands_from_the_end_of_the_question_on():
    leaving = torch.arange(12.0).reshape(2, 6, 1)
    values = torch.tensor([[-1.0], [-2.0]])
    choice = Choice(torch.tensor([1, NONE]), torch.tensor([3, 2]), 6)
    replaced = choice.replace(leaving, values)
    assert replaced[0, :, 0].tolist() == [0, 1, 2, -2, -2, -2]
    assert torch.equal(replaced[1], leaving[1])
    generated = choice.replace(leaving[:, :1], values)
    assert generated[:, 0, 0].tolist() == [-2, 6]
    nobody = Choice(torch.tensor([NONE, NONE]), torch.tensor([3, 2]), 6)
    assert nobody.replace(leaving, values) is None


@pytest.mark.parametrize("form", ["fixed", "split", "balanced"])
def test_a_question_outside_all_radii_keeps_every_bit(backbone, make, form):
    queries = [*QUERIES, FACT, replace(FACT, prompt="The capital of Spain is")]
    batch = backbone.batch(queries)
    with torch.no_grad():
        base = backbone.logits(batch)
    said = backbone.generate(queries, max_new_tokens=4)
    editor = make(f"radius={form}", "reach=0.01", "balance=1.0")
    editor._around.balanced = lambda _requests, keys, **_: torch.full(
        (len(keys),), 0.01
    )
    editor.edit([STAR, FACT])
    hit = editor.affects(queries)
    assert hit.count(True) >= 1, "the edits' own questions are among them"
    assert hit.count(False) >= 2
    with torch.no_grad():
        edited = backbone.logits(batch)
    after = backbone.generate(queries, max_new_tokens=4)
    for row, changed in enumerate(hit):
        assert torch.equal(edited[row], base[row]) != changed
        assert changed or after[row] == said[row]


def test_it_is_decided_once_and_holds_through_generation(backbone, make):
    editor = make("reach=0.05")
    base = backbone.generate([CROSS], max_new_tokens=6)
    with editor.edit([STAR, FACT]):
        searches = []
        search = editor._codebook.search

        def counting(keys):
            searches.append(len(keys))
            return search(keys)

        editor._codebook.search = counting
        answers = backbone.generate([STAR, FACT, CROSS], max_new_tokens=6)
        assert searches == [3], "once for all three, whatever is generated"
        assert editor._decision.latest[1].chosen.tolist() == [0, 1, NONE]
        assert answers[2:] == base
        assert editor.routes([STAR, FACT]) == [1, 2]
        assert editor.explain([STAR, FACT])[1] == {2: 1.0}


def test_each_row_has_a_key_of_its_own(make):
    """Whatever the other rows of a batch are, and however long."""
    editor = make()
    longer = replace(CROSS, prompt="Say which colour it is, and say it in one word:")
    together = editor._keys_of([STAR, longer, FACT])
    alone = torch.cat([editor._keys_of([query]) for query in (STAR, longer, FACT)])
    torch.testing.assert_close(together, alone)
    other_answer = editor._keys_of(
        [replace(STAR, target="something else, much longer")]
    )
    torch.testing.assert_close(other_answer[0], together[0])


def test_edits_that_are_learned_together_are_those_learned_alone(make):
    editor = make("steps=8", "stop_loss=null")
    editor.edit([STAR, CROSS, FACT])
    together = {name: tensor.clone() for name, tensor in editor.tensors().items()}
    editor.undo()
    for row, request in enumerate((STAR, CROSS, FACT)):
        alone = make("steps=8", "stop_loss=null")
        alone.edit([request])
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(
                tensor[0], together[name][row], rtol=1e-3, atol=1e-4
            )
        alone.undo()


def test_the_reach_is_a_share_of_the_spread_of_unrelated_questions(make):
    editor = make("reach=0.25")
    keys = editor._keys_of(unrelated()).double()
    apart = [
        float((one - other).norm()) for i, one in enumerate(keys) for other in keys[:i]
    ]
    median = sorted(apart)[(len(apart) - 1) // 2]
    editor.edit([STAR])
    assert editor.tensors()["start"].item() == pytest.approx(0.25 * median, rel=1e-5)


def test_a_balanced_radius_lies_between_rewording_and_empty_picture(make):
    radii = {}
    for balance in (0.0, 0.25, 1.0):
        editor = make("radius=balanced", f"balance={balance}", "steps=1")
        editor.edit([STAR, FACT])
        radii[balance] = editor.tensors()["start"]
        editor.undo()
    torch.testing.assert_close(radii[0.25], 0.75 * radii[0.0] + 0.25 * radii[1.0])
    keys = editor._keys_of([STAR, FACT])
    reworded = [
        replace(STAR, prompt=w.replace("{}", STAR.prompt))
        for w in editor.hparams.rewordings
    ]
    farthest = (editor._keys_of(reworded) - keys[0]).norm(dim=1).max()
    assert radii[1.0][0].item() == pytest.approx(farthest.item(), rel=1e-4)
    nearest = (editor._keys_of(unrelated()) - keys[1]).norm(dim=1).min()
    assert radii[0.0][1].item() == pytest.approx(nearest.item(), rel=1e-4)


def test_what_makes_no_sense_is_refused(backbone, make):
    with pytest.raises(HparamsError, match="layer 9: tiny-llava has the layers 0 to 5"):
        make("layer=9")
    for values, message in (
        ({"reach": 0}, "reach must be above 0"),
        ({"balance": 2}, "balance must lie between 0 and 1"),
        ({"rewordings": ("again",)}, "'again' needs {} once"),
        ({"radius": "balanced"}, "needs rewordings"),
    ):
        with pytest.raises(ValueError, match=message):
            GraceHparams(**values)
    editor = make("steps=1")
    editor.edit([STAR])
    with pytest.raises(MmeditError, match="ask the backbone"):
        backbone.anchors.module("ffn_in", 3)(torch.zeros(1, 4, backbone.width))
    tensors, metadata = editor.state()
    with pytest.raises(StateError, match="does not hold keys and values of width 48"):
        editor.load_state({"key": tensors["key"]}, metadata)
