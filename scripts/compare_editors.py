"""Print the reports of several editors as Markdown tables, one a model.

    python scripts/compare_editors.py records/compare
    python scripts/compare_editors.py records/compare --chart comparison.svg   # and draw the column "mean"

`scripts/compare_editors.sh` makes the reports. Figures are in %: teacher-forced as in the papers (tf_liveedit), and in
parentheses those of free generation (ar).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedit_cli.reports.charts import plotter, write_chart

FIGURES = {
    "Rel": ("reliability",),
    "T-Gen": ("generality.text",),
    "M-Gen": ("generality.image",),
    "T-Loc": ("locality.text",),
    # published data have one column where EmojiKB has three
    "M-Loc": (
        "locality.image",
        "locality.near",
        "locality.same_image",
        "locality.far",
    ),
}

# key and value of a hyper-parameter that is not the default, and how a row is marked by it
MARKS = (
    ("target", "connector", "connector"),
    ("variant", "paper", "paper"),
    ("mode", "reference", "reference"),
    ("external", False, "without external"),
    ("collaboration", False, "without collaboration"),
)


def label(report: Mapping[str, Any]) -> str:
    """Return the editor, and what distinguishes it from another row of the same editor."""
    hparams = report["hparams"]
    marks = [text for key, value, text in MARKS if hparams.get(key) == value]
    together = report["protocol"].get("edit_batch", 1)
    if together > 1:
        marks.append(f"({together} at once)")
    return " ".join([report["editor"], *marks])


def figure(scores: Mapping[str, Any], names: tuple[str, ...]) -> float:
    """Return the mean in % of those columns that there are."""
    means = [scores[name]["mean"] for name in names if name in scores]
    return 100 * statistics.fmean(means)


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
    seconds = report["cost"].get("seconds_per_edit")  # not known of --edited
    return {
        "editor": label(report),
        "edits": str(edits),
        "cases": str(after["cases"]),
        **cells,
        "mean": f"{mean:.1f}",
        "s an edit": "-" if seconds is None else f"{seconds['mean']:.3f}",
    }


def routing(report: Mapping[str, Any]) -> dict[str, str]:
    """Return where the queries of a report were sent: to the right edit, another one, or none."""
    edits = report["protocol"]["sequential"]
    after = next(
        m for m in report["milestones"] if m["edits"] == edits and not m["short_group"]
    )
    names = {
        "reliability": "Rel",
        "generality.text": "T-Gen",
        "generality.image": "M-Gen",
        "locality.near": "near",
        "locality.same_image": "same_image",
        "locality.far": "far",
    }
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


def draw_chart(models: Mapping[str, list[dict[str, str]]], file: Path) -> None:
    """Draw a panel a model: the mean of the five figures over the number of edits, a line an editor."""
    plt = plotter(file)
    editors = list(
        dict.fromkeys(row["editor"] for rows in models.values() for row in rows)
    )
    colours = plt.get_cmap("tab10" if len(editors) <= 10 else "tab20")
    figure, panels = plt.subplots(
        1, len(models), figsize=(6.5 * len(models), 4), squeeze=False
    )
    for panel, (model, rows) in zip(panels[0], models.items(), strict=True):
        for number, editor in enumerate(editors):
            own = [row for row in rows if row["editor"] == editor]
            edits = [int(row["edits"]) for row in own]
            means = [float(row["mean"]) for row in own]
            panel.plot(edits, means, marker=".", label=editor, color=colours(number))
        panel.set_xscale("log")
        marks = sorted({int(row["edits"]) for row in rows})
        panel.set_xticks(marks, [f"{mark:,}" for mark in marks])
        panel.set_xticks([], minor=True)
        panel.set_ylim(0, 100)
        panel.grid(axis="y", alpha=0.3)
        panel.set_title(f"{model}: mean of five figures, %")
        panel.set_xlabel("edits in a row")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    write_chart(figure, file)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("records/compare"))
    parser.add_argument(
        "--chart",
        type=Path,
        metavar="FILE",
        help="draw the means into this file, .svg or .png (needs the extra plots)",
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
        draw_chart(rows, args.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
