"""How a sweep looks: a line a run, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmedit_cli.errors import MmeditError
from mmedit_cli.output import Output, counted

_HEADER = ["run", "edits", "protocol", "Rel", "Scope", "folder"]


def print_sweep(out: Output, report: Mapping[str, Any]) -> None:
    """Print what became of each run, and where the reports over several of them are."""

    def show() -> None:
        rows = []
        for run in report["runs"]:
            row = _row(run)
            rows.append(row)
        out.table(_HEADER, rows)
        for folder in report["spreads"]:
            command = f"mmedit report {folder}"
            out.line(f"seeds and orders together: {command}")

    out.result(report, show)


def _row(run: Mapping[str, Any]) -> list[str]:
    name = run["run"]
    folder = run["folder"]
    if "failed" in run:
        return [name, "", "failed", "", "", folder]
    edits = str(run["edits"])
    protocol = run["protocol"]
    shares = []
    for key in ("reliability", "scope"):
        share = run[key]
        text = "-"
        if share is not None:
            text = f"{100 * share:.1f}"
        shares.append(text)
    return [
        name,
        edits,
        protocol,
        *shares,
        folder,
    ]


def raise_failures(report: Mapping[str, Any]) -> None:
    """Raise MmeditError with the runs that failed, if there are any."""
    problems = []
    for run in report["runs"]:
        if "failed" in run:
            name = run["run"]
            why = run["failed"]
            problems.append(f"{name}: {why}")
    if problems:
        total = len(report["runs"])
        failed = counted(len(problems), "run")
        first = f"{failed} of {total} failed"
        raise MmeditError(
            [first, *problems],
            "the same command makes them again, and leaves the others as they are",
        )
