"""Evaluation of an editor, `mmedit eval`, and the checks of cases before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, find_model
from mmedit_cli.errors import DataError, MmeditError, TooLong, UserError
from mmedit_cli.knowledge.loading import (
    ModelOptions,
    check_sight,
    depth_of,
    give_networks,
    load_model,
    networks_of,
    resolve_editor,
    used_hparams,
    variant_for,
)
from mmedit_cli.knowledge.trained_networks import TrainedNetworks, networks_line
from mmedit_cli.knowledge.workflow.run_file import as_run_file
from mmedit_cli.output import Output
from mmedit_cli.records import Run, shared_run
from mmedit_cli.runtime import Processes
from mmedit_cli.shapes import told
from mmedit_cli.storage import sha256_json, sha256_of
from mmedit_cli.types import EditCase, Query, in_one_line

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.evaluation.protocol import Protocol
    from mmedit_cli.knowledge.methods.base import Editor
    from mmedit_cli.knowledge.models.base import VisionLanguageModel


# raised when the same answers get other scores than before, so that no run mixes the two
SCORING = 2
# of the configuration of a run, what its report repeats
_IN_REPORT = (
    "editor",
    "model",
    "data",
    "hparams",
    "variant",
    "protocol",
    "seed",
    "versions",
)
INTERVALS_BY = ("concept", "case")
ELSEWHERE = "edited elsewhere"  # the editor of a model of others
UNTRAINED = "untrained"  # networks that stay random, for an ablation


def _protocol() -> Protocol:
    from mmedit_cli.knowledge.evaluation.protocol import Protocol

    return Protocol()


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate; the defaults are those of `mmedit eval`.

    intervals_by: "case", or "concept" where cases of one concept are not taken for independent; None: by concept where
    every case names its own. ability: also measure what the model can do that no edit is about. edited: the folder of
    a model that was edited elsewhere; `editor` is then ELSEWHERE, and all cases are what was edited.
    """

    editor: str
    model: ModelOptions = field(default_factory=ModelOptions)
    data: str = "emojikb"
    protocol: Protocol = field(default_factory=_protocol)
    data_options: DataOptions | None = None
    hparams: Path | None = None
    overrides: Sequence[str] = ()
    checkpoint: Path | str | None = None
    limit: int | None = None
    seed: int = 0
    records: Path = Path("records")
    force: bool = False
    intervals_by: str | None = None
    ability: bool = False
    edited: Path | None = None


@dataclass(frozen=True)
class EvalPlan:
    """Everything resolved before a model is loaded: what will run, and where it will be recorded.

    edited: the model that was edited elsewhere, if it is one that is scored.
    """

    options: EvalOptions
    ref: ModelRef
    hparams: Any
    networks: TrainedNetworks | None
    cases: list[EditCase]
    config: dict[str, Any]
    folder: Path
    edited: ModelRef | None = None

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        groups = self.options.protocol.groups(len(self.cases))
        last = groups[-1]
        return {
            **self.config,
            "groups": len(groups),
            "last_group": len(last),
            "run": str(self.folder),
        }


