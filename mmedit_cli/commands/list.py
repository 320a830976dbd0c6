"""`mmedit list`."""

from __future__ import annotations

from mmedit_cli import options
from mmedit_cli.output import Output


def list_all(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Show the editors and what each supports, the models, and the data sets."""
    from mmedit_cli.kinds import KINDS
    from mmedit_cli.reports import catalogue

    methods = {}
    for kind in KINDS:
        rows = [kind.list_row(name) for name in kind.registry.names()]
        methods[kind.method.many] = rows
    data = [row for kind in KINDS for row in kind.list_data()]
    catalogue.catalogue(Output(as_json=as_json), methods, data)
