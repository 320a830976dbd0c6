"""`mmedit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from mmedit_cli import options
from mmedit_cli.commands import completion
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output

_SHOW = "show"
PlotKind = Literal["differences", "edits", "retention", "cost"]
Form = Literal["table", "markdown", "latex", "csv", "json", "every-eval-ever"]


class ReportGroup(TyperGroup):
    """Commands of reports; `mmedit report RUN` is `mmedit report show RUN`."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Put `show` in front of what names no command."""
        named = args[0] if args else ""
        known = {*self.commands, *context.help_option_names}
        if named not in known:
            args = [_SHOW, *args]
        return super().parse_args(context, args)


def show(
    run: Annotated[
        str | None,
        typer.Argument(
            autocompletion=completion.runs,
            help="A run: its folder, the beginning of its id, or `latest`; without it, all finished runs.",
            show_default=False,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Also draw some of its edits into this PNG file.", show_default=False
        ),
    ] = None,
    records: options.Records = Path("records"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the report of a run, or list the finished runs.

    Examples:

      mmedit report

      mmedit report latest

      mmedit report records/eval/liveedit/mini-blip2/emojikb/0123456789ab --picture edits.png
    """
    from mmedit_cli.records import Run
    from mmedit_cli.reports import finding, show

    out = Output(as_json=as_json)
    if run is None:
        show.runs(out, records)
        return
    folders = finding.find_runs([run], records)
    if len(folders) > 1:
        raise UserError(
            f"{run}: {len(folders)} runs match, and one is shown",
            "`mmedit report compare` takes several",
        )
    found = Run.read_report(folders[0])
    if picture is not None:
        from mmedit_cli.gallery import draw

        draw(found.get("examples", ()), picture)
        out.note(f"drawn: {picture}")
    show.report(out, found)


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            autocompletion=completion.runs,
            help="Two or more runs: folders, patterns in quotes, beginnings of ids, or `latest`.",
            show_default=False,
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,...",
            help="Also all runs that fit; keys are editor, model and data; a key may stand there twice.",
            show_default=False,
        ),
    ] = None,
    edits: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compare after so many edits; without it, after all.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare the scores of this protocol, repeatable; without it, of the first one.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        Form, typer.Option("--format", help="How the table is written.")
    ] = "table",
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Also draw a chart into this .svg or .png file (extra plots).",
            show_default=False,
        ),
    ] = None,
    plot_of: Annotated[
        PlotKind,
        typer.Option(
            help="What --plot draws: differences with intervals, scores over edits, what is retained, or quality "
            "against seconds an edit."
        ),
    ] = "differences",
    records: options.Records = Path("records"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare finished evaluations of the same questions: differences, intervals over concepts, paired tests.

    Runs with other data, protocol or orders are refused.

    Examples:

      mmedit report compare 0123456789ab fedcba987654

      mmedit report compare --where editor=liveedit,editor=unike,model=mini-blip2 --format markdown --plot forest.svg

      mmedit report compare --where model=mini-blip2 --plot edits.svg --plot-of edits
    """
    from mmedit_cli.knowledge.workflow.comparison import compare as compared
    from mmedit_cli.reports import comparison, finding, plots

    as_json = _is_json(form, as_json)
    folders = finding.find_runs(runs or [], records)
    if where is not None:
        folders += finding.runs_where(where, records)
    found = compared(
        folders,
        edits=edits,
        protocols=protocol or (),
    )
    if plot is not None:
        plots.draw(found, plot_of, plot)
    out = Output(as_json=as_json)
    if plot is not None:
        out.note(f"drawn: {plot}")
    comparison.print_comparison(out, found, form)


def _is_json(form: str, as_json: bool) -> bool:
    """Return whether JSON is wanted, by either option; raise UserError where they contradict each other."""
    if as_json and form not in ("table", "json"):
        raise UserError(f"--json and --format {form}: give one of them")
    return as_json or form == "json"


def view(
    runs: Annotated[
        list[str],
        typer.Argument(
            autocompletion=completion.runs,
            help="Runs: folders, patterns in quotes, beginnings of ids, or `latest`.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The file. [default: page.html in the folder of the first run]",
            show_default=False,
        ),
    ] = None,
    open_it: Annotated[
        bool, typer.Option("--open", help="Open it in the browser.")
    ] = False,
    records: options.Records = Path("records"),
    debug: options.Debug = False,
) -> None:
    """Write one HTML page of finished runs: tables, charts, and every case with its picture and answers.

    It opens from disk, without a server or a network.

    Examples:

      mmedit report view latest --open

      mmedit report view "records/eval/*/mini-blip2/emojikb/*" --out compared.html
    """
    from mmedit_cli.reports import finding
    from mmedit_cli.reports.view import view as write

    folders = finding.find_runs(runs, records)
    file = to or folders[0] / "page.html"
    if file.suffix not in (".html", ".htm") or not file.parent.is_dir():
        raise UserError(
            f"--out {file}: must be an .html file in a folder that is there"
        )
    out = Output()
    write(folders, file, out)
    out.line(str(file))
    if open_it:
        typer.launch(file.resolve().as_uri())


def leaderboard(
    folder: Annotated[
        Path, typer.Argument(help="A records folder.", show_default=False)
    ],
    by: Annotated[str, typer.Option(help="The score that ranks.")] = "scope",
    form: Annotated[
        Form, typer.Option("--format", help="How it is written.")
    ] = "table",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Rank the finished evaluations of a folder: a table for each model, data and protocol.

    Examples:

      mmedit report leaderboard records

      mmedit report leaderboard records --by generality.image --format csv
    """
    from mmedit_cli.reports.leaderboard import leaderboards, print_leaderboards

    as_json = _is_json(form, as_json)
    boards = leaderboards(folder, by)
    print_leaderboards(Output(as_json=as_json), boards, form)
