"""Reports that lie on the disk: one is shown in the form of its kind, or all finished runs are listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedit_cli.errors import RunError
from mmedit_cli.output import Output
from mmedit_cli.records import Run
from mmedit_cli.reports import drawing, knowledge, picture_editing
from mmedit_cli.reports.finding import finished_runs

_AGAIN = "run the command again with --force"
_RUN_COLUMNS = ["editor", "model", "data", "edits", "reliability", "run"]
# a key that a report has -> what prints it; the first that fits
_PRINTERS = {
    "milestones": knowledge.print_scores,
    "best": knowledge.print_training,
    "scores": picture_editing.print_scores,
    "sides": drawing.print_scores,
    "curve": picture_editing.print_training,
}


def plan(out: Output, described: Mapping[str, Any]) -> None:
    """Print what a command would do."""
    out.result(described, lambda: out.yaml(described))


def report(out: Output, report: Mapping[str, Any]) -> None:
    """Print the report of an evaluation (scores, answers before and after, cost), or of a training.

    Raises RunError if it has not the form of one.
    """
    with _form(str(report.get("run", "report.json"))):
        print_report = picture_editing.print_training
        for key, printer in _PRINTERS.items():
            if key in report:
                print_report = printer
                break
        print_report(out, report)


def runs(out: Output, records: Path) -> None:
    """List the finished runs of a records folder, the newest first."""
    rows = []
    for folder in finished_runs(records):
        with _form(str(folder / "report.json")):
            rows.append(_run_row(Run.read_report(folder), folder))

    def show() -> None:
        if rows:
            out.table(_RUN_COLUMNS, rows)
        else:
            out.line(f"no finished runs in {records}")

    out.result([dict(zip(_RUN_COLUMNS, row, strict=True)) for row in rows], show)


def _run_row(done: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the row of a finished run: editor, model, data, edits or what was made, score, folder."""
    made, score = "trained", ""
    if "milestones" in done:
        last = done["milestones"][-1]
        protocol, scores = next(iter(last["scores"].items()))
        made = str(last["edits"])
        reliability = 100 * scores["reliability"]["mean"]
        score = f"{protocol} {reliability:.1f}"
    elif "best" in done:
        held_out = 100 * done["best"]["score"]
        score = f"held out {held_out:.1f}"
    elif "scores" in done:
        distance = done["scores"]["L1"]["mean"]
        made = f"L1 {distance:.4f}"
    elif "sides" in done:
        made = f"{done['data']['cases']} subjects"
    names = [done["editor"], done["model"]["name"], done["data"]["name"]]
    return [*map(str, names), made, score, str(folder)]


@contextmanager
def _form(place: str) -> Iterator[None]:
    """Turn what misses a key or has another type into a RunError: reports come from disk."""
    problem = f"{place}: not a report of this program"
    try:
        yield
    except KeyError as error:
        raise RunError(f"{problem}: {error} is missing", _AGAIN) from error
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        IndexError,
        AttributeError,
        StopIteration,
    ) as error:
        raise RunError(f"{problem}: {error}", _AGAIN) from error
