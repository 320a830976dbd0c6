"""What the commands do, for the command line and for library users alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, find_model, loading
from mmedit_cli.errors import DataError, MmeditError, StateError, TooLong, UserError
from mmedit_cli.hparams import to_dict
from mmedit_cli.output import Output
from mmedit_cli.reading import parse_json_object
from mmedit_cli.records import Run
from mmedit_cli.shapes import pick_variant, shape_of, shape_of_config, told
from mmedit_cli.storage import sha256_json, sha256_of
from mmedit_cli.types import EditCase, Query, in_one_line
from mmedit_cli.workflows.networks import Networks, find_networks, networks_line

if TYPE_CHECKING:
    from mmedit_cli.backbones.base import VisionLanguageModel
    from mmedit_cli.datasets.base import DataOptions
    from mmedit_cli.editors.base import Editor
    from mmedit_cli.evaluation.vlm import Protocol


SCORING = 2  # of answers: counted up when the same answers get other scores, so that no run mixes the two


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate; the defaults are those of `mmedit eval`."""

    editor: str
    model: ModelOptions
    data: str
    protocol: Protocol
    data_options: DataOptions | None = None
    hparams: Path | None = None
    overrides: Sequence[str] = ()
    checkpoint: Path | str | None = None
    limit: int | None = None
    seed: int = 0
    records: Path = Path("records")
    force: bool = False


@dataclass(frozen=True)
class EvalPlan:
    """Everything resolved before a model is loaded: what will run, and where it will be recorded."""

    options: EvalOptions
    ref: ModelRef
    hparams: Any
    networks: Networks | None
    cases: list[EditCase]
    config: dict[str, Any]
    folder: Path

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        groups = self.options.protocol.groups(len(self.cases))
        return {**self.config, "groups": len(groups), "last_group": len(groups[-1]), "run": str(self.folder)}


def plan_evaluation(options: EvalOptions) -> EvalPlan:
    """Resolve names, hyper-parameters and data; raise a UserError if anything cannot be used. Loads no model."""
    from mmedit_cli.backbones._loading import check_answers
    from mmedit_cli.datasets.base import DataOptions, fingerprint, read_data

    ref = find_model(options.model.model, revision=options.model.revision)
    check_answers(ref)
    networks = networks_of(options.editor, ref.name, options.records, options.checkpoint)
    path = None if networks is None else networks.path
    variant = variant_for(options.editor, ref, options.hparams)
    editor, hparams = resolve_editor(options.editor, variant, options.hparams, options.overrides, path)
    data = read_data(options.data, limit=options.limit, options=options.data_options or DataOptions())
    cases, line_breaks = _one_line_targets(data.cases)
    check_facts(editor, cases)
    check_pictures(cases)
    size = options.protocol.sequential
    if size > len(cases):
        raise DataError(
            f"--sequential {size}: {options.data} has {len(cases)} cases", f"use --sequential {len(cases)} or less"
        )
    protocol = asdict(options.protocol)
    protocol.pop("cache_bytes")
    config = {
        "command": "eval",
        "editor": editor.name,
        "hparams": used_hparams(hparams),
        "variant": variant,
        "model": {"name": ref.name, "family": ref.family, "fingerprint": ref.fingerprint},
        "device": options.model.device,
        "dtype": options.model.dtype,
        "data": {
            "name": data.name,
            "cases": len(cases),
            "fingerprint": fingerprint(cases),
            **data.selection,
            **line_breaks,
        },
        "protocol": {k: list(v) if isinstance(v, tuple) else v for k, v in protocol.items()},
        "seed": options.seed,
        "scoring": SCORING,
        "versions": runtime.versions(),
    }
    if networks is not None:
        config["checkpoint"] = sha256_of(networks.path)
    folder = Run.locate(options.records, ("eval", editor.name, ref.name, config["data"]["name"]), config)
    return EvalPlan(options, ref, hparams, networks, cases, config, folder)


