"""Charts of compared evaluations: their differences, scores over edits, what is retained, and quality against cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmedit_cli.errors import UserError
from mmedit_cli.reports.charts import plotter, write_chart
from mmedit_cli.reports.scores import column_name

if TYPE_CHECKING:
    from mmedit_cli.knowledge.workflow.comparison import Comparison, ScoredRun

Json = Mapping[str, Any]
Kind = Literal["differences", "edits", "retention", "cost"]
_MOST_PANELS = 6
_WIDTH = 4.0  # inches of a panel
_HEIGHT = 3.0


def draw(found: Comparison, what: Kind, file: Path) -> None:
    """Draw one kind of chart of a comparison into a file.

    Raises UserError as `plotter` does, and where the runs have nothing to draw: one milestone, or no cost.
    """
    kinds: dict[Kind, Callable[[Comparison, Any], Any]] = {
        "differences": _differences,
        "edits": _over_edits,
        "retention": _retention,
        "cost": _cost,
    }
    plt = plotter(file)
    figure = kinds[what](found, plt)
    write_chart(figure, file)
    plt.close(figure)


def _differences(found: Comparison, plt: Any) -> Any:
    """Draw all differences with their intervals, a panel a pair of runs."""
    pairs: dict[tuple[str, str], list[Any]] = {}
    for row in found.rows:
        of_pair = pairs.setdefault((row.first, row.second), [])
        of_pair.append(row)
    most = max(map(len, pairs.values()))
    figure, panels = plt.subplots(
        1,
        len(pairs),
        figsize=(6 * len(pairs), 1.2 + 0.3 * most),
        squeeze=False,
    )
    for panel, (pair, rows) in zip(panels[0], pairs.items(), strict=True):
        rows.reverse()
        for height, row in enumerate(rows):
            colour = "tab:gray" if row.better is None else "tab:blue"
            panel.plot(100 * row.found.mean, height, "o", color=colour)
            if row.found.ci95 is not None:
                ends = [100 * end for end in row.found.ci95]
                panel.plot(ends, [height, height], color=colour)
        labels = [column_name(row.column) for row in rows]
        panel.set_yticks(range(len(rows)), labels)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_xlabel(f"{pair[0]} better  <  points  >  {pair[1]} better")
    return figure


def _over_edits(found: Comparison, plt: Any) -> Any:
    """Draw the first scores over the number of edits, a panel a score and a line a run."""
    protocol = found.rows[0].protocol
    columns = [row.column for row in found.rows if row.protocol == protocol]
    shown = list(dict.fromkeys(columns))[:_MOST_PANELS]
    if all(len(_whole(run)) < 2 for run in found.runs):
        raise UserError(
            "the runs were asked once: nothing to draw over edits",
            "make them with --report-at 1,10,100",
        )
    figure, panels = _panels(plt, len(shown))
    for panel, column in zip(panels, shown, strict=True):
        for run in found.runs:
            _line(panel, run, protocol, column)
        panel.set_title(f"{column_name(column)}, %")
        _axes_over_edits(panel)
    panels[0].legend(frameon=False)
    return figure


def _line(panel: Any, run: ScoredRun, protocol: str, column: str) -> None:
    """Draw a score of a run over its milestones, with its intervals."""
    edits = []
    means = []
    below = []
    above = []
    for milestone in _whole(run):
        score = milestone["scores"][protocol].get(column)
        if score is None or score["mean"] is None:
            continue
        mean = 100 * score["mean"]
        low, high = score["ci95"] or (score["mean"], score["mean"])
        edits.append(milestone["edits"])
        means.append(mean)
        below.append(max(0.0, mean - 100 * low))
        above.append(max(0.0, 100 * high - mean))
    panel.errorbar(
        edits,
        means,
        yerr=[below, above],
        marker=".",
        capsize=2,
        label=run.name,
    )


def _retention(found: Comparison, plt: Any) -> Any:
    """Draw what is retained of the edits of each stretch, a panel a run and a line a stretch."""
    protocol = found.rows[0].protocol
    kept = []
    for run in found.runs:
        retention = run.report.get("retention", {})
        if len(retention.get("milestones", ())) > 1:
            kept.append((run.name, retention))
    if not kept:
        raise UserError(
            "the runs were asked once: nothing is known of what they retain",
            "make them with --report-at 1,10,100; runs over several orders have none",
        )
    figure, panels = _panels(plt, len(kept))
    for panel, (name, retention) in zip(panels, kept, strict=True):
        asked = retention["milestones"]
        matrix = retention[protocol]["matrix"]
        for cohort, shares in zip(retention["cohorts"], matrix, strict=True):
            _stretch(panel, asked, shares, cohort)
        panel.set_title(f"{name}: Rel retained, %")
        _axes_over_edits(panel)
        panel.legend(title="edits", frameon=False)
    return figure


def _stretch(
    panel: Any, asked: Sequence[int], shares: Sequence[float | None], cohort: str
) -> None:
    places = []
    values = []
    for edits, share in zip(asked, shares, strict=True):
        if share is not None:
            places.append(edits)
            values.append(100 * share)
    panel.plot(places, values, marker=".", label=cohort)


def _cost(found: Comparison, plt: Any) -> Any:
    """Draw the mean of the compared scores against the seconds of an edit, a mark a run."""
    figure, (panel,) = _panels(plt, 1)
    drawn = 0
    for run in found.runs:
        seconds = _seconds(run)
        if seconds is None:
            continue
        means = [statistics.fmean(scores.values()) for scores in run.scores.values()]
        height = 100 * statistics.fmean(means)
        panel.plot(seconds, height, "o")
        panel.annotate(
            run.name,
            (seconds, height),
            xytext=(5, 3),
            textcoords="offset points",
        )
        drawn += 1
    if not drawn:
        raise UserError("how long an edit took is not known of these runs")
    panel.set_xscale("log")
    panel.set_xlabel("seconds an edit")
    panel.set_title("mean of the compared scores, %")
    panel.margins(x=0.25, y=0.15)
    return figure


def _seconds(run: ScoredRun) -> float | None:
    """Return how long an edit took on the mean; None where it is not known."""
    cost = run.report.get("cost", {})
    found = cost.get("seconds_per_edit")
    return None if found is None else float(found["mean"])


def _panels(plt: Any, count: int) -> tuple[Any, Sequence[Any]]:
    """Return a figure, and so many panels in rows of at most three."""
    across = min(count, 3)
    rows = -(-count // across)
    size = (_WIDTH * across, _HEIGHT * rows)
    figure, grid = plt.subplots(
        rows,
        across,
        figsize=size,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def _axes_over_edits(panel: Any) -> None:
    panel.set_xscale("log")
    panel.set_ylim(-3, 103)
    panel.set_xlabel("edits in a row")


def _whole(run: ScoredRun) -> list[Json]:
    """Return the milestones of whole groups; all, where there are none."""
    milestones = run.report["milestones"]
    whole = [m for m in milestones if not m["short_group"]]
    return whole or list(milestones)
