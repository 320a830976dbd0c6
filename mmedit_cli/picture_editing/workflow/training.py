"""`mmedit train-editor` for image editors: resolve the options, and train."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, find_model
from mmedit_cli.errors import DataError, UserError
from mmedit_cli.hparams import to_dict
from mmedit_cli.knowledge.workflow.training import (
    HELD_OUT,
    EditorTrainingOptions,
    tensorboard,
)
from mmedit_cli.output import Output
from mmedit_cli.picture_editing.data.base import EditPair, fingerprint
from mmedit_cli.picture_editing.data.opening import NAMED, open_pairs
from mmedit_cli.records import Run, shared_run
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.shapes import hparams_for, told

DATA = "emojikb-edits"  # where no data are named
FOLDER = "train-image-editor"  # below the records


@dataclass(frozen=True)
class PictureTrainingPlan:
    """Everything resolved before a model is loaded."""

    options: EditorTrainingOptions
    ref: ModelRef
    hparams: Any
    pairs: list[EditPair]
    held_out: list[EditPair]
    config: dict[str, Any]
    folder: Path


def plan_training(options: EditorTrainingOptions) -> PictureTrainingPlan:
    """Resolve names, hyper-parameters and data; raise a UserError if anything cannot be used. Loads no model."""
    cls = registry.image_editors.get(options.editor)
    if not cls.trains:
        raise UserError(
            f"{cls.name} is not trained here", "image editors with a training: mgie"
        )
    ref = find_model(options.model.model, revision=options.model.revision)
    hparams, variant = hparams_for(
        options.editor,
        cls.Hparams,
        ref,
        options.hparams,
        overrides=options.overrides,
    )
    if hparams.training.batch_size < runtime.process_count():
        raise UserError(
            f"{runtime.process_count()} processes share a batch of {hparams.training.batch_size}"
        )
    name, pairs, held_out = training_pairs(options)
    config = {
        "command": "train-editor",
        "editor": cls.name,
        "hparams": to_dict(hparams),
        "variant": variant,
        "model": ref.described(),
        "device": options.model.device,
        "dtype": options.model.dtype,
        "data": {"name": name, "cases": len(pairs), "fingerprint": fingerprint(pairs)},
        "validation": {"cases": len(held_out), "fingerprint": fingerprint(held_out)},
        "processes": runtime.process_count(),
        "seed": options.seed,
        "versions": runtime.versions(),
    }
    folder = Run.locate(options.records, (FOLDER, cls.name, ref.name, name), config)
    return PictureTrainingPlan(options, ref, hparams, pairs, held_out, config, folder)


def training_pairs(
    options: EditorTrainingOptions,
) -> tuple[str, list[EditPair], list[EditPair]]:
    """Return (name, pairs to train on, pairs held out): a named set's own val split, else every twentieth pair."""
    data, validation = options.data, options.validation
    if data in NAMED and not Path(data).exists():
        validation = validation or f"{data}:val"
        data = f"{data}:train"
    name, pairs = open_pairs(data, limit=options.limit)
    if validation is not None:
        _, held_out = open_pairs(validation)
        return name, pairs, held_out
    if len(pairs) < 2:
        raise DataError(
            f"{data}: one pair is too few to hold some out",
            "name others with --validation",
        )
    held_out = pairs[::HELD_OUT] if len(pairs) >= HELD_OUT else pairs[:1]
    uids = {pair.uid for pair in held_out}
    others = [pair for pair in pairs if pair.uid not in uids]
    return name, others, held_out


def train(options: EditorTrainingOptions, out: Output | None = None) -> dict[str, Any]:
    """Train an image editor and return the report; a finished run is only read, another one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    out = out or Output()
    plan = plan_training(options)
    return Run.report_once(
        plan.folder,
        lambda: run_training(plan, out),
        force=options.force,
        say=out.note,
    )


def run_training(plan: PictureTrainingPlan, out: Output) -> dict[str, Any]:
    """Load the parts, train, and write the checkpoint and the report; the first process writes, all return it."""
    from mmedit_cli.knowledge.evaluation.protocol import PREPARING
    from mmedit_cli.knowledge.training_loop import Conditions
    from mmedit_cli.picture_editing.methods.mgie.parts import assemble
    from mmedit_cli.picture_editing.methods.mgie.training import train_mgie

    options = plan.options
    processes = runtime.join_processes(options.model.device)
    if processes.rank:
        out = Output(quiet=True)
    out.note(told(options.editor, plan.config["variant"]))
    out.note(f"loading {plan.ref.name} and {plan.hparams.diffusion}")
    load = LoadOptions(
        device=processes.device,
        dtype=options.model.dtype,
        revision=options.model.revision,
    )
    pipeline = assemble(options.model.model, plan.hparams, load, seed=options.seed)
    editor = registry.image_editors.get(options.editor)(
        pipeline, options.model.model, plan.ref.fingerprint
    )
    with ExitStack() as stack:
        environment = runtime.environment(editor.device)
        run = stack.enter_context(
            shared_run(
                plan.folder, plan.config, environment, processes, force=options.force
            )
        )
        how = Conditions(processes, say=out.note)
        if options.tensorboard and processes.rank == 0:
            how = replace(how, curve=stack.enter_context(tensorboard(plan.folder)))
        every = (*plan.pairs, *plan.held_out)
        totals = {
            PREPARING: sum(not pair.expressive for pair in every),
            "steps": plan.hparams.training.steps,
        }
        tick = stack.enter_context(out.progress(totals))
        result = train_mgie(
            editor,
            plan.hparams,
            plan.pairs,
            plan.held_out,
            run,
            replace(how, tick=tick),
            seed=options.seed,
        )
        if processes.rank == 0:
            head = dict(plan.config)
            del head["device"], head["dtype"]
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
