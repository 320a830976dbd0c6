"""How scores look in a table, for the reports of every kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmedit_cli.output import Output

_KNOWN = " known"  # the column again, for the cases whose question the untouched model answers
_NAMES = {
    "reliability": "Rel",
    "generality.text": "T-Gen",
    "generality.image": "M-Gen",
    "generality.both": "TM-Gen",
    "generality.unseen artist": "M-Gen unseen artist",
    "generality.unseen words": "T-Gen unseen words",
    "generality.changed picture": "M-Gen changed picture",
    "locality.text": "T-Loc",
    "locality.image": "M-Loc",
    "scope": "Scope",
}
_FAMILIES = {"locality": "Loc", "generality": "Gen", "portability": "Port"}


def column_name(column: str) -> str:
    """Return the short name of a column as the papers print it."""
    plain = column.removesuffix(_KNOWN)
    if plain in _NAMES:
        return _NAMES[plain] + column[len(plain) :]
    family, _, name = column.partition(".")
    return f"{_FAMILIES.get(family, family)} {name}"


def known_beside(columns: Iterable[str]) -> list[str]:
    """Return the columns in order, but that of the known cases right behind the one of all cases."""
    placed: list[str] = []
    for column in columns:
        plain = column.removesuffix(_KNOWN)
        if plain != column and plain in placed:
            behind = placed.index(plain) + 1
            placed.insert(behind, column)
        else:
            placed.append(column)
    return placed


def half_interval(score: Mapping[str, Any], digits: int, scale: float = 1) -> str:
    """Return ` ±` and half the width of the interval, ` -` where the scores say nothing of their spread."""
    if score["ci95"] is None:
        return " -"
    low, high = score["ci95"]
    return f" ±{scale * (high - low) / 2:.{digits}f}"


def print_networks(out: Output, report: Mapping[str, Any]) -> None:
    """Print which trained networks answered, where there are any; reports of 0.1.0 do not know."""
    from mmedit_cli.knowledge.trained_networks import networks_line

    if report.get("networks"):
        out.line(networks_line(report["networks"]))
    elif report.get("checkpoint") == "untrained":
        out.line("networks: untrained, as the seed drew them")


def run_of(report: Mapping[str, Any]) -> str:
    """Return the id of the run that a report belongs to."""
    return Path(report["run"]).name
