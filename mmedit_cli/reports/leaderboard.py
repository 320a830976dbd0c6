"""Finished evaluations, ranked: a table for each model, data and protocol, in several forms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli.errors import UserError
from mmedit_cli.output import Output, counted
from mmedit_cli.reading import read_yaml_object
from mmedit_cli.records import Run
from mmedit_cli.reports.comparison import FORMATS
from mmedit_cli.reports.every_eval_ever import EVERY_EVAL_EVER, print_records, record
from mmedit_cli.reports.finding import finished_runs
from mmedit_cli.reports.scores import column_name, half_interval

Json = Mapping[str, Any]
# of a protocol, what changes no score
_SPEED_ONLY = ("batch_size", "shard", "report_at")
_SHOWN = (
    "reliability",
    "generality.text",
    "generality.image",
    "locality.text",
    "locality.image",
    "scope",
)


@dataclass(frozen=True)
class Entry:
    """A run with its scores after all edits, by column of the first protocol."""

    folder: Path
    report: Json
    edits: int
    scores: Json

    def ends(self, column: str) -> tuple[float, float]:
        """Return the ends of the interval of a score: both its mean, where there is none."""
        score = self.scores[column]
        ends = score["ci95"]
        if ends is None:
            mean = score["mean"]
            return mean, mean
        low, high = ends
        return low, high


@dataclass(frozen=True)
class Board:
    """Runs that may be ranked: of one model, one set of cases and one protocol.

    ranked: (rank, run), the best first. A rank is 1 + how many runs have their whole interval above that of this one.
    """

    title: str
    by: str
    ranked: Sequence[tuple[int, Entry]]


def leaderboards(records: Path, by: str) -> list[Board]:
    """Return a board for each model, data and protocol of the finished evaluations of knowledge in a folder.

    Raises UserError if there are none, or none with the column that ranks.
    """
    groups: dict[str, list[Entry]] = {}
    for folder in finished_runs(records):
        report = Run.read_report(folder)
        if "milestones" in report and not report["data"].get("order"):
            entry = _entry(folder, report)
            if by in entry.scores:
                groups.setdefault(_key(entry), []).append(entry)
    if not groups:
        raise UserError(
            f"{records}: no finished evaluation with a score {by}",
            "--by takes a column such as scope, reliability or generality.text",
        )
    boards = []
    for entries in groups.values():
        title = _title(entries[0])
        boards.append(Board(title, by, _ranked(entries, by)))
    return sorted(boards, key=lambda board: board.title)


def _entry(folder: Path, report: Json) -> Entry:
    milestones = report["milestones"]
    whole = [m for m in milestones if not m["short_group"]]
    last = whole[-1] if whole else milestones[-1]
    scores = next(iter(last["scores"].values()))
    return Entry(folder, report, last["edits"], scores)


def _key(entry: Entry) -> str:
    """Return all that must be the same in runs that are ranked together."""
    report = entry.report
    protocol = dict(report["protocol"])
    for name in _SPEED_ONLY:
        protocol.pop(name, None)
    data = {key: report["data"][key] for key in ("name", "cases", "fingerprint")}
    run = read_yaml_object(entry.folder / "run.yaml").values
    scoring = run["config"].get("scoring", 1)
    key = [report["model"]["fingerprint"], data, protocol, scoring]
    return json.dumps(key, sort_keys=True)


def _title(entry: Entry) -> str:
    report = entry.report
    data = report["data"]
    protocol = report["protocol"]["protocols"][0]
    name = data["name"]
    digest = data["fingerprint"][:6]
    cases = counted(data["cases"], "case")
    model = report["model"]["name"]
    edits = counted(entry.edits, "edit")
    return f"{model}: {cases} of {name} ({digest}), {edits} in a row, {protocol}"


def _ranked(entries: Sequence[Entry], by: str) -> list[tuple[int, Entry]]:
    ranked = []
    for entry in entries:
        _, high = entry.ends(by)
        above = 0
        for other in entries:
            low, _ = other.ends(by)
            above += low > high
        ranked.append((1 + above, entry))
    ranked.sort(key=lambda pair: -pair[1].scores[by]["mean"])
    ranked.sort(key=lambda pair: pair[0])
    return ranked


def _record_of(entry: Entry, rank: int) -> dict[str, Any]:
    """Return a ranked run as a record of every-eval-ever."""
    report = entry.report
    protocol = report["protocol"]["protocols"][0]
    scores = {}
    for column, score in entry.scores.items():
        scores[protocol, column] = score
    return record(entry.folder, report, entry.edits, scores, rank=str(rank))


# -- showing --------------------------------------------------------------------------------------------------------


def print_leaderboards(out: Output, boards: Sequence[Board], form: str) -> None:
    """Print boards: a table each, one table of all in one of FORMATS, or records of every-eval-ever."""
    if form == EVERY_EVAL_EVER:
        records = []
        for board in boards:
            records += [_record_of(entry, rank) for rank, entry in board.ranked]
        print_records(records)
        return
    if form in FORMATS:
        header, rows = _one_table(boards)
        for line in FORMATS[form](header, rows).splitlines():
            out.line(line)
        return
    out.result([_values(board) for board in boards], lambda: _show(out, boards))


def _show(out: Output, boards: Sequence[Board]) -> None:
    for board in boards:
        out.line(f"{board.title}; in %, ranked by {column_name(board.by)}")
        out.table(*_table(board))
    out.line("  rank: 1 + the runs whose whole 95 % interval lies above that of a run")


def _table(board: Board) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of a board."""
    columns = [
        column
        for column in dict.fromkeys((board.by, *_SHOWN))
        if any(column in entry.scores for _, entry in board.ranked)
    ]
    header = ["rank", "editor", *map(column_name, columns), "s an edit", "run"]
    rows = []
    for rank, entry in board.ranked:
        cells = [_cell(entry.scores.get(column)) for column in columns]
        speed = _speed(entry.report["cost"])
        editor = entry.report["editor"]
        run = entry.folder.name
        rows.append([str(rank), editor, *cells, speed, run])
    return header, rows


def _speed(cost: Json) -> str:
    """Return the seconds that an edit took, `-` for edits that were made elsewhere."""
    seconds = cost.get("seconds_per_edit")
    return "-" if seconds is None else f"{seconds['mean']:.3g}"


def _one_table(boards: Sequence[Board]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of all boards together: a row a run, a column a score of any board."""
    header: dict[str, None] = {"board": None}
    records = []
    for board in boards:
        names, rows = _table(board)
        header |= dict.fromkeys(names)
        for row in rows:
            named = dict(zip(names, row, strict=True))
            records.append({"board": board.title, **named})
    table = [[record.get(name, "-") for name in header] for record in records]
    return list(header), table


def _cell(score: Json | None) -> str:
    if score is None or score["mean"] is None:
        return "-"
    mean = 100 * score["mean"]
    return f"{mean:.1f}{half_interval(score, 1, scale=100)}"


def _values(board: Board) -> dict[str, Any]:
    """Return a board as plain values."""
    runs = []
    for rank, entry in board.ranked:
        run: dict[str, Any] = {"rank": rank}
        run["editor"] = entry.report["editor"]
        run["run"] = str(entry.folder)
        run["scores"] = entry.scores
        runs.append(run)
    return {"board": board.title, "by": board.by, "runs": runs}
