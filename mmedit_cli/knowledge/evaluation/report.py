"""From the lines of a run to its report: means with intervals, what is retained over time, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mmedit_cli.knowledge.evaluation.intervals import score_with_interval
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.types import EditCase, Query

FORMAT = 1
CASE, CONCEPT = "case", "concept"  # what intervals may be over
# what a picture of an example shows, and the columns it may be taken from, the best first
_PANELS = {
    "request": ("reliability",),
    "general": ("generality.image", "generality.both", "generality.text"),
    "local": ("locality.near", "locality.image", "locality.same_image"),
}


def build_report(
    head: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    edits: Sequence[Mapping[str, Any]],
    sequential: int,
    *,
    unit: str = CASE,
) -> dict[str, Any]:
    """Return the report of an evaluation.

    `head` is copied to the front; `cases` and `edits` are the lines of the run. `unit` is the key of the lines whose
    value cases share that are not independent (CASE or CONCEPT): intervals are over these. Everything but `cost`
    depends on the numbers alone, not on when or how fast they were made.
    """
    sizes: dict[int, int] = {}
    for line in cases:
        group = line["group"]
        sizes[group] = max(sizes.get(group, 0), line["edits"])
    in_whole_groups = [line for line in cases if sizes[line["group"]] == sequential]
    in_short_group = [line for line in cases if sizes[line["group"]] < sequential]
    milestones = []
    for edits_made in sorted({line["edits"] for line in cases}):
        for short, some in ((False, in_whole_groups), (True, in_short_group)):
            lines = [line for line in some if line["edits"] == edits_made]
            if lines:
                milestones.append(_milestone(edits_made, short, lines, unit))
    return {
        "format": FORMAT,
        **head,
        "milestones": milestones,
        "retention": _retention(in_whole_groups),
        **_unmoved(edits),
        "cost": _cost(edits),
    }


def _unmoved(edits: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many edits took steps that left their loss exactly where it was, if there are any."""
    count = 0
    for line in edits:
        losses = line.get("losses", ())
        if len(losses) > 1 and all(loss == losses[0] for loss in losses):
            count += 1
    return {"unmoved": count} if count else {}


def _milestone(
    edits_made: int, short: bool, lines: Sequence[Mapping[str, Any]], unit: str
) -> dict[str, Any]:
    """Return the scores after so many edits; `short` marks the last group, which had fewer edits than the others."""
    units = [line[unit] for line in lines]
    scores: dict[str, Any] = {}
    for protocol in lines[0]["scores"]:
        by_case = [line["scores"][protocol] for line in lines]
        columns = _in_order(by_case)
        summaries = {}
        for column in columns:
            summaries[column] = _summary(protocol, column, lines, units)
        scope = [_scope(columns_of_case) for columns_of_case in by_case]
        scores[protocol] = {**summaries, "scope": _over(scope, units)}
    milestone: dict[str, Any] = {
        "edits": edits_made,
        "groups": len({line["group"] for line in lines}),
        "cases": len(lines),
        "short_group": short,
        "scores": scores,
    }
    if unit == CONCEPT:
        milestone["concepts"] = len(set(units))
    if "routing" in lines[0]:
        milestone["routing"] = _routing([line["routing"] for line in lines])
    return milestone


