"""Print the reports of several editors as Markdown tables, one a model: `python scripts/compare_editors.py RECORDS`.

`scripts/compare_editors.sh` makes the reports. Figures are in %: teacher-forced as in the papers (tf_liveedit), and in
parentheses those of free generation (ar).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIGURES = {
    "Rel": ("reliability",),
    "T-Gen": ("generality.text",),
    "M-Gen": ("generality.image",),
    "T-Loc": ("locality.text",),
    "M-Loc": ("locality.near", "locality.same_image", "locality.far"),
}


def label(report: Mapping[str, Any]) -> str:
    """Return the editor, and what distinguishes it from another row of the same editor."""
    hparams = report["hparams"]
    marks = [text for key, text in (("target", "connector"), ("variant", "paper")) if hparams.get(key) == text]
    return " ".join([report["editor"], *marks])


def figure(scores: Mapping[str, Any], names: tuple[str, ...]) -> float:
    """Return the mean of some columns in %."""
    return 100 * statistics.fmean(scores[name]["mean"] for name in names)


def row(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one report, read after all of its edits."""
    edits = report["protocol"]["sequential"]
    after = next(m for m in report["milestones"] if m["edits"] == edits and not m["short_group"])
    taught, free = after["scores"]["tf_liveedit"], after["scores"]["ar"]
    cells = {name: f"{figure(taught, of):.1f} ({figure(free, of):.1f})" for name, of in FIGURES.items()}
    mean = statistics.fmean(figure(taught, of) for of in FIGURES.values())
    seconds = report["cost"]["seconds_per_edit"]["mean"]
    return {"editor": label(report), "edits": str(edits), "cases": str(after["cases"]), **cells, "mean": f"{mean:.1f}",
            "s an edit": f"{seconds:.3f}"}  # fmt: skip


def routing(report: Mapping[str, Any]) -> dict[str, str]:
    """Return where the queries of a report were sent: to the right edit, another one, or none."""
    edits = report["protocol"]["sequential"]
    after = next(m for m in report["milestones"] if m["edits"] == edits and not m["short_group"])
    names = {"reliability": "Rel", "generality.text": "T-Gen", "generality.image": "M-Gen", "locality.near": "near",
             "locality.same_image": "same_image", "locality.far": "far"}  # fmt: skip
    cells = {
        shown: " / ".join(f"{100 * after['routing'][name][to]:.1f}" for to in ("right", "other", "none"))
        for name, shown in names.items()
        if name in after["routing"]
    }
    return {"editor": label(report), "edits": str(edits), **cells}


def table(rows: list[dict[str, str]]) -> str:
    """Return rows of the same columns as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells.values()) + " |" for cells in rows)])


def main(folder: Path) -> int:
    reports = [json.loads(path.read_text("utf-8")) for path in sorted(folder.rglob("eval/**/report.json"))]
    if not reports:
        print(f"{folder}: no reports; scripts/compare_editors.sh makes them", file=sys.stderr)
        return 2
    reports.sort(key=lambda r: (r["model"]["name"], label(r), r["protocol"]["sequential"]))
    for model in dict.fromkeys(report["model"]["name"] for report in reports):
        here = [report for report in reports if report["model"]["name"] == model]
        print(f"\n## {model}\n\n{table([row(report) for report in here])}")
        sent = [report for report in here if "routing" in report["milestones"][-1]]
        if sent:
            print(f"\nSent to the right edit / to another / to none, in %:\n\n{table([routing(r) for r in sent])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "records/compare")))
