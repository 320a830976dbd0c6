"""Reports that lie on the disk: one is shown in the form of its kind, or all finished runs are listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedit_cli.errors import RunError
from mmedit_cli.output import Output
from mmedit_cli.records import Run
from mmedit_cli.reports import (
    concept_editing,
    drawing,
    knowledge,
    locating,
    picture_editing,
    sweeps,
)
from mmedit_cli.reports.finding import finished_runs

_AGAIN = "run the command again with --force"
_RUN_COLUMNS = ["editor", "model", "data", "edits", "reliability", "run"]
Json = dict[str, Any]
# a key that a report has -> what prints it; the first that fits
_PRINTERS = {
    "milestones": knowledge.print_scores,
    "candidates": locating.print_candidates,
    "spreads": sweeps.print_sweep,
    "best": knowledge.print_training,
    "scores": picture_editing.print_scores,
    "sides": drawing.print_scores,
    "ways": concept_editing.print_scores,
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
    found: list[Json] = []
    for folder in finished_runs(records):
        with _form(str(folder / "report.json")):
            done = Run.read_report(folder)
            if "spreads" not in done:  # of a sweep: its runs are listed themselves
                found.append({**_facts(done), "run": str(folder)})

    def show() -> None:
        if found:
            out.table(_RUN_COLUMNS, [_row(facts) for facts in found])
        else:
            out.line(f"no finished runs in {records}")

    out.result(found, show)


def _facts(done: Mapping[str, Any]) -> Json:
    """Return what a list says of a finished run: numbers are numbers, shares lie between 0 and 1."""
    facts: Json = {
        "editor": str(done["editor"]),
        "model": str(done["model"]["name"]),
        "data": str(done["data"]["name"]),
    }
    if "milestones" in done:
        last = done["milestones"][-1]
        protocol, scores = next(iter(last["scores"].items()))
        facts["edits"] = int(last["edits"])
        facts["protocol"] = protocol
        facts["reliability"] = float(scores["reliability"]["mean"])
    elif "candidates" in done:
        facts["layers"] = locating.named(done["chosen"])
    elif "best" in done:
        facts["held_out"] = float(done["best"]["score"])
    elif "scores" in done:
        facts["L1"] = float(done["scores"]["L1"]["mean"])
    elif "sides" in done:
        facts["subjects"] = int(done["data"]["cases"])
    elif "ways" in done:
        facts["facts"] = int(done["data"]["cases"])
    return facts


def _row(facts: Json) -> list[str]:
    """Return the facts of a run as a row of the table."""
    made, score = "trained", ""
    if "edits" in facts:
        made = str(facts["edits"])
        reliability = 100 * facts["reliability"]
        score = f"{facts['protocol']} {reliability:.1f}"
    elif "held_out" in facts:
        held_out = 100 * facts["held_out"]
        score = f"held out {held_out:.1f}"
    elif "layers" in facts:
        made = f"layers {facts['layers']}"
    elif "L1" in facts:
        made = f"L1 {facts['L1']:.4f}"
    elif "subjects" in facts:
        made = f"{facts['subjects']} subjects"
    elif "facts" in facts:
        made = f"{facts['facts']} facts"
    names = [facts[key] for key in ("editor", "model", "data")]
    return [*names, made, score, facts["run"]]


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
