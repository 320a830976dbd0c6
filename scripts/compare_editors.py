"""Print the reports of several editors as Markdown tables, one a model.

    python scripts/compare_editors.py records/compare
    python scripts/compare_editors.py records/compare --chart comparison.svg   # and draw the column "mean"

`scripts/compare_editors.sh` makes the reports. Figures are in %: teacher-forced as in the papers (tf_liveedit), and in
parentheses those of free generation (ar).
"""

from __future__ import annotations

import argparse
import json
import math
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
    marks = [
        text
        for key, text in (("target", "connector"), ("variant", "paper"))
        if hparams.get(key) == text
    ]
    return " ".join([report["editor"], *marks])


def figure(scores: Mapping[str, Any], names: tuple[str, ...]) -> float:
    """Return the mean of some columns in %."""
    return 100 * statistics.fmean(scores[name]["mean"] for name in names)


def row(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one report, read after all of its edits."""
    edits = report["protocol"]["sequential"]
    after = next(
        m for m in report["milestones"] if m["edits"] == edits and not m["short_group"]
    )
    taught, free = after["scores"]["tf_liveedit"], after["scores"]["ar"]
    cells = {
        name: f"{figure(taught, of):.1f} ({figure(free, of):.1f})"
        for name, of in FIGURES.items()
    }
    mean = statistics.fmean(figure(taught, of) for of in FIGURES.values())
    seconds = report["cost"]["seconds_per_edit"]["mean"]
    return {"editor": label(report), "edits": str(edits), "cases": str(after["cases"]), **cells, "mean": f"{mean:.1f}",
            "s an edit": f"{seconds:.3f}"}  # fmt: skip


def routing(report: Mapping[str, Any]) -> dict[str, str]:
    """Return where the queries of a report were sent: to the right edit, another one, or none."""
    edits = report["protocol"]["sequential"]
    after = next(
        m for m in report["milestones"] if m["edits"] == edits and not m["short_group"]
    )
    names = {"reliability": "Rel", "generality.text": "T-Gen", "generality.image": "M-Gen", "locality.near": "near",
             "locality.same_image": "same_image", "locality.far": "far"}  # fmt: skip
    cells = {
        shown: " / ".join(
            f"{100 * after['routing'][name][to]:.1f}"
            for to in ("right", "other", "none")
        )
        for name, shown in names.items()
        if name in after["routing"]
    }
    return {"editor": label(report), "edits": str(edits), **cells}


def table(rows: list[dict[str, str]]) -> str:
    """Return rows of the same columns as a Markdown table."""
    columns = list(rows[0])
    lines = [
        "| " + " | ".join(columns) + " |",
        "|---" + "|---:" * (len(columns) - 1) + "|",
    ]
    return "\n".join(
        [*lines, *("| " + " | ".join(cells.values()) + " |" for cells in rows)]
    )


def chart(models: Mapping[str, list[dict[str, str]]]) -> str:
    """Return an SVG with a panel a model: the mean of the five figures over the number of edits, a line an editor."""
    width, height, left, top, room = 560, 320, 44, 40, 130
    most = (
        max(math.log10(int(row["edits"])) for rows in models.values() for row in rows)
        or 1.0
    )
    editors = list(
        dict.fromkeys(row["editor"] for rows in models.values() for row in rows)
    )
    parts = []
    for panel, (model, rows) in enumerate(models.items()):
        x0, x1, y0, y1 = (
            panel * width + left,
            (panel + 1) * width - room,
            height - 36,
            top,
        )
        parts.append(
            f'<text x="{x0}" y="20" font-weight="bold">{model}: mean of five figures, %</text>'
        )
        for percent in range(0, 101, 20):
            y = y0 - (y0 - y1) * percent / 100
            parts.append(
                f'<path d="M{x0} {y:.1f}H{x1}" stroke="#8884"/><text x="{x0 - 30}" y="{y + 4:.1f}">{percent}</text>'
            )
        for edits in sorted({int(row["edits"]) for row in rows}):
            x = x0 + (x1 - x0) * math.log10(edits) / most
            parts.append(
                f'<text x="{x:.1f}" y="{y0 + 18}" text-anchor="middle">{edits:,}</text>'
            )
        parts.append(
            f'<text x="{(x0 + x1) / 2:.0f}" y="{y0 + 33}" text-anchor="middle">edits in a row</text>'
        )
        ends: list[float] = []
        last = {row["editor"]: float(row["mean"]) for row in rows}
        for editor in sorted(last, key=lambda name: -last[name]):
            colour = f"hsl({360 * editors.index(editor) // len(editors)} 70% 45%)"
            points = [
                (
                    x0 + (x1 - x0) * math.log10(int(r["edits"])) / most,
                    y0 - (y0 - y1) * float(r["mean"]) / 100,
                )
                for r in rows
                if r["editor"] == editor
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            at = max(
                [points[-1][1] + 4, *(end + 14 for end in ends[-1:])]
            )  # names do not cover each other
            ends.append(at)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
            parts.append(
                f'<text x="{points[-1][0] + 8:.1f}" y="{at:.1f}" fill="{colour}">{editor}</text>'
            )
    size = f'width="{width * len(models)}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12" fill="#888"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("records/compare"))
    parser.add_argument(
        "--chart", type=Path, metavar="SVG", help="draw the means into this file"
    )
    args = parser.parse_args(argv)
    reports = [
        json.loads(path.read_text("utf-8"))
        for path in sorted(args.folder.rglob("eval/**/report.json"))
    ]
    if not reports:
        print(
            f"{args.folder}: no reports; scripts/compare_editors.sh makes them",
            file=sys.stderr,
        )
        return 2
    reports.sort(
        key=lambda r: (r["model"]["name"], label(r), r["protocol"]["sequential"])
    )
    rows: dict[str, list[dict[str, str]]] = {}
    for report in reports:
        rows.setdefault(report["model"]["name"], []).append(row(report))
    for model, cells in rows.items():
        print(f"\n## {model}\n\n{table(cells)}")
        sent = [
            r
            for r in reports
            if r["model"]["name"] == model and "routing" in r["milestones"][-1]
        ]
        if sent:
            print(
                f"\nSent to the right edit / to another / to none, in %:\n\n{table([routing(r) for r in sent])}"
            )
    if args.chart is not None:
        args.chart.write_text(chart(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