def plan_evaluation(options: EvalOptions) -> EvalPlan:
    """Resolve names, hyper-parameters and data; raise a UserError if anything cannot be used. Loads no model."""
    from mmedit_cli.knowledge.data.base import DataOptions, fingerprint, read_data
    from mmedit_cli.knowledge.evaluation.ability import Probe
    from mmedit_cli.knowledge.models.shared.loading import check_answers

    ref = find_model(options.model.named, revision=options.model.revision)
    check_answers(ref)
    method = _method_of(options, ref)
    data = read_data(
        options.data, limit=options.limit, options=options.data_options or DataOptions()
    )
    cases, line_breaks = _one_line_targets(data.cases)
    check_seen(ref, cases, options.data)
    check_facts(method.editor, cases)
    check_pictures(cases)
    if method.edited is not None:
        protocol = replace(options.protocol, sequential=len(cases))
        options = replace(options, protocol=protocol)
    size = options.protocol.sequential
    if size > len(cases):
        raise DataError(
            f"--sequential {size}: {options.data} has {len(cases)} cases",
            f"use --sequential {len(cases)} or less",
        )
    config: dict[str, Any] = {
        "command": "eval",
        "editor": method.editor.name,
        "hparams": used_hparams(method.hparams),
        "variant": method.variant,
        "model": ref.described(),
        "device": options.model.device,
        "dtype": options.model.dtype,
        "data": {
            "name": data.name,
            "cases": len(cases),
            "fingerprint": fingerprint(cases),
            **data.selection,
            **line_breaks,
        },
        "protocol": options.protocol.stored(),
        "seed": options.seed,
        "scoring": SCORING,
        "versions": runtime.versions(),
    }
    config |= intervals(cases, options)
    if options.ability:
        config["ability"] = sha256_json(Probe.shipped().described())[:16]
    if method.edited is not None:
        config["edited"] = method.edited.described()
    if method.networks is not None:
        config["checkpoint"] = sha256_of(method.networks.path)
    elif options.checkpoint is not None:
        config["checkpoint"] = UNTRAINED
    editor_folder = method.editor.name.replace(" ", "-")
    parts = ("eval", editor_folder, ref.name, data.name)
    folder = Run.locate(options.records, parts, config)
    return EvalPlan(
        options,
        ref,
        method.hparams,
        method.networks,
        cases,
        config,
        folder,
        method.edited,
    )


@dataclass(frozen=True)
class _Method:
    """What edits, resolved."""

    editor: type[Editor]
    hparams: Any
    variant: str | None = None
    networks: TrainedNetworks | None = None
    edited: ModelRef | None = None


def _method_of(options: EvalOptions, ref: ModelRef) -> _Method:
    """Resolve the editor and its hyper-parameters, or the model that was edited elsewhere; raise UserError."""
    if options.edited is not None:
        if options.editor != ELSEWHERE:
            problem = f"{options.editor} and edited={options.edited}: the edits are made already"
            raise UserError(problem, f"leave one out; the editor is {ELSEWHERE!r}")
        from mmedit_cli.knowledge.workflow import edited_elsewhere

        found = edited_elsewhere.find_edited(options.edited, ref)
        editor = edited_elsewhere.EditedElsewhere
        return _Method(editor, edited_elsewhere.NoHparams(), edited=found)
    check_sight(options.editor, ref)
    networks = _networks(options, ref.name)
    path = None if networks is None else networks.path
    variant = variant_for(options.editor, ref, options.hparams)
    cls, hparams = resolve_editor(
        options.editor,
        variant,
        options.hparams,
        options.overrides,
        path,
        depth=depth_of(ref),
    )
    return _Method(cls, hparams, variant, networks)


def _networks(options: EvalOptions, model: str) -> TrainedNetworks | None:
    """Return the networks that an editor is to have; None for one without any, or if they are to stay random."""
    trains = registry.editors.get(options.editor).trains
    if trains and options.checkpoint == UNTRAINED:
        return None
    return networks_of(
        options.editor,
        model,
        options.records,
        options.checkpoint,
    )


def intervals(cases: Sequence[EditCase], options: EvalOptions) -> dict[str, Any]:
    """Return what a run records of its intervals: nothing where they are over cases.

    Raises UserError for `intervals_by` that is unknown, or that the cases do not name.
    """
    by = options.intervals_by
    if by not in (None, *INTERVALS_BY):
        known = " or ".join(INTERVALS_BY)
        raise UserError(f"--intervals-by {by}: must be {known}")
    concepts = [case.concept for case in cases]
    missing = concepts.count("")
    if by == "concept" and missing:
        counted = f"{missing:,} of {len(cases):,} cases name none"
        raise DataError(
            f"--intervals-by concept: {options.data}: {counted}",
            "give each case a `concept` (docs/data.md), or --intervals-by case",
        )
    if by == "case" or missing:
        return {}
    digest = sha256_json(concepts)
    over = {
        "by": "concept",
        "concepts": len(set(concepts)),
        "fingerprint": digest[:16],
    }
    return {"intervals": over}