def evaluate(options: EvalOptions, out: Output | None = None) -> dict[str, Any]:
    """Evaluate an editor and return the report; a finished run is only read, an interrupted one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    out = out or Output()
    plan = plan_evaluation(options)
    return Run.done_before(plan.folder, force=options.force, say=out.note) or run_evaluation(plan, out)


def run_evaluation(plan: EvalPlan, out: Output) -> dict[str, Any]:
    """Load the model, make the edits, ask, and write the report."""
    from mmedit_cli.evaluation.report import build_report, examples
    from mmedit_cli.evaluation.vlm import PREPARING, evaluate_edits

    options, protocol = plan.options, plan.options.protocol
    out.note(told(options.editor, plan.config["variant"]))
    backbone = load_model(options.model, plan.ref, out)
    plan, too_long = _without_long(plan, backbone)
    check_queries(backbone, plan.cases, sayable=protocol.generates)
    editor: Editor = registry.editors.get(options.editor)(backbone, plan.hparams, seed=options.seed)
    if plan.networks is not None:
        out.note(networks_line(plan.networks.facts()))
        editor.load_networks(plan.networks.path)  # type: ignore[attr-defined]
    environment = runtime.environment(backbone.device)
    base = (
        plan.options.records
        / "base"
        / plan.ref.name.replace("/", "--")
        / _base_key(plan, backbone, editor.first_layer)
    )
    with Run.open(plan.folder, plan.config, environment, force=options.force) as run:
        if report := Run.done_before(plan.folder, force=False, say=out.note):
            return report  # of an equal command that ended while the model was loaded here
        groups = protocol.groups(len(plan.cases))
        after = sum(sum(protocol.milestones(len(group))) for group in groups)
        totals = {"before": len(plan.cases), "edits": len(plan.cases), "after": after}
        if editor.first_layer is not None:
            totals = {PREPARING: count_queries(plan.cases), **totals}
        with out.progress(totals) as tick:
            asked = evaluate_edits(editor, plan.cases, run, protocol, base_folder=base, tick=tick)
        head = {
            k: plan.config[k]
            for k in ("editor", "model", "data", "hparams", "variant", "protocol", "seed", "versions")
        }
        head |= {"checkpoint": plan.config.get("checkpoint")}
        head |= {"networks": None if plan.networks is None else plan.networks.facts()}
        cases = run.read("cases")
        head["data"] = {**plan.config["data"], **too_long}
        if protocol.generates and backbone.own_settings:
            head["ignored_settings"] = backbone.own_settings
        head |= {"environment": run.environment, "examples": examples(cases, plan.cases)}
        report = build_report(head, cases, run.read("edits"), protocol.sequential)
        report["cost"]["asked"] = asked
        report["cost"]["peak_memory"] = runtime.peak_memory(backbone.device)
        run.remove_tensors("editor")  # only there to continue from, and may be as large as a model
        run.finish(report)
    return report


def load_backbone(model: str, **options: Any) -> VisionLanguageModel:
    """Return the backbone for a name of the catalogue, a local folder or a hub id.

    `options` are device, dtype, device_map and revision, as on the command line.
    """
    from mmedit_cli.backbones import _loading

    return _loading.load_backbone(model, **options)


def load_editor(
    name: str,
    backbone: VisionLanguageModel,
    *,
    hparams: Path | None = None,
    overrides: Sequence[str] = (),
    checkpoint: Path | str | None = None,
    seed: int = 0,
    records: Path = Path("records"),
) -> Editor:
    """Return an editor for a backbone, with the hyper-parameters of hparams/NAME.yaml and its variant for the model.

    `overrides` are KEY=VALUE texts. An editor that is trained first reads the networks that come along, or those that
    `checkpoint` names: "latest" (the newest training in `records`), a file, the folder or the id of a run; with
    "untrained" they are random. Raises UnknownName, HparamsError, UserError if there are no trained networks, or
    StateError if they do not fit.
    """
    cls = registry.editors.get(name)
    found = None
    if cls.trains and checkpoint != "untrained":
        found = find_networks(name, backbone.name, records, checkpoint).path
    cls, values = resolve_editor(name, variant_for(name, backbone, hparams), hparams, overrides, found)
    editor: Editor = cls(backbone, values, seed=seed)
    if found is not None:
        editor.load_networks(found)  # type: ignore[attr-defined]
    return editor


def networks_of(editor: str, model: str, records: Path, checkpoint: Path | str | None) -> Networks | None:
    """Return the networks of an editor that is trained first; None for another, which takes no `checkpoint`.

    Raises UserError.
    """
    if registry.editors.get(editor).trains:
        return find_networks(editor, model, records, checkpoint)
    if checkpoint is not None:
        raise UserError(f"--checkpoint {checkpoint}: {editor} has no networks", "leave the option out")
    return None


def used_hparams(hparams: Any) -> dict[str, Any]:
    """Return the hyper-parameters that matter once an editor is trained: how that went is told by its own run."""
    return {key: value for key, value in to_dict(hparams).items() if key != "training"}


def resolve_editor(
    name: str, variant: str | None, file: Path | None, overrides: Sequence[str], networks: Path | None = None
) -> tuple[type[Editor], Any]:
    """Return the class of an editor and its hyper-parameters, of a variant of the file (see `variant_for`).

    They are those of `file`, else those the networks were trained with, else hparams/NAME.yaml.
    """
    from mmedit_cli.hparams import load_hparams

    editor = registry.editors.get(name)
    if file is None and networks is not None:
        from mmedit_cli.editors.base import read_state

        text = read_state(networks)[1].get("hparams", "{}")
        trained = parse_json_object(text, f"{networks}: hparams", error=StateError).values
        overrides = [*(f"{key}={json.dumps(value)}" for key, value in trained.items()), *overrides]
    return editor, load_hparams(
        file or registry.hparams_file(name), editor.Hparams, variant=variant, overrides=overrides
    )


def variant_for(editor: str, model: ModelRef | VisionLanguageModel, file: Path | None = None) -> str | None:
    """Return which variant of an editor's hyper-parameters is for a model, by its config; None if there is none."""
    shape = shape_of(model) if isinstance(model, ModelRef) else shape_of_config(model.model.config)
    return pick_variant(file or registry.hparams_file(editor), shape, model.name)


