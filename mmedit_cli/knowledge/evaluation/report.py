"""From the lines of a run to its report: means with intervals, what is retained over time, and what it cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.types import EditCase

FORMAT = 1
_RESAMPLES, _BLOCK = 1000, 100


def build_report(
    head: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    edits: Sequence[Mapping[str, Any]],
    sequential: int,
) -> dict[str, Any]:
    """Return the report of an evaluation.

    `head` is copied to the front; `cases` and `edits` are the lines of the run. Everything but `cost` depends on the
    numbers alone, not on when or how fast they were made.
    """
    sizes: dict[int, int] = {}
    for line in cases:
        sizes[line["group"]] = max(sizes.get(line["group"], 0), line["edits"])
    milestones = []
    for edits_made in sorted({line["edits"] for line in cases}):
        for short in (False, True):
            lines = [
                c
                for c in cases
                if c["edits"] == edits_made
                and (sizes[c["group"]] < sequential) == short
            ]
            if lines:
                milestones.append(_milestone(edits_made, short, lines))
    return {
        "format": FORMAT,
        **head,
        "milestones": milestones,
        "retention": _retention([c for c in cases if sizes[c["group"]] == sequential]),
        **_unmoved(edits),
        "cost": _cost(edits),
    }


def _unmoved(edits: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many edits took steps that left their loss exactly where it was, if there are any."""
    count = 0
    for line in edits:
        losses = line.get("losses", ())
        count += len(losses) > 1 and all(loss == losses[0] for loss in losses)
    return {"unmoved": count} if count else {}


