"""The command line: one short function a command; what it does lies in workflows, which it imports when called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import __version__, options
from mmedit_cli.errors import MmeditError
from mmedit_cli.output import Output, report_error, report_failure

_INTERRUPTED = 130  # typer's own exit code for control-c

app = typer.Typer(
    help="Edit multimodal models, and measure honestly what the edit did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

conversions = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(conversions, name="convert", help="Turn published weights into a model folder.")


def _version(value: bool) -> None:
    if value:
        Output().line(f"mmedit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


@app.command("eval")
def eval_(
    editor: Annotated[
        str | None,
        typer.Argument(
            metavar="[EDITOR]", help="An editor of `mmedit list`; without one, the newest that was trained."
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
    sequential: Annotated[int, typer.Option("--sequential", "-n", help="Edits in a row before asking about all.")] = 1,
    report_at: Annotated[
        str | None,
        typer.Option(
            help="Also ask after so many edits. [default: 1, 10, 100, ... below --sequential]", show_default=False
        ),
    ] = None,
    edit_batch: Annotated[int, typer.Option(help="Edits made in one operation.")] = 1,
    protocols: Annotated[
        str, typer.Option(help="Of ar, ar_em, ar_f1, tf_liveedit, tf_easyedit, tf_em.")
    ] = "ar,tf_liveedit,tf_easyedit,tf_em",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many cases.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Queries in one forward pass.")] = 32,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for frozen activations; more goes to disk.")] = 2.0,
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

      mmedit eval ft -m tiny-llava --data tests/data/shapes --set target=connector --json

      mmedit eval ft --data evqa --root easy-edit-mm --images coco --subset clean --limit 1000 --sequential 1000
    """
    from mmedit_cli import show, workflows
    from mmedit_cli.datasets.base import DataOptions
    from mmedit_cli.evaluation.vlm import Protocol, milestones

    protocol = Protocol(
        sequential=sequential,
        report_at=milestones(sequential) if report_at is None else options.numbers(report_at, "--report-at"),
        edit_batch=edit_batch,
        protocols=tuple(dict.fromkeys(name.strip() for name in protocols.split(",") if name.strip())),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        cache_bytes=int(cache_gib * (1 << 30)),
    )
    out = Output(as_json=as_json)
    if editor is None:
        editor, model = workflows.newest_editor(records, model)
        out.note(f"no EDITOR: {editor} on {model}")
    request = workflows.EvalOptions(
        editor, workflows.ModelOptions(options.named(model, out), device, dtype, device_map, revision), data, protocol,
        data_options=DataOptions(root, images, template, subset, skip_missing, skip_long),
        hparams=hparams, overrides=tuple(overrides or ()), checkpoint=checkpoint, limit=limit, seed=seed,
        records=records, force=force,
    )  # fmt: skip
    if dry_run:
        show.plan(out, workflows.plan_evaluation(request).describe())
    else:
        show.report(out, workflows.evaluate(request, out))


@app.command("train-editor")
def train_editor(
    editor: Annotated[str, typer.Argument(metavar="EDITOR", help="An editor of `mmedit list` that is trained first.")],
    model: options.Model = None,
    data: options.Data = "emojikb",
    validation: Annotated[
        str | None,
        typer.Option(
            help="Cases that choose the checkpoint. [default: the val split, else every 20th case]", show_default=False
        ),
    ] = None,
    root: options.Root = None,
    images: options.Images = None,
    template: options.Template = "",
    skip_missing: options.SkipMissing = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Train on the first so many cases.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries in one frozen forward pass.")] = 32,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for frozen activations; more goes to disk.")] = 4.0,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: options.Force = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write the curves for TensorBoard.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train the networks of an editor for a model. The same command again continues where it stopped.

    A named data set is trained on its train split; its val split chooses the checkpoint. What is trained is found by
    `mmedit eval` without further words. Under `accelerate launch` or `torchrun` several processes train together.

    Examples:

      mmedit train-editor liveedit --model mini-blip2

      mmedit train-editor liveedit --model mini-llava --set training.steps=1000 --records my-records
    """
    from mmedit_cli import show, training_runs, workflows
    from mmedit_cli.datasets.base import DataOptions

    out = Output(as_json=as_json)
    request = training_runs.TrainOptions(
        editor, workflows.ModelOptions(options.named(model, out), device, dtype, device_map, revision), data,
        validation=validation, data_options=DataOptions(root, images, template, skip_missing=skip_missing),
        hparams=hparams, overrides=tuple(overrides or ()), limit=limit, batch_size=batch_size,
        cache_bytes=int(cache_gib * (1 << 30)), seed=seed, records=records, force=force, tensorboard=tensorboard,
    )  # fmt: skip
    show.training(out, training_runs.train(request, out))


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    model: options.Model = None,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", help="The picture asked about.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Ask a model one question.

    Example:

      mmedit ask --model llava-1.5-7b --image cat.png "What is this?"
    """
    from mmedit_cli import workflows

    out = Output(as_json=as_json)
    asked = workflows.ModelOptions(options.named(model, out), device, dtype, device_map, revision)
    answer = workflows.answer(asked, prompt, image, max_new_tokens=max_new_tokens, out=out)
    out.result({"prompt": prompt, "image": str(image) if image else None, "answer": answer}, lambda: out.line(answer))