def evaluate(options: EvalOptions, out: Output | None = None) -> dict[str, Any]:
    """Evaluate an editor and return the report; a finished run is only read, an interrupted one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    talk = out or Output()
    plan = plan_evaluation(options)
    return Run.report_once(
        plan.folder,
        lambda: run_evaluation(plan, talk),
        force=options.force,
        say=talk.note,
    )


def run_evaluation(
    plan: EvalPlan, out: Output, backbone: VisionLanguageModel | None = None
) -> dict[str, Any]:
    """Load the model, if it is not given, make the edits, ask, and write the report.

    Of several processes that were started together the first writes, and all return the report.
    """
    from mmedit_cli.knowledge.evaluation.ability import Probe
    from mmedit_cli.knowledge.evaluation.protocol import PREPARING, evaluate_edits
    from mmedit_cli.knowledge.evaluation.report import questions
    from mmedit_cli.knowledge.evaluation.sharing import Conditions

    options = plan.options
    protocol = plan.options.protocol
    processes = runtime.join_processes(options.model.device)
    if not processes.first:
        out = Output(quiet=True)
    if backbone is None:
        backbone = open_model(plan, out, processes.device)
    plan, too_long = _without_long(plan, backbone)
    check_queries(backbone, plan.cases, sayable=protocol.generates)
    editor = _editor(plan, backbone, out)
    networks = None if plan.networks is None else plan.networks.facts()
    environment = runtime.environment(backbone.device)
    base_folder = (
        options.records
        / "base"
        / plan.ref.name.replace("/", "--")
        / _base_key(plan, backbone, editor.first_layer)
    )
    opened = shared_run(
        plan.folder,
        plan.config,
        environment,
        processes,
        options=as_run_file(options),
        force=options.force,
    )
    with opened as run:
        # an equal command may have ended while the model was loaded here
        ended = _ended_meanwhile(plan, processes, out)
        if ended is not None:
            return ended
        if processes.first:
            run.rewrite("questions", questions(plan.cases))
        groups = protocol.groups(len(plan.cases))
        after = sum(sum(protocol.milestones(len(group))) for group in groups)
        totals = {"before": len(plan.cases), "edits": len(plan.cases), "after": after}
        if editor.first_layer is not None:
            totals = {PREPARING: count_queries(plan.cases), **totals}
        with out.progress(totals) as tick:
            probe = Probe.shipped() if options.ability else None
            how = Conditions(base_folder, probe, processes, tick)
            asked = evaluate_edits(editor, plan.cases, run, protocol, how)
        if processes.first:
            head = {**_head(plan, backbone), "networks": networks}
            head["data"] = {**plan.config["data"], **too_long}
            report = _report(plan, head, run)
            report["cost"]["asked"] = asked
            report["cost"]["peak_memory"] = runtime.peak_memory(backbone.device)
            # the state to continue from may be as large as a model
            run.remove_tensors("editor")
            run.finish(report)
        processes.wait()
    return report if processes.first else Run.read_report(plan.folder)


def _ended_meanwhile(
    plan: EvalPlan, processes: Processes, out: Output
) -> dict[str, Any] | None:
    """Return the report of the run if it is there by now; the first process looks for all."""
    report = None
    if processes.first:
        report = Run.done_before(plan.folder, force=False, say=out.note)
    first, *_ = processes.gather(b"done" if report else b"open")
    if first == b"done" and report is None:
        return Run.read_report(plan.folder)
    return report


def _head(plan: EvalPlan, backbone: VisionLanguageModel) -> dict[str, Any]:
    """Return the front of a report: what was evaluated."""
    head = {key: plan.config[key] for key in _IN_REPORT}
    if plan.edited is not None:
        head["edited"] = plan.edited.described()
    head["checkpoint"] = plan.config.get("checkpoint")
    head["networks"] = None
    if plan.options.protocol.generates and backbone.own_settings:
        head["ignored_settings"] = backbone.own_settings
    if "intervals" in plan.config:
        head["intervals"] = plan.config["intervals"]
    return head


def _report(plan: EvalPlan, head: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return the report of all lines of a run."""
    from mmedit_cli.knowledge.evaluation.report import build_report, examples

    lines = run.read("cases")
    head["environment"] = run.environment
    head["examples"] = examples(lines, plan.cases)
    report = build_report(
        head,
        lines,
        run.read("edits"),
        plan.options.protocol.sequential,
        unit=unit_of(head),
    )
    if plan.options.ability:
        (report["ability"],) = run.read("ability")
    if plan.edited is not None:
        # how long others edited is not known
        del report["cost"]["seconds_per_edit"]
    return report


