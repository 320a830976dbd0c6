"""WISE: masked memories, reactions and merging against naive versions, and when a memory answers."""

from __future__ import annotations

import pytest
import torch
from conftest import QUERIES, SHAPES, editors_of

from mmedit_cli.errors import HparamsError, MmeditError, StateError
from mmedit_cli.knowledge.methods.wise.editor import Wise
from mmedit_cli.knowledge.methods.wise.hparams import WiseHparams
from mmedit_cli.knowledge.methods.wise.memories import (
    NONE,
    Memory,
    add_memories,
    merged,
    reaction,
    strongest,
    ties,
)
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
    with editors_of(Wise, backbone, "steps=15") as made:
        yield made


def test_the_reaction_is_the_mean_change_of_the_marked_positions():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=source)
    delta = torch.randn(4, 7, generator=source)
    at = torch.rand(3, 5, generator=source) < 0.6
    at[:, 0] = True
    found = reaction(x, delta, at)
    for row in range(3):
        sizes = [
            float((delta.double() @ x[row, t].double()).norm())
            for t in range(5)
            if at[row, t]
        ]
        assert float(found[row]) == pytest.approx(sum(sizes) / len(sizes), rel=1e-5)


def test_merging_trims_elects_and_averages():
    some = torch.tensor([[4.0, -1.0, 3.0, 0.0, 0.1]])
    other = torch.tensor([[-2.0, -5.0, 3.5, 0.0, 0.2]])
    # half of the four entries of each stay: 4 and 3, -5 and 3.5
    assert ties([some, other], 0.5).tolist() == [[4.0, -5.0, 3.25, 0.0, 0.0]]
    # all stay; where the signs differ the larger sum wins
    whole = ties([some, other], 1.0)
    assert torch.allclose(whole, torch.tensor([[4.0, -3.0, 3.25, 0.0, 0.15]]))


def test_a_merged_memory_has_the_least_reaction_of_its_parts():
    mask = torch.tensor([[True, False]])
    one = Memory(torch.tensor([[2.0, 0.0]]), mask, 3.0, 4)
    two = Memory(torch.tensor([[0.0, 1.0]]), ~mask, 2.0, 5)
    both = merged([one, two], 1.0)
    assert both.delta.tolist() == [[2.0, 1.0]]
    assert (both.weakest, both.count) == (2.0, 9)
    assert both.mask.all()


def test_each_memory_is_measured_by_its_own_threshold():
    reactions = torch.tensor([[5.0, 3.0], [5.0, 9.0], [0.5, 0.5], [1.0, 2.0]])
    thresholds = torch.tensor([1.0, 2.0])
    # published: 0.5 of a memory that reacts more, yet not enough, would hide the other
    assert strongest(reactions, thresholds).tolist() == [0, 0, NONE, NONE]
    higher = torch.tensor([10.0, 2.0])
    assert strongest(reactions, higher).tolist() == [1, 1, NONE, NONE]


def test_rows_without_a_memory_keep_every_bit():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=source)
    out = torch.randn(3, 4, 6, generator=source)
    deltas = [torch.randn(6, 5, generator=source) for _ in range(2)]
    chosen = torch.tensor([1, NONE, 0])
    changed = add_memories(x, out, deltas, chosen)
    by_second = out[0] + x[0] @ deltas[1].T
    by_first = out[2] + x[2] @ deltas[0].T
    assert torch.equal(changed[1], out[1])
    torch.testing.assert_close(changed[0], by_second)
    torch.testing.assert_close(changed[2], by_first)
    nobody = torch.tensor([NONE] * 3)
    assert add_memories(x, out, deltas, nobody) is None


@pytest.mark.parametrize("mode", ["retrieve", "merge"])
def test_entries_outside_the_mask_and_the_matrix_itself_are_untouched(
    backbone, make, mode
):
    editor = make("edits_per_memory=1", f"mode={mode}")
    weight = backbone.model.get_parameter(f"{editor._path}.weight")
    before = weight.detach().clone()
    for request in (STAR, CROSS, FACT):
        editor.edit([request])
    assert torch.equal(weight, before)
    counts = [memory.count for memory in editor._memories]
    assert counts == ([1, 1, 1] if mode == "retrieve" else [2, 1])
    for memory in editor._memories:
        assert bool((memory.delta[~memory.mask] == 0).all())
        assert bool((memory.delta[memory.mask] != 0).any())
        assert float(memory.delta.abs().max()) <= 1.0
    newest = editor._memories[-1].mask.float().mean()
    assert 0.15 < float(newest) < 0.25