def _milestone(
    edits_made: int, short: bool, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the scores after so many edits; `short` marks the last group, which had fewer edits than the others."""
    scores: dict[str, Any] = {}
    for protocol in lines[0]["scores"]:
        columns = dict.fromkeys(
            column for line in lines for column in line["scores"][protocol]
        )
        scores[protocol] = {
            column: _summary(protocol, column, lines) for column in columns
        }
        scope = [_scope(line["scores"][protocol]) for line in lines]
        scores[protocol]["scope"] = score_with_interval(
            [value for value in scope if value is not None]
        )
    groups = len({line["group"] for line in lines})
    routing = {"routing": _routing(lines)} if "routing" in lines[0] else {}
    return {
        "edits": edits_made, "groups": groups, "cases": len(lines), "short_group": short, "scores": scores, **routing,
    }  # fmt: skip


def _routing(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by column which share of its queries was sent to the case's own edit, to another one, and to none."""
    columns = dict.fromkeys(column for line in lines for column in line["routing"])
    sent = {
        column: [v for line in lines for v in line["routing"].get(column, ())]
        for column in columns
    }
    return {
        c: {name: vs.count(name) / len(vs) for name in ("right", "other", "none")}
        for c, vs in sent.items()
        if vs
    }


def _summary(
    protocol: str, column: str, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    having = [line for line in lines if column in line["scores"][protocol]]
    summary = score_with_interval([line["scores"][protocol][column] for line in having])
    base = [
        line["base"][protocol][column]
        for line in having
        if column in line["base"][protocol]
    ]
    return {**summary, "before": statistics.fmean(base)} if base else summary


def _scope(scores: Mapping[str, float]) -> float | None:
    """Return 1 if the edit holds and every locality probe is as before (ScopeCorrect), else 0; None without probes."""
    local = [
        score for column, score in scores.items() if column.startswith("locality.")
    ]
    if not local:
        return None
    return float(scores["reliability"] == 1 and all(score == 1 for score in local))


def score_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, n, and the 95 % interval of scores from 0 to 1, one a case; None for both where there are none.

    Where each case is right or wrong it is the Wilson score interval of a proportion; elsewhere the bootstrap of
    `mean_with_interval`. Scores that are all the same have no spread to resample: there it is Wilson's interval of
    their mean too, which is wide enough because no scores from 0 to 1 vary more than those that are 0 or 1.
    """
    if not values:
        return {"mean": None, "n": 0, "ci95": None}
    if len(set(values)) == 1 or set(values) <= {0.0, 1.0}:
        mean = statistics.fmean(values)
        return {
            "mean": mean,
            "n": len(values),
            "ci95": wilson_interval(mean, len(values)),
        }
    return mean_with_interval(values)


def wilson_interval(share: float, n: int) -> list[float]:
    """Return both ends of the 95 % score interval of a proportion (Wilson 1927)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / shrink
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return [
        min(low, share),
        max(high, share),
    ]  # rounding never leaves the share itself outside


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, n, and the 95 % bootstrap interval over cases (1,000 resamples, fixed seed).

    The interval is None where the values have no spread: a single one, or all the same.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    summary = {"mean": float(data.mean()), "n": len(data), "ci95": None}
    if len(set(values)) < 2:
        return summary
    source = np.random.default_rng(0)
    means = np.concatenate(
        [
            data[source.integers(0, len(data), (_BLOCK, len(data)))].mean(1)
            for _ in range(_RESAMPLES // _BLOCK)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return {**summary, "ci95": [float(low), float(high)]}


def _retention(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by protocol, the reliability of each cohort of edits at each later milestone.

    `matrix[c][m]` is the mean over the edits made between milestone c-1 and c, asked at milestone m (null before it);
    `backward_transfer` is the mean change from an edit's first milestone to the last one.
    """
    milestones = sorted({c["edits"] for c in cases})
    if not milestones:
        return {}
    cohorts = list(pairwise([0, *milestones]))
    result: dict[str, Any] = {
        "milestones": milestones,
        "cohorts": [f"{a + 1}-{b}" for a, b in cohorts],
    }
    for protocol in cases[0]["scores"]:
        value = {
            (c["group"], c["edits"], c["index"]): c["scores"][protocol]["reliability"]
            for c in cases
        }
        matrix = [
            [
                statistics.fmean(
                    v for (_, e, i), v in value.items() if e == m and a <= i < b
                )
                if m >= b
                else None
                for m in milestones
            ]
            for a, b in cohorts
        ]
        last = milestones[-1]
        changes = [
            value[g, last, i] - v
            for (g, e, i), v in value.items()
            if e == next(m for m in milestones if m > i)
        ]
        result[protocol] = {
            "matrix": matrix,
            "backward_transfer": statistics.fmean(changes),
        }
    return result


def _cost(edits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = sorted(line["seconds"] for line in edits)
    return {
        "edits": len(seconds),
        "seconds_per_edit": {
            "mean": statistics.fmean(seconds),
            "median": statistics.median(seconds),
            "p95": seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
        },
    }


def examples(
    lines: Sequence[Mapping[str, Any]], cases: Sequence[EditCase], most: int = 5
) -> list[dict[str, Any]]:
    """Return a few edits with the answers before and after, spread over the last milestone.

    `panels` are for looking: the request, a question that must follow it, and one that must not.
    """
    most_edits = max(line["edits"] for line in lines)
    last = [line for line in lines if line["edits"] == most_edits]
    step = max(1, len(last) // most)
    by_name = {case.uid: case for case in cases}
    return [
        {
            "case": line["case"],
            **line["answers"]["reliability"][0],
            "panels": _panels(by_name[line["case"]], line),
        }
        for line in last[::step][:most]
    ]


def _panels(case: EditCase, line: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the queries of a case that can be shown beside each other, with their answers."""
    wanted = {
        "request": ("reliability",),
        "general": ("generality.image", "generality.both", "generality.text"),
    }
    wanted["local"] = ("locality.near", "locality.image", "locality.same_image")
    columns, panels = dict(case.columns()), {}
    for kind, names in wanted.items():
        for name in names:
            query = next(
                (q for q in columns.get(name, ()) if q.image is not None), None
            )
            if query is None or kind in panels:
                continue
            said = line["answers"][name][columns[name].index(query)]
            if said["after"] is not None:
                right = answer_match(said["after"], query.target) == 1
                panels[kind] = {
                    "prompt": query.prompt,
                    "image": str(query.image),
                    "background": query.background,
                    **said,
                }
                panels[kind]["right"] = right
    return panels