@conversions.command("minigpt4")
def convert_minigpt4(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the model is written; it must not exist.")],
    vision: Annotated[Path, typer.Option(help="eva_vit_g.pth of LAVIS.")],
    qformer: Annotated[Path, typer.Option(help="blip2_pretrained_flant5xxl.pth of LAVIS.")],
    projection: Annotated[Path, typer.Option(help="prerained_minigpt4_7b.pth of MiniGPT-4.")],
    llm: Annotated[Path, typer.Option(help="Folder of Vicuna-7B with its tokenizer, e.g. of Vision-CAIR/vicuna-7b.")],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Put the four published parts of MiniGPT-4 together; nothing in them is executed.

    Where the parts are:

      https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/  (vision, qformer)

      https://huggingface.co/spaces/Vision-CAIR/minigpt4  (projection)

      https://huggingface.co/Vision-CAIR/vicuna-7b  (llm)

    Then:

      mmedit convert minigpt4 models/minigpt4-7b --vision eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth
      --projection prerained_minigpt4_7b.pth --llm vicuna-7b

      mmedit ask --model models/minigpt4-7b --image cat.png "What is this?"
    """
    from mmedit_cli import runtime
    from mmedit_cli.backbones._minigpt4_weights import Published, convert

    output = Output(as_json=as_json)
    runtime.quiet_libraries()
    folder = convert(Published(vision, qformer, projection, llm), out, output.note)
    output.result({"model": str(folder), "family": "minigpt4"}, lambda: output.line(str(folder)))


@app.command("list")
def list_(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Show the editors and what each supports, the models, and the data sets."""
    from mmedit_cli import show

    show.catalogue(Output(as_json=as_json))


@app.command()
def report(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder; without it, all finished runs.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw some of its edits into this PNG file.", show_default=False)
    ] = None,
    records: options.Records = Path("records"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the report of a run, or list the finished runs.

    Examples:

      mmedit report

      mmedit report records/eval/liveedit/mini-blip2/emojikb/0123456789ab --picture edits.png
    """
    from mmedit_cli import show

    out = Output(as_json=as_json)
    if run is None:
        show.runs(out, records)
        return
    found = show.read_report(run)
    if picture is not None:
        from mmedit_cli.gallery import draw

        draw(found.get("examples", ()), picture)
        out.note(f"drawn: {picture}")
    show.report(out, found)


@app.command()
def doctor(
    data: Annotated[
        str | None, typer.Argument(help="Also check the cases and images of this data.", show_default=False)
    ] = None,
    root: options.Root = None,
    images: options.Images = None,
    skip_missing: options.SkipMissing = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check the installation, and the data if some are named; exit 1 if something is wrong.

    Published data are also compared with their training side, and the list for `--subset clean` is written.

    Examples:

      mmedit doctor emojikb

      mmedit doctor evqa --root easy-edit-mm --images coco

      mmedit doctor my_facts.csv
    """
    from mmedit_cli import doctor as checks
    from mmedit_cli.datasets.base import DataOptions

    well = checks.run(Output(as_json=as_json), data, DataOptions(root, images, skip_missing=skip_missing))
    raise typer.Exit(0 if well else 1)


@app.command()
def download(
    name: Annotated[
        str | None,
        typer.Argument(help="A group, GROUP/ITEM, a model of `mmedit list`, or a hub id.", show_default=False),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder of a data set. [default: NAME in $MMEDIT_DATA]", show_default=False),
    ] = None,
    list_groups: Annotated[bool, typer.Option("--list", help="Show what there is, and stop.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check what is there, file by file; exit 1 if wrong.")
    ] = False,
    catalogue: Annotated[
        Path | None, typer.Option(help="A YAML file with more groups, or mirrors.", show_default=False)
    ] = None,
    parts: Annotated[int, typer.Option(min=1, max=16, help="Connections for one large file.")] = 4,
    force: Annotated[bool, typer.Option("--force", help="Fetch again, and write over files that differ.")] = False,
    revision: options.Revision = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fetch data sets and models, checked and with their licence; the same command again continues.

    Data sets go to $MMEDIT_DATA, else to the user's cache; models to the cache of huggingface_hub ($HF_HOME). Tokens,
    HF_ENDPOINT and HF_HUB_OFFLINE work as usual.

    Examples:

      mmedit download --list

      mmedit download mmedit-data/annotations --to data/mmedit

      mmedit download llava-1.5-7b --dry-run
    """
    from mmedit_cli.download import commands

    out = Output(as_json=as_json)
    request = commands.Request(name, to, revision, catalogue, parts, force)
    if list_groups or name is None:
        commands.show_list(request, out)
    else:
        raise typer.Exit(0 if commands.run(request, out, dry_run=dry_run, verify=verify) else 1)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        app(args=arguments, prog_name="mmedit")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if code == _INTERRUPTED:
            report_error(MmeditError("interrupted", "the same command continues where it stopped"))
        return code
    except MmeditError as error:
        if "--debug" in arguments:
            raise
        report_error(error)
        return error.exit_code
    except Exception as error:
        if "--debug" in arguments:
            raise
        report_failure(error)
        return 1
    return 0
