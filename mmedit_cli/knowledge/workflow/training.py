"""Training of the networks of an editor: `mmedit train-editor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, find_model
from mmedit_cli.errors import DataError, UserError
from mmedit_cli.hparams import to_dict
from mmedit_cli.knowledge.loading import (
    ModelOptions,
    check_sight,
    depth_of,
    load_model,
    resolve_editor,
    variant_for,
)
from mmedit_cli.knowledge.workflow.evaluation import (
    check_pictures,
    check_queries,
    check_seen,
    count_queries,
)
from mmedit_cli.output import Output
from mmedit_cli.records import Run, shared_run
from mmedit_cli.shapes import told
from mmedit_cli.types import EditCase

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.base import DataOptions

# without a split for validation, one case in so many is held out of the training
HELD_OUT = 20


@dataclass(frozen=True)
class EditorTrainingOptions:
    """What to train; the defaults are those of `mmedit train-editor`."""

    editor: str
    model: ModelOptions
    data: str
    validation: str | None = None
    data_options: DataOptions | None = None
    hparams: Path | None = None
    overrides: Sequence[str] = ()
    limit: int | None = None
    batch_size: int = 32
    cache_bytes: int = 4 << 30
    seed: int = 0
    records: Path = Path("records")
    force: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class EditorTrainingPlan:
    """Everything resolved before a model is loaded."""

    options: EditorTrainingOptions
    ref: ModelRef
    hparams: Any
    cases: list[EditCase]
    held_out: list[EditCase]
    config: dict[str, Any]
    folder: Path


def plan_training(options: EditorTrainingOptions) -> EditorTrainingPlan:
    """Resolve names, hyper-parameters and data; raise a UserError if anything cannot be used. Loads no model."""
    from mmedit_cli.knowledge.data.base import fingerprint

    ref = find_model(options.model.named, revision=options.model.revision)
    check_sight(options.editor, ref)
    variant = variant_for(options.editor, ref, options.hparams)
    editor, hparams = resolve_editor(
        options.editor,
        variant,
        options.hparams,
        options.overrides,
        depth=depth_of(ref),
    )
    if not editor.trains:
        names = registry.editors.names()
        trained = [name for name in names if registry.editors.get(name).trains]
        raise UserError(
            f"{editor.name} needs no training",
            f"editors with networks to train: {', '.join(trained)}",
        )
    name, cases, held_out = training_cases(options)
    check_seen(ref, [*cases, *held_out], options.data)
    check_pictures([*cases, *held_out])
    config = {
        "command": "train-editor",
        "editor": editor.name,
        "hparams": to_dict(hparams),
        "variant": variant,
        "model": ref.described(),
        "device": options.model.device,
        "dtype": options.model.dtype,
        "data": {"name": name, "cases": len(cases), "fingerprint": fingerprint(cases)},
        "validation": {"cases": len(held_out), "fingerprint": fingerprint(held_out)},
        "batch_size": options.batch_size,
        "processes": runtime.process_count(),
        "seed": options.seed,
        "versions": runtime.versions(),
    }
    folder = Run.locate(
        options.records, ("train-editor", editor.name, ref.name, name), config
    )
    return EditorTrainingPlan(
        options,
        ref,
        hparams,
        cases,
        held_out,
        config,
        folder,
    )


def training_cases(
    options: EditorTrainingOptions,
) -> tuple[str, list[EditCase], list[EditCase]]:
    """Return (name, cases to train on, cases held out).

    A named data set is trained on its `train` split and held out on `val`, never on what it is evaluated with; where
    there is no split for it, every twentieth case is held out.
    """
    from mmedit_cli.knowledge.data.base import DataOptions, find_dataset, read_data

    train = options.data
    validation = options.validation
    how = options.data_options or DataOptions()
    named = find_dataset(options.data)
    if named is not None and ":" not in options.data:
        dataset, _ = named
        if "train" in dataset.splits:
            train = f"{options.data}:train"
            if validation is None and "val" in dataset.splits:
                validation = f"{options.data}:val"
    data = read_data(train, limit=options.limit, options=how)
    name = data.name if named is None else options.data
    if validation is not None:
        held_out = read_data(validation, options=how)
        return name, data.cases, held_out.cases
    if len(data.cases) < HELD_OUT:
        raise DataError(
            f"{train}: {len(data.cases)} cases are too few to hold some out",
            "name others with --validation",
        )
    kept = [case for i, case in enumerate(data.cases) if i % HELD_OUT]
    return name, kept, data.cases[::HELD_OUT]


def train(options: EditorTrainingOptions, out: Output | None = None) -> dict[str, Any]:
    """Train the networks of an editor and return the report; a finished run is only read, another one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    talk = out or Output()
    plan = plan_training(options)
    return Run.report_once(
        plan.folder,
        lambda: run_training(plan, talk),
        force=options.force,
        say=talk.note,
    )


def run_training(plan: EditorTrainingPlan, out: Output) -> dict[str, Any]:
    """Load the model, train, and write the best networks and the report; the first process writes, all return it."""
    from mmedit_cli.knowledge.evaluation.protocol import PREPARING
    from mmedit_cli.knowledge.training_loop import (
        Conditions,
        train_networks,
        with_alternatives,
    )

    options = plan.options
    processes = runtime.join_processes(options.model.device)
    model = replace(options.model, device=processes.device)
    if processes.rank:
        out = Output(quiet=True)
    out.note(told(options.editor, plan.config["variant"]))
    backbone = load_model(model, plan.ref, out)
    steps: int = plan.hparams.training.steps
    taught = with_alternatives(
        plan.cases,
        plan.hparams.training,
        options.seed,
    )
    shown = [*chain.from_iterable(taught), *plan.held_out]
    totals = {PREPARING: count_queries(shown), "steps": steps}
    out.note(
        f"{len(plan.cases):,} cases; {totals[PREPARING]:,} questions are run through the frozen layers once, as the "
        f"first of {steps:,} steps need them"
    )
    check_queries(backbone, [*plan.cases, *plan.held_out])
    cls = registry.editors.get(options.editor)
    editor = cls(backbone, plan.hparams, seed=options.seed)
    with ExitStack() as stack:
        shared = shared_run(
            plan.folder,
            plan.config,
            runtime.environment(backbone.device),
            processes,
            force=options.force,
        )
        run = stack.enter_context(shared)
        conditions = Conditions(
            processes,
            options.batch_size,
            options.cache_bytes,
            say=out.note,
        )
        if options.tensorboard and processes.rank == 0:
            curve = stack.enter_context(tensorboard(plan.folder))
            conditions = replace(conditions, curve=curve)
        tick = stack.enter_context(out.progress(totals))
        conditions = replace(conditions, tick=tick)
        result = train_networks(
            editor,
            plan.cases,
            plan.held_out,
            run,
            conditions,
        )
        if processes.rank == 0:
            elsewhere = ("device", "dtype", "batch_size")
            head = {k: v for k, v in plan.config.items() if k not in elsewhere}
            report = {
                "format": 1,
                **head,
                "environment": run.environment,
                **result,
                "run": str(plan.folder),
            }
            run.finish(report)
    processes.wait()
    finished = Run.finished(plan.folder)
    assert finished is not None
    return finished


@contextmanager
def tensorboard(folder: Path) -> Iterator[Callable[[str, float, int], None]]:
    """Yield `curve(name, value, step)`, which writes for TensorBoard; raise UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard: tensorboard is not installed", "pip install tensorboard"
        ) from error
    with SummaryWriter(folder / "tensorboard") as writer:
        yield writer.add_scalar
