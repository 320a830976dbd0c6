"""What the page shows in tables: the questions that were asked about an edit, and the edits of a ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ASKED = ["asked", "question", "picture", "before", "after", "right"]
EDITS = ["edit", "question", "picture", "before", "taught", "state"]
Row = list[str]


def asked_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return a row for each question about an edit: the fact, the other ways of asking it, what should stay."""
    rows = []
    for edit in report["edits"]:
        rows.append(_row("the fact", edit, edit["holds"]))
    for way in report["otherwise"]:
        rows.append(_row("otherwise", way, way["holds"]))
    for probe in report["locality"]:
        rows.append(_row("other", probe, probe["same"]))
    return rows


def _row(what: str, asked: Mapping[str, Any], right: bool) -> Row:
    verdict = "yes" if right else "no"
    return [
        what,
        asked["prompt"],
        asked["picture"],
        asked["before"],
        asked["after"],
        verdict,
    ]


def edit_rows(edits: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each edit of a ledger."""
    rows = []
    for edit in edits:
        state = "active" if edit["active"] else "undone"
        row = [
            str(edit["id"]),
            edit["prompt"],
            edit["picture"],
            edit["before"],
            edit["target"],
            state,
        ]
        rows.append(row)
    return rows


def summary(report: Mapping[str, Any]) -> str:
    """Say in a few lines what an edit did, and what may be done."""
    (edit,) = report["edits"]
    ways = report["otherwise"]
    probes = report["locality"]
    held = sum(way["holds"] for way in ways)
    kept = sum(probe["same"] for probe in probes)
    holds = "holds" if edit["holds"] else "does not hold"
    lines = [
        f"Edit {edit['id']} {holds}: {edit['before']!r} became {edit['after']!r}.",
        f"{held} of {len(ways)} other ways of asking get the new answer.",
        f"{kept} of {len(probes)} other questions are answered as before.",
        f"Editor: {report['editor']}, as {report['chosen']}.",
    ]
    if not edit["holds"]:
        lines.append("Undo it, and name another editor in a new ledger.")
    elif held < len(ways):
        lines.append("What does not get the new answer may be taught as well.")
    return "\n".join(lines)
