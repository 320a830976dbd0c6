"""The figures of a report: intervals that are never narrower than what was measured, and no score where none was."""

from __future__ import annotations

import json

import pytest

from mmedit_cli.knowledge.evaluation.intervals import (
    mean_with_interval,
    score_with_interval,
    wilson_interval,
)
from mmedit_cli.knowledge.evaluation.report import CASE, CONCEPT, build_report
from mmedit_cli.output import Output
from mmedit_cli.reports import show
from mmedit_cli.reports.scores import known_beside

HEAD = {"editor": "ft", "model": {"name": "m"}, "data": {"name": "d"}, "examples": []}
EDITS = [{"group": 0, "index": 0, "seconds": 1.0}]


def report_of(*scores: dict[str, float]) -> dict:
    """The report of as many edits in a row as there are scores."""
    lines = [
        {
            "group": 0,
            "edits": len(scores),
            "index": i,
            "case": str(i),
            "scores": {"ar": s},
            "base": {"ar": {}},
        }
        for i, s in enumerate(scores)
    ]
    return build_report(HEAD, lines, EDITS, len(scores))


@pytest.mark.parametrize(
    ("right", "n", "ends"),
    [  # the first two from Newcombe (1998), table I, method 3
        (81, 263, [0.2553, 0.3662]),
        (15, 148, [0.0624, 0.1605]),
        (1, 1, [0.2065, 1.0]),
        (10, 10, [0.7225, 1.0]),
        (0, 10, [0.0, 0.2775]),
    ],
)
def test_wilsons_interval(right, n, ends):
    assert wilson_interval(right / n, n) == pytest.approx(ends, abs=5e-5)


def test_what_was_asked_once_or_is_all_right_is_not_certain():
    assert score_with_interval([1.0]) == {
        "mean": 1,
        "n": 1,
        "ci95": pytest.approx([0.2065, 1], abs=5e-5),
    }
    assert score_with_interval([1.0] * 10)["ci95"] == pytest.approx(
        [0.7225, 1], abs=5e-5
    )
    low, high = score_with_interval([0.5] * 4)["ci95"]  # shares of tokens, all the same
    assert low < 0.25
    assert high > 0.75
    assert score_with_interval([1.0, 0.0])["ci95"] == wilson_interval(0.5, 2)
    assert score_with_interval([1.0, 0.5, 0.0]) == mean_with_interval([1.0, 0.5, 0.0])


def test_no_interval_without_spread_for_what_has_no_bounds():
    assert mean_with_interval([3.0]) == {"mean": 3, "n": 1, "ci95": None}
    assert mean_with_interval([3.0, 3.0])["ci95"] is None
    low, high = mean_with_interval([0.0, 1.0] * 50)["ci95"]
    # 0.5 -+ 1.96 * 0.05; an interval of 90 % would end at 0.418 and 0.582
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.01)


def test_scope_counts_only_what_was_probed(capsys):
    bare, probed = {"reliability": 1.0}, {"reliability": 1.0, "locality.text": 0.5}
    nothing = report_of(bare)
    assert nothing["milestones"][0]["scores"]["ar"]["scope"] == {
        "mean": None,
        "n": 0,
        "ci95": None,
    }
    show.report(Output(), nothing)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Scope", "-"] in rows
    assert ["ar", "Rel", "100.0", "±39.7"] in rows
    mixed = report_of(bare, probed)["milestones"][0]["scores"]["ar"]["scope"]
    assert (mixed["mean"], mixed["n"]) == (0, 1)


@pytest.mark.parametrize(
    ("scores", "scope"),
    [
        ({"reliability": 1.0, "locality.text": 1.0, "locality.near": 1.0}, 1),
        ({"reliability": 1.0, "locality.text": 1.0, "locality.near": 0.9}, 0),
        ({"reliability": 0.9, "locality.text": 1.0, "locality.near": 1.0}, 0),
        ({"reliability": 1.0, "locality.text": 1.0, "generality.text": 0.0}, 1),
    ],
)
def test_scope_asks_for_the_edit_and_every_locality_probe(scores, scope):
    assert report_of(scores)["milestones"][0]["scores"]["ar"]["scope"]["mean"] == scope


def assert_close(found, wanted, place="report"):
    """Compare what JSON can say; numbers to the four digits that were written down by hand."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), place
        for key, value in wanted.items():
            assert_close(found[key], value, f"{place}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), place
        for i, value in enumerate(wanted):
            assert_close(found[i], value, f"{place}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=5.1e-5), place
    else:
        assert found == wanted, place


@pytest.mark.parametrize(
    ("unit", "file"), [(CASE, "report.json"), (CONCEPT, "by_concept.json")]
)
def test_the_whole_report_by_hand(golden, unit, file):
    """Twelve lines of three groups, the last of them short; tests/golden/README.md says how it was computed."""
    folder = golden / "report_by_hand"
    cases, edits = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("cases.jsonl", "edits.jsonl")
    )
    assert len(cases) == 12
    wanted = json.loads((folder / file).read_text())
    found = build_report({"editor": "nobody"}, cases, edits, 3, unit=unit)
    assert_close(found, wanted)


def test_a_column_of_known_cases_stands_behind_that_of_all():
    columns = ["a", "b", "a known", "c known", "b known"]
    assert known_beside(columns) == ["a", "a known", "b", "b known", "c known"]
