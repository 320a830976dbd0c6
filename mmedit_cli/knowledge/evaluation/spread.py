"""Several evaluations of the same edits as one: all their lines together, and how their means differ."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from math import factorial
from typing import Any

from mmedit_cli.errors import UserError

Json = dict[str, Any]


def orders_of(count: int, orders: int) -> list[list[int]]:
    """Return so many different orders of `count` cases, the given one first; what comes first does not depend on more.

    Raises UserError if there are not as many.
    """
    if orders < 1:
        raise UserError(f"--orders {orders}: must be at least 1")
    # 20! is more than anyone asks for
    most = factorial(min(count, 20))
    if orders > most:
        raise UserError(
            f"--orders {orders}: of {count} cases there are {most}",
            f"use --orders {most} or less",
        )
    found = [list(range(count))]
    source = random.Random(0)
    while len(found) < orders:
        drawn = [source.random() for _ in range(count)]
        order = sorted(range(count), key=drawn.__getitem__)
        if order not in found:
            found.append(order)
    return found


def together(runs: Sequence[Sequence[Json]]) -> list[Json]:
    """Return the lines of several runs as those of one: the groups of each run come after those of the runs before."""
    lines = []
    first = 0
    for run in runs:
        groups = 1 + max(line["group"] for line in run)
        for line in run:
            lines.append({**line, "group": first + line["group"]})
        first += groups
    return lines


def with_spread(
    milestones: Sequence[Json], runs: Sequence[Sequence[Json]]
) -> list[Json]:
    """Return the milestones of all runs together, each score with `over_runs`: what it was in each of them.

    `runs` are the milestones of each run. See `over_runs`.
    """
    by_place = []
    for run in runs:
        by_place.append({_place(milestone): milestone["scores"] for milestone in run})
    found = []
    for milestone in milestones:
        place = _place(milestone)
        in_runs = [milestones_of_run.get(place, {}) for milestones_of_run in by_place]
        scores: Json = {}
        for protocol, columns in milestone["scores"].items():
            tables = [scores_of_run.get(protocol, {}) for scores_of_run in in_runs]
            scores[protocol] = {}
            for column, score in columns.items():
                means = [table.get(column, {}).get("mean") for table in tables]
                scores[protocol][column] = {**score, "over_runs": over_runs(means)}
        found.append({**milestone, "scores": scores})
    return found


def over_runs(means: Sequence[float | None]) -> Json:
    """Return the mean of each run (None where it has none), and their mean, standard deviation, least and greatest.

    The standard deviation is that of a sample, sqrt(sum((m - mean)^2) / (R - 1)) over R runs; None for fewer than two.
    """
    there = [mean for mean in means if mean is not None]
    summary: Json = {"means": list(means), "mean": None, "sd": None}
    if there:
        summary["mean"] = statistics.fmean(there)
    if len(there) > 1:
        summary["sd"] = statistics.stdev(there)
    summary["min"] = min(there, default=None)
    summary["max"] = max(there, default=None)
    return summary


def _place(milestone: Mapping[str, Any]) -> tuple[int, bool]:
    return milestone["edits"], milestone["short_group"]
