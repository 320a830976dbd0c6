"""`mmedit download`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def download(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A group, GROUP/ITEM, a model of `mmedit list`, or a hub id.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a data set. [default: NAME in $MMEDIT_DATA]",
            show_default=False,
        ),
    ] = None,
    list_groups: Annotated[
        bool, typer.Option("--list", help="Show what there is, and stop.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Check what is there, file by file; exit 1 if wrong."
        ),
    ] = False,
    catalogue: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file with more groups, or mirrors.", show_default=False
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Fetch again, and write over files that differ."),
    ] = False,
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
    request = commands.Request(name, to, revision, catalogue, force)
    if list_groups or name is None:
        commands.show_list(request, out)
    else:
        raise typer.Exit(
            0 if commands.run(request, out, dry_run=dry_run, verify=verify) else 1
        )
