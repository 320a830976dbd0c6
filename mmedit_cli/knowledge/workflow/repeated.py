"""Evaluation of an editor with several seeds and orders of the cases: a run for each, and one report over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli.errors import RunError, UserError
from mmedit_cli.knowledge.workflow.evaluation import (
    EvalOptions,
    EvalPlan,
    evaluate,
    intervals,
    open_model,
    plan_evaluation,
    run_evaluation,
    unit_of,
)
from mmedit_cli.knowledge.workflow.run_file import as_run_file
from mmedit_cli.output import Output
from mmedit_cli.records import Run

if TYPE_CHECKING:
    from mmedit_cli.knowledge.models.base import VisionLanguageModel

# of the report of one run, what is not copied to the one over all
_OF_ONE_RUN = (
    "format",
    "seed",
    "milestones",
    "retention",
    "unmoved",
    "cost",
    "ability",
)
_AGAIN = "make the runs anew with --force"


@dataclass(frozen=True)
class Repetitions:
    """Seeds of the editor, and how many orders of the cases: each seed meets each order.

    The first order is that of the data; the others are drawn once for all.
    """

    seeds: Sequence[int] = (0,)
    orders: int = 1

    def __post_init__(self) -> None:
        given = ",".join(map(str, self.seeds))
        problems = []
        for seed in dict.fromkeys(self.seeds):
            if seed < 0:
                problems.append(f"--seeds {given}: {seed} is below 0")
            if self.seeds.count(seed) > 1:
                problems.append(f"--seeds {given}: {seed} stands there twice")
        if not self.seeds:
            problems.append("--seeds: no seed")
        if self.orders < 1:
            problems.append(f"--orders {self.orders}: must be at least 1")
        if problems:
            raise UserError(problems, "e.g. --seeds 0,1,2 --orders 3")

    @property
    def single(self) -> bool:
        """Whether this is one run in the order of the data, as without any of it."""
        return len(self.seeds) * self.orders == 1


@dataclass(frozen=True)
class RepeatedPlan:
    """The plan of each run, the seed and order of each, and where the report over them will be."""

    options: EvalOptions
    runs: Sequence[EvalPlan]
    places: Sequence[Mapping[str, int]]
    config: dict[str, Any]
    folder: Path

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        first = self.runs[0].describe()
        own = {"runs": self.made(), "run": str(self.folder)}
        return {**first, **self.config, **own}

    def made(self) -> list[dict[str, Any]]:
        """Return seed, order and folder of each run."""
        runs = []
        for place, plan in zip(self.places, self.runs, strict=True):
            runs.append({**place, "run": str(plan.folder)})
        return runs


def plan_repeated(options: EvalOptions, repetitions: Repetitions) -> RepeatedPlan:
    """Resolve everything of every run before a model is loaded; raise a UserError if anything cannot be used."""
    from mmedit_cli.knowledge.data.base import is_chained
    from mmedit_cli.knowledge.evaluation.spread import orders_of

    if repetitions.orders > 1 and is_chained(options.data):
        raise UserError(
            f"--orders {repetitions.orders}: cases of {options.data} build on the ones before them",
            "use --seeds alone",
        )
    given = plan_evaluation(options)
    plans = []
    places = []
    orders = orders_of(len(given.cases), repetitions.orders)
    for number, order in enumerate(orders):
        ordered = _in_order(given, number, order)
        for seed in repetitions.seeds:
            plans.append(_with_seed(ordered, seed))
            places.append({"seed": seed, "order": number})
    config = {
        **given.config,
        "command": "eval-spread",
        "seeds": list(repetitions.seeds),
        "orders": repetitions.orders,
        "runs": [plan.folder.name for plan in plans],
    }
    del config["seed"]
    where = given.folder.parent.relative_to(options.records / "eval")
    folder = Run.locate(options.records / "eval-spread" / where, (), config)
    return RepeatedPlan(options, plans, places, config, folder)


def _in_order(plan: EvalPlan, number: int, order: Sequence[int]) -> EvalPlan:
    """Return a plan with its cases in another order; order 0 is the one they have."""
    from mmedit_cli.knowledge.data.base import fingerprint

    if not number:
        return plan
    cases = [plan.cases[index] for index in order]
    data = {**plan.config["data"], "order": number, "fingerprint": fingerprint(cases)}
    config = {**plan.config, "data": data, **intervals(cases, plan.options)}
    return replace(plan, cases=cases, config=config)


def _with_seed(plan: EvalPlan, seed: int) -> EvalPlan:
    """Return a plan with another seed of the editor, in the folder of its own run."""
    config = {**plan.config, "seed": seed}
    folder = Run.locate(plan.folder.parent, (), config)
    options = replace(plan.options, seed=seed)
    return replace(plan, options=options, config=config, folder=folder)


def described(options: EvalOptions, repetitions: Repetitions) -> dict[str, Any]:
    """Return what `evaluate_repeatedly` would do, as plain values."""
    if repetitions.single:
        single = _single(options, repetitions)
        plan = plan_evaluation(single)
        return plan.describe()
    several = plan_repeated(options, repetitions)
    return several.describe()


def _single(options: EvalOptions, repetitions: Repetitions) -> EvalOptions:
    return replace(options, seed=repetitions.seeds[0])


def evaluate_repeatedly(
    options: EvalOptions, repetitions: Repetitions, out: Output | None = None
) -> dict[str, Any]:
    """Evaluate with each seed and order, and return one report; runs that are finished are only read.

    A single seed and order is the plain evaluation. Raises a UserError for bad input, before anything is written.
    """
    talk = out or Output()
    if repetitions.single:
        return evaluate(_single(options, repetitions), talk)
    plan = plan_repeated(options, repetitions)
    return Run.report_once(
        plan.folder,
        lambda: run_repeatedly(plan, talk),
        force=options.force,
        say=talk.note,
    )


def run_repeatedly(plan: RepeatedPlan, out: Output) -> dict[str, Any]:
    """Make the runs that are not finished, one after another on one model, and write the report over all of them."""
    backbone: VisionLanguageModel | None = None
    reports = []
    for number, (place, run) in enumerate(zip(plan.places, plan.runs, strict=True), 1):
        which = f"seed {place['seed']}, order {place['order']}"
        out.note(f"run {number} of {len(plan.runs)}: {which}")
        force = run.options.force
        report = Run.done_before(run.folder, force=force, say=out.note)
        if report is None:
            backbone = backbone or open_model(run, out)
            report = run_evaluation(run, out, backbone)
        reports.append(report)
    environment = reports[0]["environment"]
    made = {key: plan.config[key] for key in ("seeds", "orders")}
    options = {**as_run_file(plan.options), **made}
    options.pop("seed", None)
    with Run.open(
        plan.folder, plan.config, environment, options=options, force=True
    ) as spread:
        report = _over(plan, reports)
        spread.finish(report)
    return report


def _over(plan: RepeatedPlan, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report over all runs."""
    from mmedit_cli.knowledge.evaluation.report import build_report
    from mmedit_cli.knowledge.evaluation.spread import together, with_spread

    cases = []
    edits = []
    for run, report in zip(plan.runs, reports, strict=True):
        view = Run.view(run.folder)
        asked = _asked_cases(report)
        cases.append(_lines(view, "cases", asked))
        edits.append(_lines(view, "edits", report["cost"]["edits"]))
    # the first run has the order of the data, so nothing in its report is about an order
    head = dict(reports[0])
    for key in _OF_ONE_RUN:
        head.pop(key, None)
    head["seeds"] = plan.config["seeds"]
    head["orders"] = plan.config["orders"]
    head["runs"] = plan.made()
    whole = build_report(
        head,
        together(cases),
        together(edits),
        plan.options.protocol.sequential,
        unit=unit_of(head),
    )
    in_runs = [report["milestones"] for report in reports]
    whole["milestones"] = with_spread(whole["milestones"], in_runs)
    whole["cost"] |= _cost([report["cost"] for report in reports])
    return whole


def _asked_cases(report: Mapping[str, Any]) -> int:
    """Return how many lines a run has: one for each case at each milestone."""
    return sum(milestone["cases"] for milestone in report["milestones"])


def _lines(run: Run, name: str, count: int) -> list[dict[str, Any]]:
    """Return the lines of a finished run; raise RunError if they are not as many as its report says."""
    lines = run.read(name)
    if len(lines) != count:
        path = run.folder / f"{name}.jsonl"
        raise RunError(f"{path}: {len(lines):,} of {count:,} lines are there", _AGAIN)
    return lines


def _cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was asked in all runs, and the highest peak of memory."""
    asked = {"questions": 0, "seconds": 0.0}
    peak: dict[str, int] = {}
    for cost in costs:
        for key in asked:
            asked[key] += cost["asked"][key]
        for place, size in cost["peak_memory"].items():
            peak[place] = max(size, peak.get(place, 0))
    return {"asked": asked, "peak_memory": peak}
