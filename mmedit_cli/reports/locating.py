"""How the sweep of an editor's layers looks: a table with a bar a layer, and the same as a chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedit_cli.output import Output
from mmedit_cli.reports.charts import plotter, write_chart

_BAR = 20  # characters of 100 %
_PARTS = {"reliability": "Rel", "generality": "Gen", "locality": "Loc"}


def print_candidates(out: Output, report: Mapping[str, Any]) -> None:
    """Print what each layer scores, the layers that were chosen, and the file to use them with."""

    def show() -> None:
        editor = report["editor"]
        model = report["model"]["name"]
        data = report["data"]
        swept = report["swept"]
        about = f"{editor} on {model}, {data['name']}"
        out.line(f"{about}: {data['cases']} cases, %")
        header = [swept, *_PARTS.values(), "score", "", "s an edit", ""]
        rows = []
        for candidate in report["candidates"]:
            rows.append(_row(report, candidate))
        out.table(header, rows)
        out.line("  score: the harmonic mean of Rel, Gen and Loc")
        chosen = named(report["chosen"])
        out.line(f"{swept} {chosen}: {report['file']}")

    out.result(report, show)


def named(value: Any) -> str:
    """Return layers as people write them."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(report: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[str]:
    value = candidate["value"]
    if "score" not in candidate:
        return [named(value), "", "", "", "-", "", "", candidate["problem"]]
    marks = []
    if value == report["present"]:
        marks.append("present")
    if value == report["chosen"]:
        marks.append("chosen")
    parts = []
    for part in _PARTS:
        mean = candidate.get(part)
        parts.append("-" if mean is None else f"{100 * mean:.1f}")
    score = candidate["score"]
    return [
        named(value),
        *parts,
        f"{100 * score:.1f}",
        "█" * round(_BAR * score),
        f"{candidate['seconds_per_edit']:.3f}",
        ", ".join(marks),
    ]


def draw_candidates(report: Mapping[str, Any], file: Path) -> None:
    """Draw score, Rel, Gen and Loc over the layers; raise UserError without matplotlib, or for another ending."""
    plt = plotter(file)
    figure, panel = plt.subplots(figsize=(7, 4))
    scored = [row for row in report["candidates"] if "score" in row]
    names = [named(row["value"]) for row in scored]
    for key, label in {**_PARTS, "score": "score"}.items():
        heights = []
        for row in scored:
            share = row.get(key, float("nan"))
            heights.append(100 * share)
        width = 2.5 if key == "score" else 1.0
        panel.plot(
            names,
            heights,
            marker=".",
            label=label,
            linewidth=width,
        )
    chosen = named(report["chosen"])
    if chosen in names:
        panel.axvline(
            chosen,
            color="grey",
            linestyle=":",
            label="chosen",
        )
    panel.set_ylim(0, 100)
    panel.grid(axis="y", alpha=0.3)
    panel.set_xlabel(report["swept"])
    model = report["model"]["name"]
    panel.set_title(f"{report['editor']} on {model}, %")
    panel.legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1),
        frameon=False,
    )
    write_chart(figure, file)
    plt.close(figure)