def _editor(plan: EvalPlan, backbone: VisionLanguageModel, out: Output) -> Editor:
    """Return what edits the model, ready to do so, and say what it has learned or changes."""
    seed = plan.options.seed
    if plan.edited is not None:
        from mmedit_cli.knowledge.workflow.edited_elsewhere import EditedElsewhere

        out.note(f"reading {plan.edited.folder}")
        elsewhere = EditedElsewhere(backbone, plan.hparams, seed=seed)
        changed = elsewhere.load_weights(plan.edited)
        out.note(f"{changed:,} weights are not those of {plan.ref.name}")
        return elsewhere
    cls = registry.editors.get(plan.options.editor)
    editor: Editor = cls(backbone, plan.hparams, seed=seed)
    if plan.networks is not None:
        out.note(networks_line(plan.networks.facts()))
        give_networks(editor, plan.networks.path)
    return editor


def open_model(
    plan: EvalPlan, out: Output, device: str | None = None
) -> VisionLanguageModel:
    """Load the model of a plan, on another device if one is named, and say which values the editor has for it."""
    if plan.edited is None:
        out.note(told(plan.options.editor, plan.config["variant"]))
    options = plan.options.model
    if device is not None:
        options = replace(options, device=device)
    return load_model(options, plan.ref, out)


def unit_of(head: Mapping[str, Any]) -> str:
    """Return what the intervals of a report are over: "case" or "concept"."""
    unit: str = head.get("intervals", {"by": "case"})["by"]
    return unit


def _one_line_targets(cases: list[EditCase]) -> tuple[list[EditCase], dict[str, int]]:
    """Return the cases without line breaks in their targets, and for the report how many cases had one."""
    from mmedit_cli.knowledge.data.shared.selection import change

    changed = [change(case, in_one_line) for case in cases]
    count = sum(case != new for case, new in zip(cases, changed, strict=True))
    if not count:
        return cases, {}
    return changed, {"line_breaks": count}


def check_queries(
    backbone: VisionLanguageModel, cases: Sequence[EditCase], *, sayable: bool = False
) -> None:
    """Tokenise every query of the cases; raise DataError naming each one the model cannot take.

    With `sayable`, also each target that is scored and that no free answer can match.
    """
    from mmedit_cli.knowledge.evaluation.answers import check_sayable

    problems: list[str] = []
    hint = ""
    for case in cases:
        for column, queries in case.columns():
            place = f"{case.place}: {case.uid}: {column}"
            scored = sayable and not column.startswith(("locality.", "needs."))
            for query in queries:
                try:
                    backbone.encode(query)
                    if scored:
                        check_sayable(backbone, query)
                except DataError as error:
                    problems += [f"{place}: {problem}" for problem in error.problems]
                    hint = hint or error.hint
    if problems:
        raise DataError(problems[:20], hint)