def load_model(options: ModelOptions, ref: ModelRef, out: Output) -> VisionLanguageModel:
    """Load the model that was found, saying so: it may take a while."""
    out.note(loading(ref.name))
    from mmedit_cli.backbones import _loading

    return _loading.load_backbone(ref, device=options.device, dtype=options.dtype, device_map=options.device_map)


def _one_line_targets(cases: list[EditCase]) -> tuple[list[EditCase], dict[str, int]]:
    """Return the cases without line breaks in their targets, and for the report how many cases had one."""
    from mmedit_cli.datasets.base import change

    changed = [change(case, in_one_line) for case in cases]
    count = sum(case != new for case, new in zip(cases, changed, strict=True))
    return (changed, {"line_breaks": count}) if count else (cases, {})


def check_queries(backbone: VisionLanguageModel, cases: Sequence[EditCase], *, sayable: bool = False) -> None:
    """Tokenise every query of the cases; raise DataError naming each one the model cannot take.

    With `sayable`, also each target that is scored and that no free answer can match.
    """
    from mmedit_cli.evaluation.answers import check_sayable

    problems, hint = [], ""
    for case in cases:
        for column, queries in case.columns():
            scored = sayable and not column.startswith(("locality.", "needs."))
            for query in queries:
                try:
                    backbone.encode(query)
                    if scored:
                        check_sayable(backbone, query)
                except DataError as error:
                    problems += [f"{case.place}: {case.uid}: {column}: {problem}" for problem in error.problems]
                    hint = hint or error.hint
    if problems:
        raise DataError(problems[:20], hint)


def _without_long(plan: EvalPlan, backbone: VisionLanguageModel) -> tuple[EvalPlan, dict[str, Any]]:
    """Leave out what the model cannot read, if that was asked for; return what is left, and the counts for the report.

    A case goes with its request; of the others only the probes that are too long.
    """
    if not plan.config["data"].get("skip_long"):
        return plan, {}
    from mmedit_cli.datasets.base import change

    def fits(query: Query) -> Query | None:
        try:
            whole, asked = backbone.encode(query), backbone.encode(query, with_answer=False)
        except TooLong:
            return None
        return query if max(len(whole.ids), len(asked.ids) + 1) <= backbone.max_length else None

    cases = [change(case, fits) for case in plan.cases if fits(case.request)]
    if not cases:
        raise DataError(f"every case is too long for {backbone.name}, which reads {backbone.max_length} tokens")
    queries = [sum(len(q) for case in some for _, q in case.columns()) for some in (plan.cases, cases)]
    counts = {"cases": len(plan.cases) - len(cases), "queries": queries[0] - queries[1]}
    return replace(plan, cases=cases), {"too_long": counts}


def count_queries(cases: Iterable[EditCase]) -> int:
    """Return how many different queries some cases ask."""
    return len({query for case in cases for _, queries in case.columns() for query in queries})


def check_facts(editor: type[Editor], cases: Sequence[EditCase]) -> None:
    """Raise DataError naming each fact that an editor cannot be taught because it has no picture."""
    if not editor.needs_image:
        return
    from mmedit_cli.editors.base import TEXT_ONLY_HINT

    problem = f"{editor.name} routes by the picture, and this fact has none"
    places = [case.place for case in cases if case.request.image is None]
    if places:
        raise DataError([f"{place}: {problem}" if place else problem for place in places[:20]], TEXT_ONLY_HINT)


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
                    problems += [f"{case.place}: {column}: {problem}" for problem in error.problems]
                    hint = hint or error.hint
    if problems:
        raise DataError(problems[:20], hint or "replace the file, or take the record out")


def _base_key(plan: EvalPlan, backbone: VisionLanguageModel, layer: int | None) -> str:
    """Return a digest of all that the answers of the untouched model depend on: the editor is not part of it."""
    protocol = plan.options.protocol
    return sha256_json(
        {
            "model": plan.ref.fingerprint,
            "data": plan.config["data"]["fingerprint"] + ("-short" if "skip_long" in plan.config["data"] else ""),
            "device": backbone.device.type,
            "dtype": str(backbone.dtype),
            "layer": layer,
            "batch_size": protocol.batch_size,
            "max_new_tokens": protocol.max_new_tokens if protocol.generates else 0,
            "scoring": plan.config["scoring"],
            "top": "tf_easyedit" in protocol.protocols,
            "versions": plan.config["versions"],
        }
    )[:12]
