"""The command line: the commands by name, and what becomes of their errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmedit_cli import __version__
from mmedit_cli.commands import (
    ask,
    convert,
    covariance,
    doctor,
    download,
    edits,
    env,
    generate,
    image_edit,
    locate,
    report,
    serve,
    sweep,
    ui,
)
from mmedit_cli.commands import list as list_command
from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.kinds.command import by_kind, function_of
from mmedit_cli.output import Output, finish, report_error, report_failure
from mmedit_cli.runtime import sleep_while_waiting

_INTERRUPTED = 130  # typer's own exit code for control-c


def _group(**settings: Any) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, **settings)


app = _group(
    help="Edit multimodal models, and measure honestly what the edit did.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for task in ("eval", "train-editor", "edit"):
    app.command(task, cls=by_kind(task))(function_of(task))
app.command("ask")(ask.ask)
app.command("serve")(serve.serve)
app.command("ui")(ui.ui)
app.command("generate")(generate.generate)
app.command("locate")(locate.locate)
app.command("sweep")(sweep.sweep)
app.command("covariance")(covariance.covariance)
app.command("image-edit")(image_edit.image_edit)
app.command("list")(list_command.list_all)
app.command("doctor")(doctor.doctor)
app.command("download")(download.download)
app.command("env")(env.env)
kept = _group()
for task in ("edits list", "edits undo", "edits redo", "edits export"):
    kept.command(task.split()[1], cls=by_kind(task))(function_of(task))
kept.command("show")(edits.show)
kept.command("diff")(edits.diff)
kept.command("check")(edits.check)
kept.command("verify")(edits.verify)
kept.command("compact")(edits.compact)
kept.command("repair")(edits.repair)
app.add_typer(
    kept,
    name="edits",
    help="List, undo, compare, check and export the edits of a ledger.",
)
reports = typer.Typer(cls=report.ReportGroup, rich_markup_mode=None)
reports.command("show")(report.show)
reports.command("compare")(report.compare)
reports.command("view")(report.view)
reports.command("leaderboard")(report.leaderboard)
app.add_typer(
    reports,
    name="report",
    help="Show the report of a run, list the finished runs, compare or rank some, or make a page of them.",
)
conversions = _group()
conversions.command("minigpt4")(convert.minigpt4)
conversions.command("mgie")(convert.mgie)
conversions.command("safetensors")(convert.safetensors)
conversions.command("liveedit")(convert.liveedit)
conversions.command("checkpoint")(convert.checkpoint)
app.add_typer(
    conversions,
    name="convert",
    help="Turn published weights into a model folder, or into networks of an editor.",
)


def _version(value: bool) -> None:
    if value:
        Output().line(f"mmedit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE.py",
            help="Also use the editor, model family or data set of this file; repeatable. [env var: MMEDIT_PLUGINS]",
            show_default=False,
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the version and stop.",
        ),
    ] = False,
) -> None:
    from mmedit_cli.registry import use_plugins

    context.with_resource(use_plugins(plugin or []))


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise UserError for an empty argument: as a path it would silently be the present folder.

    `image-edit` takes an empty instruction, and `--negative` an empty text.
    """
    if arguments[:1] == ["image-edit"]:
        return
    for place, argument in enumerate(arguments):
        before = arguments[place - 1] if place else "mmedit"
        if argument == "" and before != "--negative":
            raise UserError(
                f"the argument behind {before} is empty",
                "is a variable of the shell not set?",
            )


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    sleep_while_waiting()
    try:
        _refuse_empty(arguments)
        code = _run(arguments)
        finish()
    except MmeditError as error:
        if "--debug" in arguments:
            raise
        report_error(error)
        return error.exit_code
    except Exception as error:
        if "--debug" in arguments:
            raise
        if isinstance(error, OSError):  # the system refuses: no fault of ours
            refused = _refused(error)
            report_error(refused)
            return refused.exit_code
        report_failure(error)
        return 1
    return code


def _run(arguments: list[str]) -> int:
    try:
        app(args=arguments, prog_name="mmedit")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if code == _INTERRUPTED:
            hint = "the same command continues where it stopped, or begins again where it cannot"
            report_error(MmeditError("interrupted", hint))
        return code
    return 0


def _refused(error: OSError) -> MmeditError:
    """Say what the system refused: a file that was named, or something like a full disk."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return MmeditError(reason, "is the disk full?")
    return UserError(
        f"{error.filename}: {reason}", "is the folder there, and may you write to it?"
    )