def _without_long(
    plan: EvalPlan, backbone: VisionLanguageModel
) -> tuple[EvalPlan, dict[str, Any]]:
    """Leave out what the model cannot read, if that was asked for; return what is left, and the counts for the report.

    A case goes with its request; of the others only the probes that are too long.
    """
    if not plan.config["data"].get("skip_long"):
        return plan, {}
    from mmedit_cli.knowledge.data.shared.selection import change

    def if_it_fits(query: Query) -> Query | None:
        try:
            whole = backbone.encode(query)
            asked = backbone.encode(query, with_answer=False)
        except TooLong:
            return None
        longest = max(len(whole.ids), len(asked.ids) + 1)
        return query if longest <= backbone.max_length else None

    cases = [
        change(case, if_it_fits) for case in plan.cases if if_it_fits(case.request)
    ]
    if not cases:
        raise DataError(
            f"every case is too long for {backbone.name}, which reads {backbone.max_length} tokens"
        )
    counts = {
        "cases": len(plan.cases) - len(cases),
        "queries": _count_asked(plan.cases) - _count_asked(cases),
    }
    return replace(plan, cases=cases), {"too_long": counts}


def _count_asked(cases: Iterable[EditCase]) -> int:
    """Return how many queries some cases ask, counting a query as often as it is asked."""
    return sum(len(queries) for case in cases for _, queries in case.columns())


def count_queries(cases: Iterable[EditCase]) -> int:
    """Return how many different queries some cases ask."""
    from mmedit_cli.knowledge.evaluation.protocol import distinct_queries

    return len(distinct_queries(cases))


def check_facts(editor: type[Editor], cases: Sequence[EditCase]) -> None:
    """Raise DataError naming each fact that an editor cannot be taught because it has no picture."""
    if not editor.needs_image:
        return
    from mmedit_cli.knowledge.methods.base import TEXT_ONLY_HINT

    problem = f"{editor.name} routes by the picture, and this fact has none"
    problems = []
    for case in cases:
        if case.request.image is None:
            problems.append(f"{case.place}: {problem}" if case.place else problem)
    if problems:
        raise DataError(problems[:20], TEXT_ONLY_HINT)


def check_seen(ref: ModelRef, cases: Sequence[EditCase], data: str) -> None:
    """Raise DataError for cases with pictures if the model is a language model, which sees none."""
    if registry.backbones.fact(ref.family, "sees"):
        return
    count = 0
    for case in cases:
        count += any(query.image for _, queries in case.columns() for query in queries)
    if count:
        raise DataError(
            f"{data}: {count:,} of {len(cases):,} cases have pictures, and {ref.name} is a language model, "
            "which sees none",
            "--data FILE with facts in text, or counterfact, zsre, evqa:text, vlkeb:text",
        )


def check_pictures(cases: Sequence[EditCase]) -> None:
    """Check every distinct image once; raise DataError naming each bad one and the first case that needs it."""
    from mmedit_cli.pictures import check_picture

    seen: set[Path] = set()
    problems: list[str] = []
    hint = ""
    for case in cases:
        for column, queries in case.columns():
            for query in queries:
                if query.image is None or query.image in seen:
                    continue
                seen.add(query.image)
                try:
                    check_picture(query.image)
                except MmeditError as error:
                    place = f"{case.place}: {column}"
                    problems += [f"{place}: {problem}" for problem in error.problems]
                    hint = hint or error.hint
    if problems:
        raise DataError(
            problems[:20], hint or "replace the file, or take the record out"
        )


def _base_key(plan: EvalPlan, backbone: VisionLanguageModel, layer: int | None) -> str:
    """Return a digest of all that the answers of the untouched model depend on: the editor is not part of it."""
    protocol = plan.options.protocol
    data = plan.config["data"]
    what = {
        "model": plan.ref.fingerprint,
        "data": data["fingerprint"] + ("-short" if "skip_long" in data else ""),
        "device": backbone.device.type,
        "dtype": str(backbone.dtype),
        "layer": layer,
        "batch_size": protocol.batch_size,
        "max_new_tokens": protocol.max_new_tokens if protocol.generates else 0,
        "scoring": plan.config["scoring"],
        "top": "tf_easyedit" in protocol.protocols,
        "versions": plan.config["versions"],
    }
    return sha256_json(what)[:12]
