"""Who says whether a picture was edited as asked: right for the goals, and for nothing else."""

from __future__ import annotations

import pytest

from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.picture_editing.data.opening import open_pairs
from mmedit_cli.picture_editing.evaluation.judge import Judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(load_backbone("mini-blip2", device="cpu"))


@pytest.fixture(scope="module")
def pairs() -> dict[str, list]:
    found: dict[str, list] = {}
    for pair in open_pairs("emojikb-edits:eval")[1]:
        found.setdefault(pair.kind, []).append(pair)
    return found


@pytest.mark.parametrize(
    "kind", ["background", "opposite-background", "style", "another-artist"]
)
def test_goals_are_recognised_and_sources_are_not(judge, pairs, kind):
    some = pairs[kind][:16]
    goals = judge.reached([pair.target() for pair in some], some)
    sources = judge.reached([pair.source() for pair in some], some)
    assert sum(value is not None for value in goals) >= 9
    assert {value for value in goals if value is not None} == {100.0}
    assert sources.count(100.0) <= (1 if "artist" in kind or kind == "style" else 0), (
        "who drew it is told by looks"
    )
    assert [value is None for value in goals] == [value is None for value in sources]


def test_names_are_read(judge, pairs):
    some = pairs["replace"][:20]
    goals = judge.reached([pair.target() for pair in some], some)
    sources = judge.reached([pair.source() for pair in some], some)
    assert sum(value == 100 for value in goals) >= 12
    assert sum(value == 100 for value in sources) == 0


def test_what_nothing_tells_has_no_value(judge, pairs):
    some = [pairs["mirror"][0], pairs["background"][0], pairs["bigger"][0]]
    found = judge.reached([pair.target() for pair in some], some)
    assert [value is None for value in found] == [True, not some[1].question, True]
    assert judge.reached([], []) == []
