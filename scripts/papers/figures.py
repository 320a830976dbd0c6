"""What a paper published and what reports of ours say, in one form.

A figure has a key: the row of the paper's table, the number of edits in a row ("all": the most there are), and the
score. A paper is a YAML file beside this one; its `rows` say which editor stands for which row.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedit_cli.reading import read_yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare_editors import FIGURES, label

HERE = Path(__file__).resolve().parent
ALL = "all"
MEAN = "mean"
PAPERS = (
    "liveedit",
    "unike",
    "multi_melo",
    "multi_melo_drawing",
    "perfusion",
    "mgie",
)
_SIDES = ("routed", "edited")  # of a personalizer's report; the first that is there


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval; published ones have none, and are taken as they are."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Figure:
        """Return the figure in another unit."""
        return Figure(self.value * factor, self.low * factor, self.high * factor)


Key = tuple[str, str, str]  # row, edits, score


@dataclass
class Table:
    """Figures of one model on one data set. `name` says which, `model` is the model's name."""

    name: str
    model: str
    figures: dict[Key, Figure] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """Return (row, edits) in order, each once."""
        return list(dict.fromkeys((row, edits) for row, edits, _ in self.figures))


def read_paper(name: str) -> dict[str, Any]:
    """Return the content of a paper's YAML file; raise UserError if it cannot be read."""
    return dict(read_yaml(HERE / f"{name}.yaml"))


def rows_of(paper: Mapping[str, Any]) -> dict[str, str | None]:
    """Return every row of a paper's table, variants too, with the editor that stands for it."""
    return {**paper["rows"], **paper.get("variants", {})}


def mean_of(figures: Sequence[Figure]) -> Figure:
    """Return the mean; its interval is the mean of theirs, which is never too narrow."""
    return Figure(
        statistics.fmean(figure.value for figure in figures),
        statistics.fmean(figure.low for figure in figures),
        statistics.fmean(figure.high for figure in figures),
    )


# -- published ------------------------------------------------------------------------------------------------------


def published(paper: Mapping[str, Any]) -> list[Table]:
    """Return the published tables of a paper."""
    tables = []
    for one in paper.get("published", ()):
        table = Table(one["table"], one["table"].partition(",")[0])
        for edits, rows in one["after"].items():
            for row, values in rows.items():
                _add_published(table, paper["scores"], (row, edits), values)
        tables.append(table)
    return tables


def _add_published(
    table: Table, scores: Sequence[str], key: tuple[str, str], values: Any
) -> None:
    if not isinstance(values, Mapping):
        values = dict(zip(scores, values, strict=True))
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        table.figures[(*key, name)] = Figure(value, value, value)
    if len(known) == len(scores) and "mean" not in known:
        table.figures[(*key, MEAN)] = mean_of(
            [table.figures[(*key, name)] for name in scores]
        )


# -- measured -------------------------------------------------------------------------------------------------------


def measured(paper: Mapping[str, Any], records: Path) -> list[Table]:
    """Return what the reports in a folder say of a paper's rows: a table a model and data set."""
    tables: dict[str, Table] = {}
    sizes: dict[tuple[str, str, str], int] = {}
    readers = {
        "knowledge": ("eval", _of_knowledge),
        "drawing": ("eval-concepts", _of_drawing),
        "pictures": ("eval-image-editor", _of_pictures),
    }
    folder, read = readers[paper["kind"]]
    rows = {_label_of(editor): row for row, editor in rows_of(paper).items() if editor}
    for path in sorted(records.rglob(f"{folder}/**/report.json")):
        report = json.loads(path.read_text("utf-8"))
        row = rows.get(label(report) if "protocol" in report else report["editor"])
        if row is None:
            continue
        model = report["model"]["name"]
        name = report["data"]["name"]
        if paper["kind"] != "pictures":
            # each image editor has a model of its own: what is compared is the data
            name = f"{model}, {name}"
        table = tables.setdefault(name, Table(name, model))
        for edits, figures in read(paper, report).items():
            # of several reports of the same, the one with most cases counts
            cases = report["data"]["cases"]
            if sizes.get((name, row, edits), 0) > cases:
                continue
            sizes[name, row, edits] = cases
            for score, figure in figures.items():
                table.figures[row, edits, score] = figure
    for table in tables.values():
        _name_the_most(table)
    return list(tables.values())


def _label_of(editor: str) -> str:
    """Return how a report of an editor is labelled: `ft+target=connector` is "ft connector"."""
    name, *changes = editor.split("+")
    hparams: dict[str, Any] = {}
    for change in changes:
        key, is_set, value = change.partition("=")
        if not is_set:
            key, value = "variant", key
        hparams[key] = {"true": True, "false": False}.get(value, value)
    return label({"editor": name, "hparams": hparams, "protocol": {}})


def _name_the_most(table: Table) -> None:
    """Let "all" mean the most edits of each row."""
    most: dict[str, str] = {}
    for row, edits in table.rows():
        if edits != ALL and int(edits) > int(most.get(row, "0")):
            most[row] = edits
    for row, edits, score in list(table.figures):
        if most.get(row) == edits:
            table.figures[row, ALL, score] = table.figures[row, edits, score]


def _interval(score: Mapping[str, Any]) -> Figure:
    low, high = score.get("ci95") or (float("-inf"), float("inf"))
    return Figure(score["mean"], low, high)


def _of_knowledge(
    paper: Mapping[str, Any], report: Mapping[str, Any]
) -> dict[str, dict[str, Figure]]:
    edits = report["protocol"]["sequential"]
    found: dict[str, Figure] = {}
    for milestone in report["milestones"]:
        if milestone["edits"] != edits or milestone["short_group"]:
            continue
        scores = milestone["scores"].get(paper["metrics"], {})
        for name, columns in FIGURES.items():
            there = [scores[column] for column in columns if column in scores]
            if there:
                parts = [_interval(score).times(100) for score in there]
                found[name] = mean_of(parts)
    if all(name in found for name in paper["scores"]):
        found[MEAN] = mean_of([found[name] for name in paper["scores"]])
    return {str(edits): found} if found else {}


def _of_drawing(
    paper: Mapping[str, Any], report: Mapping[str, Any]
) -> dict[str, dict[str, Figure]]:
    sides = report["sides"]
    side: Mapping[str, Any] = {}
    for name in reversed(_SIDES):
        side = sides.get(name, side)
    found = {}
    for score, places in paper["reads"].items():
        for test, name in places:
            if test == "concepts":
                sizes = [concept[name] for concept in report["concepts"]]
                found[score] = Figure(statistics.fmean(sizes), min(sizes), max(sizes))
            elif name in side.get(test, {}):
                found[score] = _interval(side[test][name])
            if score in found:
                break
    return {ALL: found}


def _of_pictures(
    paper: Mapping[str, Any], report: Mapping[str, Any]
) -> dict[str, dict[str, Figure]]:
    found = {}
    for score, (name,) in paper["reads"].items():
        if name in report["scores"]:
            factor = 100 if name == "SSIM" else 1
            found[score] = _interval(report["scores"][name]).times(factor)
    return {ALL: found}
