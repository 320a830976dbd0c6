"""Sweeps, `mmedit sweep`: evaluations over editors, models, seeds and orders, each a run of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.knowledge.workflow.engines import LASTING, Engine, InThisProcess
from mmedit_cli.knowledge.workflow.evaluation import open_model, run_evaluation
from mmedit_cli.knowledge.workflow.options_in_a_file import from_run_file
from mmedit_cli.knowledge.workflow.repeated import (
    RepeatedPlan,
    Repetitions,
    plan_repeated,
    run_repeatedly,
)
from mmedit_cli.output import Output, counted
from mmedit_cli.plugins import VARIABLE
from mmedit_cli.reading import Record, read_yaml
from mmedit_cli.records import Run

if TYPE_CHECKING:
    from mmedit_cli.knowledge.models.base import VisionLanguageModel

_HINT = "editors: [ft, grace], models: [mini-blip2], seeds: [0, 1], orders: 1, options: {sequential: 100}"
_KEYS = ("editors", "models", "seeds", "orders", "options")


@dataclass(frozen=True)
class Job:
    """One run as plain values, so that another machine can make it.

    options: of `mmedit eval`, by name. index: which of the combinations of `seeds` and `orders` it is. place: the file
    that errors name. folder: where its records will be, below `records`. home: the folder that paths are relative to.
    """

    options: Mapping[str, Any]
    seeds: Sequence[int]
    orders: int
    index: int
    place: str
    records: str
    folder: str
    home: str
    plugins: str
    force: bool

    @property
    def name(self) -> str:
        """What a list calls the run."""
        editor = self.options["editor"]
        model = self.options["model"]
        count = len(self.seeds)
        order, place = divmod(self.index, count)
        seed = self.seeds[place]
        return f"{editor} on {model}, seed {seed}, order {order}"


@dataclass(frozen=True)
class Sweep:
    """Everything resolved: the runs of each editor and model, all of them as jobs, and where the list is kept."""

    groups: Sequence[RepeatedPlan]
    jobs: Sequence[Job]
    config: dict[str, Any]
    folder: Path

    def describe(self) -> dict[str, Any]:
        """Return the list of runs as plain values."""
        runs = [{"run": job.name, "folder": job.folder} for job in self.jobs]
        return {"sweep": str(self.folder), "runs": runs}


def plan_sweep(file: Path, records: Path, *, force: bool = False) -> Sweep:
    """Resolve every run of a sweep file; raise UserError with all that cannot be used. Loads no model."""
    given = Record(
        read_yaml(file, error=UserError, hint=_HINT),
        str(file),
        error=UserError,
        hint=_HINT,
    )
    given.only(*_KEYS)
    seeds = tuple(given.array("seeds", int, [0]))
    repetitions = Repetitions(seeds, given.integer("orders", 1))
    groups: list[RepeatedPlan] = []
    jobs: list[Job] = []
    problems: list[str] = []
    for options in _combinations(given):
        what = f"{file}: {options['editor']} on {options['model']}"
        try:
            plan = _plan(options, str(file), records, repetitions, force)
        except UserError as error:
            problems += [f"{what}: {problem}" for problem in error.problems]
            continue
        groups.append(plan)
        for index, run in enumerate(plan.runs):
            job = Job(
                options,
                seeds,
                repetitions.orders,
                index,
                str(file),
                str(records),
                str(run.folder),
                str(Path.cwd()),
                os.environ.get(VARIABLE, ""),
                force,
            )
            jobs.append(job)
    if problems:
        raise UserError(problems)
    config = {"command": "sweep", "runs": [job.folder for job in jobs]}
    folder = Run.locate(records, ("sweep", file.stem), config)
    return Sweep(groups, jobs, config, folder)


def _plan(
    options: Mapping[str, Any],
    place: str,
    records: Path,
    repetitions: Repetitions,
    force: bool,
) -> RepeatedPlan:
    request = from_run_file(options, place, records)
    return plan_repeated(replace(request, force=force), repetitions)


def _combinations(given: Record) -> Iterator[dict[str, Any]]:
    """Yield the options of each editor on each model: those of all, of the editor, and of the model."""
    common = given.mapping("options", {})
    for key in ("editor", "model", "seed"):
        if key in common:
            problem = f"{key} has a list of its own: {key}s"
            given.fail("options", problem)
    editors = _named(given, "editors", "editor")
    models = _named(given, "models", "model")
    for editor in editors:
        for model in models:
            yield {
                **common,
                **editor,
                **model,
            }


def _named(given: Record, key: str, name: str) -> list[dict[str, Any]]:
    """Return the options of each entry of a list: a name, or a mapping with one and with options of its own."""
    entries = given.array(key)
    if not entries:
        given.fail(key, "an empty list")
    found: list[dict[str, Any]] = []
    for index, entry in enumerate(entries):
        options = entry
        if isinstance(entry, str):
            options = {name: entry}
        named = None
        if isinstance(options, dict):
            named = options.get(name)
        if not isinstance(named, str) or not named.strip():
            place = f"{key}[{index}]"
            problem = f"neither a name nor a mapping with {name}"
            given.fail(place, problem)
        found.append(options)
    return found


def sweep(
    plan: Sweep, out: Output, engine: Engine | None = None, retries: int = 1
) -> dict[str, Any]:
    """Make the runs that are not finished, retry those that failed, and return the report over all.

    What failed to the end is in the report, which is then not kept, so that the same command goes on.
    """
    force = any(job.force for job in plan.jobs)
    done = Run.done_before(
        plan.folder,
        force=force,
        say=out.note,
    )
    if done is not None:
        return done
    engine = engine or InThisProcess()
    opened = Run.open(
        plan.folder,
        plan.config,
        environment={},
        force=True,
    )
    with opened as run:
        jobs = [asdict(job) for job in plan.jobs]
        run.rewrite("jobs", jobs)
        failed = _make_all(plan, engine, retries, out)
        report = _report(plan, failed)
        if not failed:
            run.finish(report)
    return report


def _make_all(plan: Sweep, engine: Engine, retries: int, out: Output) -> dict[int, str]:
    """Make all runs; return what failed to the end, by the number of the run."""
    work = make_run
    if isinstance(engine, InThisProcess):
        work = _Here(out).make
    lasting: dict[int, str] = {}
    failed: dict[int, str] = {}
    left = list(range(len(plan.jobs)))
    for attempt in range(retries + 1):
        if attempt and left:
            again = counted(len(left), "run")
            out.note(f"{again} failed: again")
        failed = {}
        jobs = [plan.jobs[number] for number in left]
        payloads = [asdict(job) for job in jobs]
        ends = engine.run(work, payloads)
        for count, ended in enumerate(ends, 1):
            name = jobs[ended.index].name
            how = ended.problem or "done"
            out.note(f"{count} of {len(left)}: {name}: {how}")
            if ended.problem:
                table = lasting if ended.lasting else failed
                number = left[ended.index]
                table[number] = ended.problem
        left = sorted(failed)
        if not left:
            break
    return {**lasting, **failed}


def make_run(payload: Mapping[str, Any]) -> str:
    """Make the run of a job, on whatever machine this is; return an empty text, or what went wrong.

    A text that begins with `LASTING` says that the input is wrong, so that the run would fail again.
    """
    home = payload["home"]
    plugins = payload["plugins"]
    os.chdir(home)
    if plugins:
        os.environ[VARIABLE] = plugins
    quiet = Output(quiet=True)
    return _Here(quiet).make(payload)


class _Here:
    """Makes runs in this process, one after another; a model stays loaded while the next run is on it too."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self._name = ""
        self._backbone: VisionLanguageModel | None = None

    def make(self, payload: Mapping[str, Any]) -> str:
        """Return an empty text, or what went wrong."""
        try:
            self._make(Job(**payload))
        except Exception as error:
            # edits of a run that failed may still be in the model
            self._backbone = None
            if not isinstance(error, MmeditError):
                return f"{type(error).__name__}: {error}"
            mark = LASTING if isinstance(error, UserError) else ""
            return mark + "; ".join(error.problems)
        return ""

    def _make(self, job: Job) -> None:
        repetitions = Repetitions(job.seeds, job.orders)
        records = Path(job.records)
        plan = _plan(
            job.options,
            job.place,
            records,
            repetitions,
            job.force,
        )
        run = plan.runs[job.index]
        done = Run.done_before(
            run.folder,
            force=job.force,
            say=self.out.note,
        )
        if done is not None:
            return
        model = run.ref.fingerprint
        if self._backbone is None or self._name != model:
            self._backbone = None
            self._backbone = open_model(run, self.out)
            self._name = model
        run_evaluation(run, self.out, self._backbone)


