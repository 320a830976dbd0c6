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
        rows = [_row(run) for run in report["runs"]]
        out.table(_HEADER, rows)
        for folder in report["spreads"]:
            out.line(f"seeds and orders together: mmedit report {folder}")

    out.result(report, show)


def _row(run: Mapping[str, Any]) -> list[str]:
    if "failed" in run:
        return [run["run"], "", "failed", "", "", run["folder"]]
    shares = []
    for key in ("reliability", "scope"):
        share = run[key]
        shares.append("-" if share is None else f"{100 * share:.1f}")
    edits = str(run["edits"])
    return [run["run"], edits, run["protocol"], *shares, run["folder"]]


def raise_failures(report: Mapping[str, Any]) -> None:
    """Raise MmeditError with the runs that failed, if there are any."""
    failed = [run for run in report["runs"] if "failed" in run]
    if failed:
        total = len(report["runs"])
        problems = [f"{run['run']}: {run['failed']}" for run in failed]
        raise MmeditError(
            [f"{counted(len(failed), 'run')} of {total} failed", *problems],
            "the same command makes them again, and leaves the others as they are",
        )
