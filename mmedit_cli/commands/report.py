"""`mmedit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def report(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="A run folder; without it, all finished runs.", show_default=False
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

      mmedit report records/eval/liveedit/mini-blip2/emojikb/0123456789ab --picture edits.png
    """
    from mmedit_cli.reports import show

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
