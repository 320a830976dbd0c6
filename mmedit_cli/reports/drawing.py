"""How the evaluation of a personalizer looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmedit_cli.output import Output
from mmedit_cli.reports.scores import half_interval

_TESTS = ("reliability", "generality", "class", "other", "pair")  # as they are printed
_ROUTES = ("right", "other", "none")
_ENCODERS = {"clip": "CLIP", "dino": "DINO", "encoder": "own encoder"}


def print_scores(out: Output, report: Mapping[str, Any]) -> None:
    """Print the scores of a personalizer, side by side with those of the base model and of the photos."""

    def show() -> None:
        data, settings = report["data"], report["settings"]
        head = f"{report['editor']} on {report['model']['name']}, {data['name']}"
        out.line(f"{head}: mean ± 95 % interval over subjects")
        sides = _sides(report["sides"])
        rows, sections = _score_rows(report["sides"], sides)
        out.table(["test", "score", *sides], rows, sections=sections)
        if report["routing"]:
            sent = _routing_rows(report["routing"])
            out.table(["the router sends to, in %", *_ROUTES], sent)
        for key, title in _ENCODERS.items():
            if settings[key] != "none":
                out.line(f"{title}: {settings[key]}")
        if report["nameless"]:
            names = ", ".join(report["nameless"])
            out.line(f"not asked for by name, {settings['encoder']} has none: {names}")
        seconds = report["cost"]["seconds_per_subject"]
        out.line(
            f"{data['cases']} subjects, {seconds:.3g} s to learn one; gallery: {report['gallery']}"
        )

    out.result(report, show)


def _sides(found: Mapping[str, Any]) -> list[str]:
    """Return the sides in the order of their columns: the photos and the base model first."""
    first = [side for side in ("photos", "base") if side in found]
    return [*first, *(side for side in found if side not in first)]


def _score_rows(
    found: Mapping[str, Any], sides: Sequence[str]
) -> tuple[list[list[str]], list[int]]:
    """Return (rows, indices after which a test ends): a row a test and score, a cell a side."""
    tests = {test for side in sides for test in found[side]}
    rows: list[list[str]] = []
    sections = []
    for test in sorted(tests, key=_TESTS.index):
        names: dict[str, None] = {}
        for side in reversed(sides):
            names |= dict.fromkeys(found[side].get(test, {}))
        title = test
        for name in names:
            digits = 4 if name == "L1" else 1
            scores = [found[side].get(test, {}).get(name) for side in sides]
            cells = [_cell(score, digits) for score in scores]
            rows.append([title, name, *cells])
            title = ""
        sections.append(len(rows) - 1)
    return rows, sections


def _routing_rows(routing: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    rows = []
    for test, shares in routing.items():
        percents = [100 * shares.get(route, 0) for route in _ROUTES]
        rows.append([test, *(f"{percent:.1f}" for percent in percents)])
    return rows


def _cell(score: Mapping[str, Any] | None, digits: int) -> str:
    if score is None:
        return ""
    return f"{score['mean']:.{digits}f}{half_interval(score, digits)}"
