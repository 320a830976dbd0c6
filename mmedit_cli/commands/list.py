"""`mmedit list`."""

from __future__ import annotations

from mmedit_cli import options
from mmedit_cli.output import Output


def list_all(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Show the editors and what each supports, the models, and the data sets."""
    from mmedit_cli.reports import show

    show.catalogue(Output(as_json=as_json))