def _in_order(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of some tables in the order in which they appear first."""
    found: dict[str, None] = {}
    for table in tables:
        found.update(dict.fromkeys(table))
    return list(found)


def _routing(
    by_case: Sequence[Mapping[str, Sequence[str]]],
) -> dict[str, dict[str, float]]:
    """Return by column which share of its queries was sent to the case's own edit, to another one, and to none."""
    shares: dict[str, dict[str, float]] = {}
    for column in _in_order(by_case):
        sent: list[str] = []
        for columns in by_case:
            sent.extend(columns.get(column, ()))
        if sent:
            shares[column] = {
                verdict: sent.count(verdict) / len(sent)
                for verdict in ("right", "other", "none")
            }
    return shares


def _summary(
    protocol: str,
    column: str,
    lines: Sequence[Mapping[str, Any]],
    units: Sequence[str],
) -> dict[str, Any]:
    after = []
    before = []
    for line in lines:
        base = line["base"][protocol]
        score = line["scores"][protocol].get(column)
        after.append(score)
        if score is not None and column in base:
            before.append(base[column])
    summary = _over(after, units)
    if before:
        summary["before"] = statistics.fmean(before)
    return summary


def _over(scores: Sequence[float | None], units: Sequence[str]) -> dict[str, Any]:
    """Return mean, n and interval of the scores that are there; scores of the same unit are not independent."""
    values = []
    clusters = []
    for score, unit in zip(scores, units, strict=True):
        if score is not None:
            values.append(score)
            clusters.append(unit)
    return score_with_interval(values, clusters)


def _scope(scores: Mapping[str, float]) -> float | None:
    """Return 1 if the edit holds and every locality probe is as before (ScopeCorrect), else 0; None without probes."""
    local = [
        score for column, score in scores.items() if column.startswith("locality.")
    ]
    if not local:
        return None
    return float(scores["reliability"] == 1 and all(score == 1 for score in local))


def _retention(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by protocol, the reliability of each cohort of edits at each later milestone.

    `matrix[c][m]` is the mean over the edits made between milestone c-1 and c, asked at milestone m (null before it);
    `backward_transfer` is the mean change from an edit's first milestone to the last one.
    """
    milestones = sorted({line["edits"] for line in cases})
    if not milestones:
        return {}
    cohorts = list(pairwise([0, *milestones]))
    result: dict[str, Any] = {
        "milestones": milestones,
        "cohorts": [f"{start + 1}-{stop}" for start, stop in cohorts],
    }
    for protocol in cases[0]["scores"]:
        reliability = {}
        for line in cases:
            key = (line["group"], line["edits"], line["index"])
            reliability[key] = line["scores"][protocol]["reliability"]
        matrix = []
        for start, stop in cohorts:
            row: list[float | None] = []
            for milestone in milestones:
                retained = [
                    score
                    for (_, edits, index), score in reliability.items()
                    if edits == milestone and start <= index < stop
                ]
                row.append(statistics.fmean(retained) if milestone >= stop else None)
            matrix.append(row)
        changes = []
        for (group, edits, index), score in reliability.items():
            first = next(milestone for milestone in milestones if milestone > index)
            if edits == first:
                changes.append(reliability[group, milestones[-1], index] - score)
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
    by_uid = {case.uid: case for case in cases}
    shown = []
    for line in last[::step][:most]:
        uid = line["case"]
        answers = line["answers"]
        (request,) = answers["reliability"]
        panels = _panels(by_uid[uid], answers)
        shown.append({"case": uid, **request, "panels": panels})
    return shown


def questions(cases: Sequence[EditCase]) -> Iterator[dict[str, Any]]:
    """Yield for each case what is asked about it, by column: the prompts and pictures, in the order of the answers."""
    for case in cases:
        asked = {}
        for column, queries in case.columns():
            if not column.startswith("needs."):
                asked[column] = [_described(query) for query in queries]
        yield {"case": case.uid, "questions": asked}


def _described(query: Query) -> dict[str, str]:
    """Return what a query shows and asks."""
    shown = {"prompt": query.prompt}
    if query.image is not None:
        shown["image"] = str(query.image)
        shown["background"] = query.background
    return shown


def _panels(
    case: EditCase, answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Return the queries of a case that can be shown beside each other, with their answers."""
    columns = dict(case.columns())
    panels = {}
    for kind, names in _PANELS.items():
        for name in names:
            panel = _panel(columns.get(name, ()), answers.get(name, ()))
            if panel is not None:
                panels[kind] = panel
                break
    return panels


def _panel(
    queries: Sequence[Query], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return the first query with a picture, and its answers; None without one, or where nothing was generated."""
    for query, said in zip(queries, answers, strict=True):
        if query.image is None:
            continue
        if said["after"] is None:
            return None
        return {
            "prompt": query.prompt,
            "image": str(query.image),
            "background": query.background,
            **said,
            "right": answer_match(said["after"], query.target) == 1,
        }
    return None
