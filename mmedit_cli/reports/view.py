"""`mmedit report view`: finished runs as one page, with what the terminal shows, charts, and every case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedit_cli.output import Output
from mmedit_cli.page import charts
from mmedit_cli.page.writing import (
    Page,
    folded,
    paragraph,
    section,
    table,
    write_page,
)
from mmedit_cli.reading import read_bytes
from mmedit_cli.records import Run
from mmedit_cli.reports import show
from mmedit_cli.reports.cases import add_cases
from mmedit_cli.reports.scores import column_name

Json = Mapping[str, Any]
_MOST_LINES = 6  # of a chart


class _Collector(Output):
    """Takes what a report prints for people as HTML instead."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.parts: list[str] = []

    def result(self, data: Any, show: Callable[[], None]) -> None:
        """Let it be shown to people."""
        show()

    def line(self, text: str = "") -> None:
        """Take a line; an empty one only parts what is printed."""
        if text:
            self.parts.append(paragraph(text))

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str = "",
        sections: Sequence[int] = (),
    ) -> None:
        """Take a table."""
        self.parts.append(table(header, rows, sections))


def view(folders: Sequence[Path], file: Path, out: Output | None = None) -> Page:
    """Write the page of finished runs and return what it shows.

    Raises RunError for a folder that holds no finished run, or if the page cannot be written.
    """
    reports = [Run.read_report(folder) for folder in folders]
    names = [_name(report) for report in reports]
    page = Page(" and ".join(dict.fromkeys(names)), runs=_unlike(names, folders))
    comparison = _charts(reports, page.runs)
    if comparison:
        page.sections.append(comparison)
    for folder, report, name in zip(folders, reports, page.runs, strict=True):
        page.sections.append(_section(folder, report, name))
    add_cases(page, folders, reports, out or Output(quiet=True))
    write_page(page, file)
    return page


def _name(report: Json) -> str:
    """Return what a run is called: editor, model and data."""
    model = report["model"]["name"]
    return f"{report['editor']} on {model}, {report['data']['name']}"


def _unlike(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the names, with the id of the run where one stands there twice."""
    unlike = []
    for name, folder in zip(names, folders, strict=True):
        again = names.count(name) > 1
        unlike.append(f"{name} ({folder.resolve().name})" if again else name)
    return unlike


def one_run(folder: Path) -> str:
    """Return what the terminal shows of a finished run as HTML; raise RunError for a folder that holds none."""
    report = Run.read_report(folder)
    name = _name(report)
    return _section(folder, report, name)


def _section(folder: Path, report: Json, name: str) -> str:
    """Return what the terminal shows of a run, and its configuration, as HTML."""
    taken = _Collector()
    # the cases themselves stand below
    shown = {**report, "examples": ()} if "examples" in report else report
    show.report(taken, shown)
    config = folder / "run.yaml"
    if config.is_file():
        taken.parts.append(folded("run.yaml", read_bytes(config).decode()))
    return section(name, taken.parts)


# -- charts ---------------------------------------------------------------------------------------------------------


def _charts(reports: Sequence[Json], names: Sequence[str]) -> str:
    """Return the charts of evaluations of knowledge as HTML; empty where there are none."""
    named = [
        (name, report)
        for name, report in zip(names, reports, strict=True)
        if "milestones" in report
    ]
    if not named:
        return ""
    drawn = [_last_scores(named)]
    drawn += [_over_edits(name, report) for name, report in named]
    return f'<div class="charts">{"".join(drawn)}</div>'


def _last_scores(named: Sequence[tuple[str, Json]]) -> str:
    """Return the chart of all scores at the last milestone of whole groups, a mark a run."""
    found: dict[str, None] = {}
    for _, report in named:
        found |= dict.fromkeys(_scores(_whole(report)[-1]))
    columns = _all_cases(found)
    series = []
    for name, report in named:
        scores = _scores(_whole(report)[-1])
        series.append((name, [_score(scores.get(column)) for column in columns]))
    labels = [column_name(column) for column in columns]
    return charts.intervals("Scores after all edits, in %", labels, series)


def _over_edits(name: str, report: Json) -> str:
    """Return the chart of the first scores over the number of edits; empty for a single milestone."""
    milestones = _whole(report)
    if len(milestones) < 2:
        return ""
    edits = [milestone["edits"] for milestone in milestones]
    tables = [_scores(milestone) for milestone in milestones]
    series = []
    for column in _of_interest(tables[-1]):
        scores = [_score(scores.get(column)) for scores in tables]
        series.append((column_name(column), scores))
    return charts.over_edits(f"{name}: over edits, in %", edits, series)


def _of_interest(columns: Json) -> list[str]:
    """Return a few columns, those that the papers report first."""
    return sorted(_all_cases(columns), key=_place)[:_MOST_LINES]


def _all_cases(columns: Iterable[str]) -> list[str]:
    """Return the columns without those of the known cases alone."""
    return [column for column in columns if not column.endswith(" known")]


def _place(column: str) -> int:
    """Return 0 for the columns that the papers report, 1 for the others."""
    return int(column_name(column).count(" ") > 0)


def _whole(report: Json) -> list[Json]:
    milestones = report["milestones"]
    whole = [m for m in milestones if not m["short_group"]]
    return whole or list(milestones)


def _scores(milestone: Json) -> Json:
    """Return the scores by column, of the first protocol."""
    scores: Json = next(iter(milestone["scores"].values()))
    return scores


def _score(score: Json | None) -> charts.Score | None:
    if score is None or score["mean"] is None:
        return None
    ends = score["ci95"]
    return charts.Score(score["mean"], None if ends is None else tuple(ends))
