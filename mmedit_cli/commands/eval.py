"""`mmedit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedit_cli import options
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output

if TYPE_CHECKING:
    from mmedit_cli.drawing.workflow.plan import ConceptEvalOptions


def evaluate(
    editor: Annotated[
        str | None,
        typer.Argument(
            metavar="[EDITOR]",
            help="An editor of `mmedit list`; without one, the one that comes trained.",
        ),
    ] = None,
    model: options.Model = None,
    data: options.Data = "emojikb",
    root: options.Root = None,
    images: options.Images = None,
    template: options.Template = "",
    subset: options.Subset = "",
    skip_missing: options.SkipMissing = False,
    skip_long: options.SkipLong = False,
    sequential: Annotated[
        int,
        typer.Option(
            "--sequential", "-n", help="Edits in a row before asking about all."
        ),
    ] = 1,
    report_at: Annotated[
        str | None,
        typer.Option(
            help="Also ask after so many edits. [default: 1, 10, 100, ... below --sequential]",
            show_default=False,
        ),
    ] = None,
    edit_batch: Annotated[int, typer.Option(help="Edits made in one operation.")] = 1,
    protocols: Annotated[
        str, typer.Option(help="Of ar, ar_em, ar_f1, tf_liveedit, tf_easyedit, tf_em.")
    ] = "ar,tf_liveedit,tf_easyedit,tf_em",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use the first so many cases.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(help="Longest generated answer, or more where a target needs it."),
    ] = 16,
    batch_size: Annotated[int, typer.Option(help="Queries in one forward pass.")] = 32,
    cache_gib: Annotated[
        float,
        typer.Option(min=0, help="Memory for frozen activations; more goes to disk."),
    ] = 2.0,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    checkpoint: options.Checkpoint = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Edit, ask, and report: after 1 edit or after 1,000. The same command again continues, or shows the report.

    Examples:

      mmedit eval --sequential 1000

      mmedit eval ft --model tiny-blip2 --data tests/data/shapes --sequential 8 --report-at 1,8

      mmedit eval mgie --data emojikb-edits --limit 100 --set steps=20 --set clip=openai/clip-vit-base-patch32

      mmedit eval perfusion --model mini-sd --data emojikb-concepts --set eval.seeds=4

      mmedit eval ft --data evqa --root easy-edit-mm --images coco --subset clean --limit 1000 --sequential 1000
    """
    from mmedit_cli import registry
    from mmedit_cli.drawing.workflow.plan import ConceptEvalOptions
    from mmedit_cli.knowledge import loading
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.evaluation.protocol import Protocol, milestones
    from mmedit_cli.knowledge.trained_networks import default_editor
    from mmedit_cli.knowledge.workflow import evaluation
    from mmedit_cli.picture_editing.workflow import evaluation as picture_evaluation
    from mmedit_cli.reports import show

    out = Output(as_json=as_json)
    kind, changes = editor and registry.kind_of(editor), tuple(overrides or ())
    strange = {"--sequential": sequential != 1, "--template": bool(template)}
    if kind is registry.image_editors:
        strange |= {
            "--root": root is not None,
            "--dry-run": dry_run,
            "--hparams": hparams is not None,
        }
        request = picture_evaluation.ImageEvalOptions(
            editor, model, picture_evaluation.LoadOptions(device, dtype, revision), data, changes, limit, batch_size,
            seed, records, force, checkpoint,
        )  # fmt: skip
        show.image_scores(out, picture_evaluation.evaluate(request, out, strange))
        return
    if kind is registry.personalizers:
        strange |= {"--checkpoint": checkpoint is not None}
        strange |= {
            "--subset": bool(subset),
            "--images": images is not None,
            "--device-map": device_map is not None,
        }
        asked = ConceptEvalOptions(
            editor, options.named_drawing(model, out), data, root, hparams, changes, limit, seed, device, dtype,
            revision, records, force,
        )  # fmt: skip
        _personalizer(
            asked, {**strange, "--report-at": report_at is not None}, dry_run, out
        )
        return
    at = (
        milestones(sequential)
        if report_at is None
        else tuple(sorted(options.numbers(report_at, "--report-at")))
    )
    names = tuple(
        dict.fromkeys(name.strip() for name in protocols.split(",") if name.strip())
    )
    room = options.cache_bytes(cache_gib)
    protocol = Protocol(
        sequential, at, edit_batch, names, max_new_tokens, batch_size, cache_bytes=room
    )
    if editor is None:
        editor, model = default_editor(records, model, checkpoint)
        out.note(f"no EDITOR: {editor} on {model}")
    how = loading.ModelOptions(
        options.named(model, out), device, dtype, device_map, revision
    )
    request = evaluation.EvalOptions(
        editor, how, data, protocol, DataOptions(root, images, template, subset, skip_missing, skip_long), hparams,
        overrides=changes, checkpoint=checkpoint, limit=limit, seed=seed, records=records, force=force,
    )  # fmt: skip
    if dry_run:
        show.plan(out, evaluation.plan_evaluation(request).describe())
    else:
        show.report(out, evaluation.evaluate(request, out))


def _personalizer(
    asked: ConceptEvalOptions, strange: dict[str, bool], dry_run: bool, out: Output
) -> None:
    """Evaluate a method that teaches a model what to draw."""
    from mmedit_cli.drawing.workflow import evaluation as concept_evaluation
    from mmedit_cli.drawing.workflow import plan
    from mmedit_cli.reports import show

    if wrong := [option for option, given in strange.items() if given]:
        raise UserError(
            f"{', '.join(wrong)}: means nothing to a personalizer",
            "its settings: --set eval.steps=25",
        )
    if dry_run:
        show.plan(out, plan.plan_evaluation(asked).describe())
    else:
        show.concept_scores(out, concept_evaluation.evaluate(asked, out))
