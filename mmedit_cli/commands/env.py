"""`mmedit env`."""

from __future__ import annotations

from mmedit_cli import options
from mmedit_cli.output import Output


def env(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Print what a report of a bug needs: versions, platform, threads and devices. No paths, no values of variables.

    Examples:

      mmedit env
    """
    from mmedit_cli import runtime

    out = Output(as_json=as_json)
    found = runtime.machine()
    out.result(found, lambda: out.yaml(found))
