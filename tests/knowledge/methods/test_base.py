"""What the base class of editors does by itself: ids, their randomness, undo by making again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mmedit_cli.errors import StateError
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.ft import FtHparams
from mmedit_cli.types import Query

REQUESTS = [Query("What is this?", target) for target in ("a", "b", "c", "d")]


class Writing(Editor):
    """Writes down what it is asked to make, and with which seed; fails for a target that is named in `failing`."""

    name, Hparams, first_layer = "writing", dict, None
    failing = ""

    def __init__(self, *, seed=0):
        super().__init__(SimpleNamespace(n_layers=1), FtHparams(), seed=seed)
        self.made = []

    def _apply(self, requests, source):
        targets = "".join(request.target for request in requests)
        self.made.append((targets, source.initial_seed()))
        if self.failing and self.failing in targets:
            raise ZeroDivisionError
        return {"count": len(requests)}

    def _reset(self):
        self.made.clear()

    def _tensors(self):
        return {}

    def _load_tensors(self, tensors, requests):
        raise NotImplementedError


@pytest.fixture
def editor():
    made = Writing(seed=2)
    made.edit(REQUESTS[:1])
    made.edit(REQUESTS[1:3])
    made.edit(REQUESTS[3:])
    return made


def test_every_edit_has_the_randomness_of_its_id(editor):
    seeds = [2 * 1_000_003 + first for first in (1, 2, 4)]
    assert editor.made == [("a", seeds[0]), ("bc", seeds[1]), ("d", seeds[2])]
    assert [operation.ids for operation in editor.operations] == [(1,), (2, 3), (4,)]


def test_what_is_made_again_has_the_randomness_it_had(editor):
    made = list(editor.made)
    editor.undo([1])
    assert editor.made == made[1:]
    editor.undo([2])
    assert editor.made == [("c", made[1][1] + 1), made[2]]
    assert editor.edit(REQUESTS[:1]).ids == (5,), "an id is never given twice"


def test_a_failed_edit_makes_the_earlier_ones_again(editor):
    made, operations = list(editor.made), list(editor.operations)
    editor.failing = "x"
    with pytest.raises(ZeroDivisionError):
        editor.edit([Query("What is this?", "x")])
    assert editor.made == made
    assert editor.operations == operations
    assert editor.edit(REQUESTS[:1]).ids == (5,), "the failed one had no id"


def test_an_edit_that_is_not_there_cannot_be_undone(editor):
    with pytest.raises(StateError, match="no edit 9 to undo"):
        editor.undo([1, 9])
    assert len(editor.made) == 3


def test_a_replay_goes_on_behind_the_highest_id(editor):
    operations = editor.operations[1:]
    fresh = Writing(seed=2)
    fresh.replay(operations)
    assert [operation.ids for operation in fresh.operations] == [(2, 3), (4,)]
    assert fresh.edit(REQUESTS[:1]).ids == (5,)
