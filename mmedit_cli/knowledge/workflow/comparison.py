"""Finished evaluations side by side: which editor is better at what, by tests on the cases that all of them have."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.evaluation.intervals import score_with_interval
from mmedit_cli.knowledge.evaluation.paired import Difference, difference, holm
from mmedit_cli.records import Run

Json = dict[str, Any]
# of a protocol, what changes no score
_SPEED_ONLY = ("batch_size", "shard", "report_at")
_LEVEL = 0.05


@dataclass(frozen=True)
class ScoredRun:
    """A finished evaluation, or several seeds and orders of one, and what each case scored after so many edits.

    scores: by protocol and column, the score of each case, a mean over the runs where there are several.
    concepts: of each case, what it shares with those that are not independent of it.
    """

    name: str
    folder: Path
    report: Json
    edits: int
    scores: dict[tuple[str, str], dict[str, float]] = field(repr=False)
    concepts: dict[str, str] = field(repr=False)

    def with_intervals(self) -> dict[tuple[str, str], Json]:
        """Return the mean, n and 95 % interval over concepts of each score."""
        found = {}
        for key, of_cases in self.scores.items():
            concepts = [self.concepts[case] for case in of_cases]
            values = list(of_cases.values())
            found[key] = score_with_interval(values, concepts)
        return found


@dataclass(frozen=True)
class Row:
    """One comparison: a score of two runs."""

    protocol: str
    column: str
    first: str
    second: str
    found: Difference
    p_holm: float | None

    @property
    def better(self) -> str | None:
        """The name of the run that is better, None where the test cannot tell."""
        if self.p_holm is None or self.p_holm >= _LEVEL:
            return None
        return self.second if self.found.mean > 0 else self.first


@dataclass(frozen=True)
class Comparison:
    """All comparisons of some runs; p is raised for all tests of all rows."""

    runs: Sequence[ScoredRun]
    rows: Sequence[Row]

    def describe(self) -> Json:
        """Return the comparison as plain values."""
        runs = []
        for run in self.runs:
            report = run.report
            runs.append(
                {
                    "name": run.name,
                    "editor": report["editor"],
                    "model": report["model"]["name"],
                    "data": report["data"]["name"],
                    "edits": run.edits,
                    "run": str(run.folder),
                }
            )
        rows = []
        for row in self.rows:
            found = row.found
            rows.append(
                {
                    "protocol": row.protocol,
                    "column": row.column,
                    "first": row.first,
                    "second": row.second,
                    "mean_first": found.first,
                    "mean_second": found.second,
                    "difference": found.mean,
                    "ci95": found.ci95,
                    "p": found.p,
                    "p_holm": row.p_holm,
                    "better": row.better,
                    "n": found.n,
                    "concepts": found.clusters,
                    "smallest": found.smallest,
                }
            )
        return {"runs": runs, "comparisons": rows}


def compare(
    folders: Sequence[Path],
    *,
    edits: int | None = None,
    protocols: Sequence[str] = (),
) -> Comparison:
    """Compare finished evaluations pair by pair, after as many edits as given, or after all.

    `protocols`: those that are compared; without any, the first one.

    Raises UserError for fewer than two runs, for one that is not finished or no evaluation of knowledge, and where
    data, protocol or orders differ.
    """
    different = list(dict.fromkeys(folder.resolve() for folder in folders))
    if len(different) < 2:
        named = "one run alone" if different else "no runs"
        raise UserError(
            f"{named}: nothing to compare",
            "name two or more, or --where editor=ft,editor=lora; `mmedit report` lists them",
        )
    reports = [_report(folder) for folder in different]
    _refuse_mixed(different, reports)
    asked = protocols or reports[0]["protocol"]["protocols"][:1]
    names = _names(different, reports)
    runs = []
    for name, folder, report in zip(names, different, reports, strict=True):
        runs.append(_scored(name, folder, report, edits, asked))
    found = list(_differences(runs))
    raised = holm([one[-1].p for one in found])
    rows = [Row(*one, p) for one, p in zip(found, raised, strict=True)]
    return Comparison(runs, rows)


def _report(folder: Path) -> Json:
    report = Run.read_report(folder)
    if not {"milestones", "protocol", "data", "editor", "model"} <= report.keys():
        raise UserError(
            f"{folder}: not an evaluation of an editor of knowledge",
            "compare what `mmedit eval EDITOR` has made",
        )
    return report


def _refuse_mixed(folders: Sequence[Path], reports: Sequence[Json]) -> None:
    """Raise UserError if not all runs asked the same questions in the same way, and say what differs."""
    first = _asked(reports[0])
    problems = []
    for folder, report in zip(folders, reports, strict=True):
        for key, value in _asked(report).items():
            expected = first.get(key)
            if value != expected:
                problems.append(f"{folder}: {key} {value}, not {expected}")
    if problems:
        raise UserError(
            problems,
            f"runs are compared on the same questions; the first is {folders[0]}",
        )


def _asked(report: Json) -> Json:
    """Return what has to be the same for two runs to be comparable."""
    data = report["data"]
    protocol = report["protocol"]
    return {
        "data": data["name"],
        "cases": data["cases"],
        "fingerprint of the data": data["fingerprint"],
        **{key: protocol[key] for key in protocol if key not in _SPEED_ONLY},
        "orders": report.get("orders", 1),
    }


def _names(folders: Sequence[Path], reports: Sequence[Json]) -> list[str]:
    """Return short names that tell the runs apart: the editor; with the model, and the run, where it has to be."""
    editors: list[str] = []
    with_models: list[str] = []
    with_ids: list[str] = []
    for folder, report in zip(folders, reports, strict=True):
        editor = report["editor"]
        model = report["model"]["name"]
        editors.append(editor)
        with_models.append(f"{editor} on {model}")
        with_ids.append(f"{editor} {folder.name[:6]}")
    for names in (editors, with_models, with_ids):
        distinct = set(names)
        if len(distinct) == len(names):
            return names
    return [str(folder) for folder in folders]


def _scored(
    name: str, folder: Path, report: Json, edits: int | None, protocols: Sequence[str]
) -> ScoredRun:
    """Read the lines of a run, or of each of its runs."""
    folders = [Path(run["run"]) for run in report.get("runs", ())]
    sequential = report["protocol"]["sequential"]
    lines: list[Json] = []
    for part in folders or [folder]:
        lines += _lines_after(part, sequential, edits)
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    concepts: dict[str, str] = {}
    for line in lines:
        case = str(line["case"])
        concepts[case] = str(line.get("concept", case))
        for key, score in _scores(line, protocols):
            of_cases = scores.setdefault(key, {})
            of_cases.setdefault(case, []).append(score)
    means = {key: _means(of_cases) for key, of_cases in scores.items()}
    made = lines[0]["edits"]
    return ScoredRun(name, folder, report, made, means, concepts)


def _means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {case: statistics.fmean(of_case) for case, of_case in scores.items()}


def _lines_after(folder: Path, sequential: int, edits: int | None) -> list[Json]:
    """Return what a run has of its whole groups after so many edits, or after all of them."""
    run = Run.view(folder)
    lines = _whole_groups(run.read("cases"), sequential)
    made = {line["edits"] for line in lines}
    milestones = sorted(made)
    if not milestones:
        raise UserError(f"{folder}: its cases.jsonl is not there", "make the run anew")
    last = milestones[-1]
    wanted = last if edits is None else edits
    if wanted not in milestones:
        texts = map(str, milestones)
        known = ", ".join(texts)
        problem = f"--edits {wanted}: {folder} was not asked then"
        hint = f"use one of {known}"
        raise UserError(problem, hint)
    return [line for line in lines if line["edits"] == wanted]


def _whole_groups(lines: Sequence[Json], sequential: int) -> Sequence[Json]:
    """Return the lines of groups with as many edits as the others; all, where no group has as many."""
    sizes: dict[int, int] = {}
    for line in lines:
        group = line["group"]
        sizes[group] = max(sizes.get(group, 0), line["edits"])
    whole = [line for line in lines if sizes[line["group"]] == sequential]
    return whole or lines


def _scores(
    line: Mapping[str, Any], protocols: Sequence[str]
) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield (protocol, column) and score of a case."""
    found = line["scores"]
    for protocol in protocols:
        if protocol not in found:
            known = ", ".join(found)
            raise UserError(
                f"protocol {protocol}: not in these runs",
                f"one of {known}",
            )
        for column, score in found[protocol].items():
            if score is not None:
                yield (protocol, column), score


def _differences(
    runs: Sequence[ScoredRun],
) -> Iterator[tuple[str, str, str, str, Difference]]:
    """Yield protocol, column, both names and the difference, of every score that two runs share."""
    for key in runs[0].scores:
        protocol, column = key
        for first, second in combinations(runs, 2):
            ours = first.scores.get(key, {})
            theirs = second.scores.get(key, {})
            if ours.keys() & theirs.keys():
                found = difference(ours, theirs, first.concepts)
                yield protocol, column, first.name, second.name, found
