"""How the evaluation of a concept editor looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmedit_cli.drawing.data.facts import COLUMNS
from mmedit_cli.output import Output
from mmedit_cli.reports.scores import half_interval

_WAYS = ("before", "alone", "together")  # as they are printed
_EXACT = {True: "exact", False: "NOT exact"}
_KNOWN, _MARGIN = " known", " margin"
Json = Mapping[str, Any]


def print_scores(out: Output, report: Json) -> None:
    """Print the scores of a concept editor by kind of fact, before, after each edit alone and after all of a kind."""

    def show() -> None:
        data = report["data"]
        head = f"{report['editor']} on {report['model']['name']}, {data['name']}"
        out.line(f"{head}: mean in % ± 95 % interval over facts")
        ways = [way for way in _WAYS if way in report["ways"]]
        rows, sections = _score_rows(report, ways)
        out.table(["edits", "score", *ways], rows, sections=sections)
        out.line(f"judge: {report['judge']}")
        out.line(f"collapsed pictures: {_collapsed(report['collapsed'])}")
        for way, kinds in report.get("faint", {}).items():
            out.line(f"faint pictures, {way}: {_shares(kinds)}")
        for line in report["undo"]:
            out.line(_undone(line))
        cost = report["cost"]
        for key, what in (
            ("seconds_per_edit", "an edit alone"),
            ("seconds_together", "all of a kind at once"),
        ):
            shown = [f"{kind} {seconds:.3g}" for kind, seconds in cost[key].items()]
            out.line(f"seconds for {what}: {', '.join(shown)}")
        out.line(f"gallery: {report['gallery']}")

    out.result(report, show)


def _score_rows(report: Json, ways: Sequence[str]) -> tuple[list[list[str]], list[int]]:
    """Return (rows, indices after which a kind ends): a row a kind and score, a cell a way."""
    rows: list[list[str]] = []
    sections = []
    for kind, count in report["kinds"].items():
        title = f"{count} {kind}"
        for column in _columns(report["ways"], kind):
            scale, digits = (1, 2) if column.endswith(_MARGIN) else (100, 1)
            cells = []
            for way in ways:
                score = report["ways"][way].get(kind, {}).get(column)
                cells.append(_cell(score, scale, digits))
            rows.append([title, column, *cells])
            title = ""
        sections.append(len(rows) - 1)
    return rows, sections


def _columns(ways: Json, kind: str) -> list[str]:
    """Return the columns of a kind of fact in their order, each followed by that of its known pictures."""
    there: set[str] = set()
    for of_way in ways.values():
        there |= set(of_way.get(kind, {}))
    found = []
    for column in COLUMNS:
        named = (column, column + _KNOWN, column + _MARGIN)
        found += [name for name in named if name in there]
    return found


def _cell(score: Json | None, scale: float, digits: int) -> str:
    if score is None or score["mean"] is None:
        return ""
    mean = scale * score["mean"]
    half = half_interval(score, digits, scale)
    count = score["n"]
    return f"{mean:.{digits}f}{half} n={count}"


def _collapsed(shares: Json) -> str:
    return _shares({way: shares[way] for way in _WAYS if way in shares})


def _shares(by_name: Json) -> str:
    said = []
    for name, share in by_name.items():
        said.append(f"{name} {100 * share['mean']:.1f} % of {share['n']:,}")
    return ", ".join(said)


def _undone(line: Json) -> str:
    """Return what undo and redo of one among many edits did."""
    kind, number, edits = line["kind"], line["undone"], line["edits"]
    undo = _EXACT[line["undo_exact"]]
    redo = _EXACT[line["redo_exact"]]
    return f"undo of {kind} {number} of {edits}: {undo}; redo: {redo}"
