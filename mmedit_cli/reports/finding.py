"""Finished runs by what a user calls them: a folder, a pattern, the beginning of an id, `latest`, or what they are."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedit_cli.errors import UserError
from mmedit_cli.records import Run

LATEST = "latest"
_KEYS = ("editor", "model", "data")


def finished_runs(records: Path) -> list[Path]:
    """Return the folders of the finished runs of a records folder, the newest first."""
    ages = []
    for report in records.rglob("report.json"):
        changed = report.stat().st_mtime
        folder = report.parent
        ages.append((changed, folder))
    ages.sort(reverse=True)
    return [folder for _, folder in ages]


def find_runs(names: Sequence[str], records: Path) -> list[Path]:
    """Return the folders that are named, in order; raise UserError for a name of none, or of several by an id."""
    found: list[Path] = []
    for name in names:
        found += _named(name, records)
    return found


def _named(name: str, records: Path) -> list[Path]:
    if Path(name).is_dir():
        return [Path(name)]
    if glob.has_magic(name):
        matches = [Path(path) for path in sorted(glob.glob(name, recursive=True))]
        runs = [path for path in matches if (path / "report.json").is_file()]
        if not runs:
            raise UserError(f"{name}: no finished run matches")
        return runs
    runs = finished_runs(records)
    if name == LATEST and runs:
        return runs[:1]
    of_id = [folder for folder in runs if folder.name.startswith(name)]
    if len(of_id) > 1:
        raise UserError(
            f"{name}: the beginning of {len(of_id)} runs in {records}",
            "give more of the id",
        )
    if not of_id:
        raise UserError(
            f"{name}: no finished run", f"`mmedit report` lists those in {records}"
        )
    return of_id


def runs_where(conditions: str, records: Path) -> list[Path]:
    """Return the finished runs that fit `key=value,...`, the oldest first; keys are editor, model and data.

    The runs of one evaluation over several seeds and orders are left out where that evaluation itself fits.

    Raises UserError for what is no condition, and if no run fits.
    """
    wanted: dict[str, list[str]] = {}
    for condition in conditions.split(","):
        key, equals, value = condition.partition("=")
        if not equals or key not in _KEYS:
            known = ", ".join(_KEYS)
            raise UserError(
                f"--where {condition}: not key=value",
                f"keys are {known}",
            )
        values = wanted.setdefault(key, [])
        values.append(value)
    fitting = []
    parts: set[Path] = set()
    for folder in reversed(finished_runs(records)):
        report = Run.finished(folder)
        if report is not None and _fits(report, wanted):
            fitting.append(folder)
            parts |= _parts(report)
    if not fitting:
        raise UserError(f"--where {conditions}: no finished run in {records}")
    return [folder for folder in fitting if folder.resolve() not in parts]


def _parts(report: Mapping[str, Any]) -> set[Path]:
    """Return the folders of the runs that an evaluation over several seeds and orders consists of."""
    return {Path(part["run"]).resolve() for part in report.get("runs", ())}


def _fits(report: Mapping[str, Any], wanted: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a report is an evaluation with one of the values of each key."""
    if "milestones" not in report:
        return False
    for key, values in wanted.items():
        found = report.get(key)
        name = found.get("name") if isinstance(found, Mapping) else found
        if name not in values:
            return False
    return True