def test_a_memory_is_divided_by_count_whatever_comes_together(make):
    editor = make("edits_per_memory=2", "steps=1")
    editor.edit([STAR, CROSS, FACT])
    assert [memory.count for memory in editor._memories] == [2, 1]


def test_a_question_that_wakes_no_memory_keeps_every_bit(backbone, make):
    queries = [*QUERIES, FACT]
    batch = backbone.batch(queries)
    with torch.no_grad():
        base = backbone.logits(batch)
    editor = make("act_ratio=0.99")
    editor.edit([STAR])
    hit = editor.affects([*queries, STAR])
    assert hit[-1], "its own question wakes it"
    assert hit.count(False) >= 2
    with torch.no_grad():
        edited = backbone.logits(batch)
    for row, changed in enumerate(hit[:-1]):
        assert torch.equal(edited[row], base[row]) != changed


def test_it_is_decided_once_and_explained_by_its_memory(backbone, make):
    editor = make("edits_per_memory=2", "act_ratio=0.2")
    ids = [editor.edit([request]).ids[0] for request in (STAR, CROSS, FACT)]
    decisions = []
    choose = editor._strongest

    def counting(x, at):
        decisions.append(len(x))
        return choose(x, at)

    editor._strongest = counting
    backbone.generate([STAR, FACT], max_new_tokens=5)
    assert decisions == [2]
    for weights in editor.explain([STAR, CROSS, FACT]):
        assert set(weights) in ({ids[0], ids[1]}, {ids[2]})
        assert sum(weights.values()) == pytest.approx(1)


def test_replay_is_bounded_and_of_the_present_memory(make):
    editor = make("replay=2", "edits_per_memory=3", "steps=1")
    drawn = []
    teach = editor._teach

    def noting(requests, earlier, source):
        drawn.append((len(requests), list(earlier)))
        return teach(requests, earlier, source)

    editor._teach = noting
    for request in (STAR, CROSS, FACT, STAR):
        editor.edit([request])
    assert [len(earlier) for _, earlier in drawn] == [0, 1, 2, 0]
    assert set(drawn[2][1]) == {STAR, CROSS}


def test_what_makes_no_sense_is_refused(backbone, make):
    with pytest.raises(HparamsError, match="layer 9: tiny-llava has the layers 0 to 5"):
        make("layer=9")
    for values, message in (
        ({"steps": 0}, "steps must be above 0"),
        ({"mask_ratio": 0.0}, "mask_ratio must lie between 0 and 1"),
        ({"replay": -1}, "replay must not be below 0"),
        ({"norm_constraint": 0.0}, "norm_constraint must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            WiseHparams(**values)
    editor = make("steps=1")
    editor.edit([STAR])
    with pytest.raises(MmeditError, match="ask the backbone"):
        backbone.model.get_submodule(editor._path)(torch.zeros(1, 2, editor._shape[1]))
    tensors, metadata = editor.state()
    with pytest.raises(StateError, match="does not hold the memories of 1 edits"):
        editor.load_state({"count": tensors["count"]}, metadata)


def test_adam_moves_the_entries_of_the_mask_by_its_rate_in_the_first_step(make):
    """As Adam does whatever the size of a gradient; plain descent moves them by the gradient."""
    moved = {}
    for optimizer in ("adam", "sgd"):
        overrides = (f"optimizer={optimizer}", "learning_rate=0.01", "steps=1")
        editor = make(*overrides)
        editor.edit([STAR])
        memory = editor._memories[0]
        change = memory.delta[memory.mask].abs()
        moved[optimizer] = change[change > 0]
        editor.undo()
    assert float(moved["adam"].median()) == pytest.approx(0.01, rel=0.02)
    assert float(moved["adam"].max()) <= 0.0101
    assert moved["sgd"].max() > 2 * moved["sgd"].min()
