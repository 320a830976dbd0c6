"""Where to edit, `mmedit locate`: an evaluation for each layer that an editor may work at, and the best of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmedit_cli import registry
from mmedit_cli.catalog import find_model
from mmedit_cli.errors import MmeditError, RunError, UserError
from mmedit_cli.hparams import to_dict
from mmedit_cli.knowledge.loading import (
    ModelOptions,
    depth_of,
    resolve_editor,
    used_hparams,
)
from mmedit_cli.knowledge.workflow.evaluation import (
    EvalOptions,
    EvalPlan,
    open_model,
    plan_evaluation,
    run_evaluation,
)
from mmedit_cli.layers import LayerField, layer_field
from mmedit_cli.output import Output
from mmedit_cli.reading import read_text
from mmedit_cli.records import Run
from mmedit_cli.storage import write_atomic

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.models.base import VisionLanguageModel

CASES = 20
_LARGEST = 1 << 20  # bytes of a file of hyper-parameters
PARTS = ("reliability", "generality", "locality")
_AT_LEAST_ONE = ("limit", "sequential")


@dataclass(frozen=True)
class LocateOptions:
    """What to sweep; the defaults are those of `mmedit locate`.

    layers: only values whose highest layer is one of these; None: all there are. sequential: edits in a row, all
    cases if None. protocol: of `mmedit eval`, whose scores decide. output: where the hyper-parameters are written
    too.
    """

    editor: str
    model: ModelOptions = field(default_factory=ModelOptions)
    data: str = "emojikb"
    data_options: DataOptions | None = None
    layers: Sequence[int] | None = None
    sequential: int | None = None
    limit: int = CASES
    protocol: str = "tf_em"
    batch_size: int = 32
    hparams: Path | None = None
    overrides: Sequence[str] = ()
    seed: int = 0
    records: Path = Path("records")
    force: bool = False
    output: Path | None = None

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")


@dataclass(frozen=True)
class Candidate:
    """One value of the layers: its evaluation, or why there can be none."""

    value: Any
    plan: EvalPlan | None
    problem: str = ""


@dataclass(frozen=True)
class LocatePlan:
    """Everything resolved before a model is loaded."""

    options: LocateOptions
    swept: LayerField
    present: Any
    candidates: Sequence[Candidate]
    config: dict[str, Any]
    folder: Path


def plan_locating(options: LocateOptions) -> LocatePlan:
    """Resolve names, layers and data; raise a UserError if anything cannot be used. Loads no model."""
    swept = _swept(options.editor)
    if options.output is not None and options.output.exists() and not options.force:
        raise UserError(f"{options.output}: there already", "--force replaces it")
    ref = find_model(options.model.named, revision=options.model.revision)
    depth = depth_of(ref)
    if depth is None:
        problem = f"{ref.name}: its config does not say how many layers it has"
        raise UserError(problem, "name the layers yourself: mmedit eval --set")
    given = _evaluation(options)
    present = swept.from_zero(getattr(given.hparams, swept.name), depth)
    if getattr(given.hparams, "target", "lm") != "lm":
        target = given.hparams.target
        raise UserError(
            f"target={target}: this edits no decoder layer", "--set target=lm"
        )
    candidates = []
    for value in swept.choices(present, depth):
        if options.layers is None or swept.highest(value) in options.layers:
            candidates.append(_candidate(given, swept, value))
    if not candidates:
        asked = ", ".join(map(str, options.layers or ()))
        problem = f"--layers {asked}: {options.editor} on {ref.name} has none of these"
        raise UserError(problem, f"its layers are 0 to {depth - 1}")
    config = {
        **given.config,
        "command": "locate",
        "hparams": used_hparams(given.hparams),
        "swept": {
            "key": swept.name,
            "values": [_plain(candidate.value) for candidate in candidates],
        },
    }
    parts = ("locate", given.options.editor, ref.name, given.config["data"]["name"])
    folder = Run.locate(options.records, parts, config)
    return LocatePlan(options, swept, present, candidates, config, folder)


def _swept(editor: str) -> LayerField:
    """Return which hyper-parameter of an editor is swept; raise UserError for an editor without one."""
    cls = registry.editors.get(editor)
    found = layer_field(cls.Hparams)
    others = ", ".join(sorted(_able()))
    hint = f"editors whose layers can be swept: {others}"
    if cls.trains:
        problem = f"{editor}: its networks were trained for the layers they work at"
        if found is not None:
            hint = f"train some for each: mmedit train-editor {editor} --set {found.name}=N; {hint}"
        raise UserError(problem, hint)
    if found is None:
        raise UserError(f"{editor} works at no decoder layer", hint)
    return found


def _able() -> Iterator[str]:
    """Yield the editors whose layers can be swept."""
    for name in registry.editors.names():
        cls = registry.editors.get(name)
        found = layer_field(cls.Hparams)
        if found is not None and not cls.trains:
            yield name


def _evaluation(options: LocateOptions) -> EvalPlan:
    """Return the plan of an evaluation with the present layers."""
    from mmedit_cli.knowledge.data.base import DataOptions, read_data
    from mmedit_cli.knowledge.evaluation.protocol import Protocol

    where = options.data_options or DataOptions()
    data = _held_out(options.data)
    size = options.sequential
    if size is None:
        size = len(read_data(data, limit=options.limit, options=where).cases)
    evaluation = EvalOptions(
        options.editor,
        options.model,
        data,
        Protocol(
            size,
            protocols=(options.protocol,),
            batch_size=options.batch_size,
        ),
        where,
        options.hparams,
        options.overrides,
        limit=options.limit,
        seed=options.seed,
        records=options.records,
        force=options.force,
    )
    return plan_evaluation(evaluation)


def _held_out(data: str) -> str:
    """Return the split for choosing of a named data set that has one: what is evaluated later is not looked at."""
    from mmedit_cli.knowledge.data.base import find_dataset

    named = find_dataset(data)
    if named is None or ":" in data:
        return data
    dataset, _ = named
    return f"{data}:val" if "val" in dataset.splits else data


def _candidate(given: EvalPlan, swept: LayerField, value: Any) -> Candidate:
    """Return the evaluation of one value: a run like that of `mmedit eval --set KEY=VALUE`, in its folder."""
    options = given.options
    chosen = f"{swept.name}={json.dumps(_plain(value))}"
    overrides = (*options.overrides, chosen)
    try:
        _, hparams = resolve_editor(
            options.editor,
            given.config["variant"],
            options.hparams,
            overrides,
            depth=depth_of(given.ref),
        )
    except UserError as error:
        return Candidate(value, None, error.problems[0])
    config = {**given.config, "hparams": used_hparams(hparams)}
    plan = replace(
        given,
        options=replace(options, overrides=overrides),
        hparams=hparams,
        config=config,
        folder=Run.locate(given.folder.parent, (), config),
    )
    return Candidate(value, plan)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def locate(options: LocateOptions, out: Output | None = None) -> dict[str, Any]:
    """Evaluate every layer and return the report; what is finished is only read, an interrupted sweep goes on.

    Raises a UserError for bad input, before anything is written.
    """
    talk = out or Output()
    plan = plan_locating(options)
    report = Run.report_once(
        plan.folder,
        lambda: run_locating(plan, talk),
        force=options.force,
        say=talk.note,
    )
    if options.output is not None:
        kept = read_text(plan.folder / "hparams.yaml", limit=_LARGEST, error=RunError)
        write_atomic(options.output, kept)
        report = {**report, "file": str(options.output)}
    return report


def run_locating(plan: LocatePlan, out: Output) -> dict[str, Any]:
    """Make the runs that are not finished on one model, choose, and write the report and the hyper-parameters."""
    backbone: VisionLanguageModel | None = None
    rows = []
    environment: dict[str, Any] = {}
    for number, candidate in enumerate(plan.candidates, 1):
        row: dict[str, Any] = {"value": _plain(candidate.value)}
        rows.append(row)
        run = candidate.plan
        if run is None:
            row["problem"] = candidate.problem
            continue
        said = f"{plan.swept.name} {row['value']}"
        out.note(f"{said}: {number} of {len(plan.candidates)}")
        report = Run.done_before(run.folder, force=plan.options.force, say=out.note)
        if report is None:
            backbone = backbone or open_model(run, out)
            try:
                report = run_evaluation(run, out, backbone)
            except UserError as error:
                # of this layer alone, such as a key that the layer cannot tell apart
                out.note(f"{said}: {error.problems[0]}")
                row["problem"] = error.problems[0]
                # edits that were made before it may still be in the model
                backbone = None
                continue
        row |= _scores(report, plan.options.protocol)
        row["run"] = str(run.folder)
        environment = report["environment"]
    chosen = _best(plan, rows)
    head = {key: plan.config[key] for key in ("editor", "model", "data", "hparams")}
    report = {
        "format": 1,
        **head,
        "protocol": plan.config["protocol"],
        "swept": plan.swept.name,
        "environment": environment,
        "candidates": rows,
        "present": _plain(plan.present),
        "chosen": _plain(chosen),
        "file": str(plan.folder / "hparams.yaml"),
        "run": str(plan.folder),
    }
    with Run.open(plan.folder, plan.config, environment, force=True) as run_of_all:
        write_atomic(plan.folder / "hparams.yaml", _file(plan, chosen, rows))
        run_of_all.finish(report)
    return report


def _scores(report: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Return the mean of each part of the scores, and the harmonic mean of those that there are (Meng et al. 2022)."""
    last = report["milestones"][-1]
    after = last["scores"][protocol]
    found: dict[str, Any] = {}
    for part in PARTS:
        means = []
        for column, summary in after.items():
            family, _, _ = column.partition(".")
            of_part = family == part
            if of_part and not column.endswith(" known"):
                mean = summary["mean"]
                means.append(mean)
        if means:
            found[part] = statistics.fmean(means)
    parts = list(found.values())
    score = statistics.harmonic_mean(parts)
    seconds = report["cost"]["seconds_per_edit"]["mean"]
    return {**found, "score": score, "seconds_per_edit": seconds}


