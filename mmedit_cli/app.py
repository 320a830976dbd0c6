"""The command line: one short function a command; what it does lies in workflows, which it imports when called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import __version__, options
from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.output import Output, report_error, report_failure

_INTERRUPTED = 130  # typer's own exit code for control-c

app = typer.Typer(
    help="Edit multimodal models, and measure honestly what the edit did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    editor: Annotated[str, typer.Argument(metavar="EDITOR", help="An editor of `mmedit list`.")],
    model: options.Model = None,
    data: options.Data = "emojikb",
    root: options.Root = None,
    images: options.Images = None,
    template: options.Template = "",
    subset: options.Subset = "",
    skip_missing: options.SkipMissing = False,
    skip_long: options.SkipLong = False,
    sequential: Annotated[int, typer.Option("--sequential", "-n", help="Edits in a row before asking about all.")] = 1,
    report_at: Annotated[str, typer.Option(help="Also ask after so many edits, e.g. 1,10,100.")] = "",
    edit_batch: Annotated[int, typer.Option(help="Edits made in one operation.")] = 1,
    protocols: Annotated[
        str, typer.Option(help="Of ar, ar_em, ar_f1, tf_liveedit, tf_easyedit, tf_em.")
    ] = "ar,tf_liveedit,tf_easyedit,tf_em",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many cases.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Queries in one forward pass.")] = 16,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for frozen activations; more goes to disk.")] = 2.0,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
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

      mmedit eval ft --model tiny-blip2 --data tests/data/shapes --sequential 8 --report-at 1,8

      mmedit eval ft -m tiny-llava --data tests/data/shapes --set target=connector --json

      mmedit eval ft --data evqa --root easy-edit-mm --images coco --subset clean --limit 1000 --sequential 1000
    """
    from mmedit_cli import show, workflows
    from mmedit_cli.datasets.base import DataOptions
    from mmedit_cli.evaluation.vlm import Protocol

    protocol = Protocol(
        sequential=sequential,
        report_at=_numbers(report_at, "--report-at"),
        edit_batch=edit_batch,
        protocols=tuple(dict.fromkeys(name.strip() for name in protocols.split(",") if name.strip())),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        cache_bytes=int(cache_gib * (1 << 30)),
    )
    out = Output(as_json=as_json)
    request = workflows.EvalOptions(
        editor, workflows.ModelOptions(_named(model, out), device, dtype, device_map, revision), data, protocol,
        data_options=DataOptions(root, images, template, subset, skip_missing, skip_long),
        hparams=hparams, overrides=tuple(overrides or ()), limit=limit, seed=seed, records=records, force=force,
    )  # fmt: skip
    if dry_run:
        show.plan(out, workflows.plan_evaluation(request).describe())
    else:
        show.report(out, workflows.evaluate(request, out))


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
    asked = workflows.ModelOptions(_named(model, out), device, dtype, device_map, revision)
    answer = workflows.answer(asked, prompt, image, max_new_tokens=max_new_tokens, out=out)
    out.result({"prompt": prompt, "image": str(image) if image else None, "answer": answer}, lambda: out.line(answer))


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
    records: options.Records = Path("records"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the report of a run, or list the finished runs."""
    from mmedit_cli import show

    out = Output(as_json=as_json)
    show.runs(out, records) if run is None else show.report(out, show.read_report(run))


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


def _named(model: str | None, out: Output) -> str:
    """Return the model that was named, or the default one, saying which it is."""
    if model is not None:
        return model
    from mmedit_cli.catalog import default_model

    out.note(f"no --model: {default_model()}")
    return default_model()


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers separated by commas."""
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError as error:
        raise UserError(
            f"{option} {text}: not whole numbers separated by commas", f"e.g. {option} 1,10,100"
        ) from error


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