def _report(plan: Sweep, failed: Mapping[int, str]) -> dict[str, Any]:
    """Return what became of each run, and where the reports over all seeds and orders are.

    They are written where all runs of an editor on a model are there.
    """
    runs = []
    there = set()
    for number, job in enumerate(plan.jobs):
        row: dict[str, Any] = {"run": job.name, "folder": job.folder}
        runs.append(row)
        if number in failed:
            row["failed"] = failed[number]
            continue
        folder = Path(job.folder)
        report = Run.read_report(folder)
        row |= _headline(report)
        there.add(folder)
    spreads = []
    for group in plan.groups:
        folders = {run.folder for run in group.runs}
        if len(folders) > 1 and folders <= there:
            _spread(group)
            spreads.append(str(group.folder))
    return {
        "format": 1,
        "command": "sweep",
        "runs": runs,
        "spreads": spreads,
        "sweep": str(plan.folder),
    }


def _spread(group: RepeatedPlan) -> None:
    """Write the report over runs that are all finished: they are only read, so nothing is loaded."""
    read_only = []
    for run in group.runs:
        options = replace(run.options, force=False)
        read_only.append(replace(run, options=options))
    plan = replace(group, runs=read_only)
    quiet = Output(quiet=True)
    run_repeatedly(plan, quiet)


def _headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return editor, model, and the first score of a run after its last edit."""
    last = report["milestones"][-1]
    protocol, scores = next(iter(last["scores"].items()))
    return {
        "editor": report["editor"],
        "model": report["model"]["name"],
        "edits": last["edits"],
        "protocol": protocol,
        "reliability": scores["reliability"]["mean"],
        "scope": scores["scope"]["mean"] if "scope" in scores else None,
    }
