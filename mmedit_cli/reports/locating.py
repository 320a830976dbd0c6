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
        editor, model = report["editor"], report["model"]["name"]
        cases = report["data"]["cases"]
        out.line(f"{editor} on {model}, {report['data']['name']}: {cases} cases, %")
        rows = [_row(report, candidate) for candidate in report["candidates"]]
        header = [report["swept"], *_PARTS.values(), "score", "", "s an edit", ""]
        out.table(header, rows)
        out.line("  score: the harmonic mean of Rel, Gen and Loc")
        out.line(f"{report['swept']} {named(report['chosen'])}: {report['file']}")

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
    scored = [row for row in report["candidates"] if "score" in row]
    places = range(len(scored))
    figure, panel = plt.subplots(figsize=(7, 4))
    lines = {**_PARTS, "score": "score"}
    for key, label in lines.items():
        heights = [100 * row.get(key, float("nan")) for row in scored]
        width = 2.5 if key == "score" else 1.0
        panel.plot(places, heights, marker=".", label=label, linewidth=width)
    for place, row in enumerate(scored):
        if row["value"] == report["chosen"]:
            panel.axvline(place, color="grey", linestyle=":", label="chosen")
    panel.set_xticks(list(places), [named(row["value"]) for row in scored])
    panel.set_ylim(0, 100)
    panel.grid(axis="y", alpha=0.3)
    panel.set_xlabel(report["swept"])
    panel.set_title(f"{report['editor']} on {report['model']['name']}, %")
    panel.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    write_chart(figure, file)
    plt.close(figure)
