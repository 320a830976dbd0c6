"""All scores of finished evaluations as flat records, for a data frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedit_cli.records import Run
from mmedit_cli.reports.finding import finished_runs, runs_where

Json = dict[str, Any]


def load_runs(records: Path | str = "records", where: str | None = None) -> list[Json]:
    """Return a record a score of each finished evaluation of knowledge: `pandas.DataFrame(load_runs())`.

    records: the records folder. where: `key=value,...` with the keys editor, model and data, or None for all runs;
    of an evaluation over several seeds and orders it finds the whole, None also each run.
    Keys: run, editor, model, data, seed, edits, short_group, protocol, column, mean, low and high (95 % interval), n,
    before.

    Raises UserError for `where` that is no condition or fits no run.
    """
    folder = Path(records)
    runs = finished_runs(folder) if where is None else runs_where(where, folder)
    found: list[Json] = []
    for run in runs:
        report = Run.finished(run)
        if report is not None and "milestones" in report:
            found += _records(run, report)
    return found


def _records(run: Path, report: Json) -> Iterator[Json]:
    head = {
        "run": str(run),
        "editor": report["editor"],
        "model": report["model"]["name"],
        "data": report["data"]["name"],
        "seed": report.get("seed"),
    }
    for milestone in report["milestones"]:
        place = {key: milestone[key] for key in ("edits", "short_group")}
        for protocol, columns in milestone["scores"].items():
            for column, score in columns.items():
                low, high = score["ci95"] or (None, None)
                yield {
                    **head,
                    **place,
                    "protocol": protocol,
                    "column": column,
                    "mean": score["mean"],
                    "low": low,
                    "high": high,
                    "n": score["n"],
                    "before": score.get("before"),
                }
