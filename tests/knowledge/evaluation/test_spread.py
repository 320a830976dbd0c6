"""Several runs as one: orders of the cases, lines of all runs, and how their means differ."""

from __future__ import annotations

import pytest

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.evaluation.intervals import score_with_interval
from mmedit_cli.knowledge.evaluation.report import build_report
from mmedit_cli.knowledge.evaluation.spread import (
    orders_of,
    over_runs,
    together,
    with_spread,
)


def test_orders_are_different_and_do_not_depend_on_how_many():
    orders = orders_of(24, 5)
    assert orders[0] == list(range(24))
    assert all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert orders_of(24, 3) == orders[:3]
    assert len({tuple(order) for order in orders_of(3, 6)}) == 6


@pytest.mark.parametrize(
    ("count", "orders", "message"),
    [
        (3, 0, "at least 1"),
        (3, 7, "of 3 cases there are 6"),
        (1, 2, "of 1 cases there are 1"),
    ],
)
def test_orders_that_there_are_not(count, orders, message):
    with pytest.raises(UserError, match=message):
        orders_of(count, orders)


def test_the_spread_by_hand():
    assert over_runs([0.5, 0.75, 1.0]) == {
        "means": [0.5, 0.75, 1.0],
        "mean": 0.75,
        "sd": 0.25,
        "min": 0.5,
        "max": 1.0,
    }
    assert over_runs([None, 0.5]) == {
        "means": [None, 0.5],
        "mean": 0.5,
        "sd": None,
        "min": 0.5,
        "max": 0.5,
    }
    nothing = over_runs([None, None])
    assert [nothing[key] for key in ("mean", "sd", "min", "max")] == [None] * 4


def lines(*scores: float, group: int = 0) -> list[dict]:
    return [
        {
            "group": group,
            "edits": len(scores),
            "index": i,
            "case": str(i),
            "scores": {"ar": {"reliability": score}},
            "base": {"ar": {"reliability": 0.0}},
        }
        for i, score in enumerate(scores)
    ]


EDITS = [{"group": 0, "index": 0, "seconds": 1.0}]


def test_all_runs_are_pooled_and_each_is_told_apart():
    """Runs of two groups of two edits; the second run has every score of the first, and one more."""
    first = [*lines(1, 0), *lines(0, 0, group=1)]
    second = [*lines(1, 1), *lines(0, 0, group=1)]
    pooled = together([first, second])
    assert [line["group"] for line in pooled] == [0, 0, 1, 1, 2, 2, 3, 3]
    reports = [build_report({}, run, EDITS, 2) for run in (first, second)]
    whole = build_report({}, pooled, EDITS, 2)
    (milestone,) = with_spread(
        whole["milestones"], [report["milestones"] for report in reports]
    )
    assert (milestone["groups"], milestone["cases"]) == (4, 8)
    score = milestone["scores"]["ar"]["reliability"]
    assert (score["mean"], score["n"], score["before"]) == (3 / 8, 8, 0)
    assert score["over_runs"]["means"] == [1 / 4, 1 / 2]
    assert score["over_runs"]["sd"] == pytest.approx(0.125 * 2**0.5)
    scope = milestone["scores"]["ar"]["scope"]
    assert scope["over_runs"]["means"] == [None, None]
    # a case of several groups is one cluster
    values, cases = [1, 0, 0, 0, 1, 1, 0, 0], ["0", "1"] * 4
    assert score["ci95"] == score_with_interval(values, cases)["ci95"]