def _best(plan: LocatePlan, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the value with the best score; of equals the present one, else the highest, above which least is run.

    Raises MmeditError if no value could be evaluated.
    """
    scored = []
    pairs = zip(plan.candidates, rows, strict=True)
    for candidate, row in pairs:
        if "score" not in row:
            continue
        value = candidate.value
        is_present = value == plan.present
        highest = plan.swept.highest(value)
        rank = (row["score"], is_present, highest)
        scored.append((rank, value))
    if not scored:
        problems = [row["problem"] for row in rows]
        distinct = list(dict.fromkeys(problems))
        raise MmeditError(distinct)
    _, value = max(scored)
    return value


def _file(plan: LocatePlan, chosen: Any, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a hyper-parameter file: the present values, with the layers that were chosen."""
    value = _plain(chosen)
    (row,) = [row for row in rows if row["value"] == value]
    plans = [candidate.plan for candidate in plan.candidates]
    first, *_ = filter(None, plans)
    values = to_dict(first.hparams)
    name = plan.swept.name
    values[name] = value
    editor = plan.options.editor
    model = plan.config["model"]["name"]
    score = 100 * row["score"]
    text = yaml.safe_dump(
        values,
        sort_keys=False,
        allow_unicode=True,
    )
    return (
        f"# {editor} on {model}: {name} by mmedit locate, score {score:.1f} %\n"
        f"# use it with: mmedit eval {editor} --hparams FILE\n"
        f"{text}"
    )
