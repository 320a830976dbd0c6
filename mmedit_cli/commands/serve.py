"""`mmedit serve`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output


def serve(
    model: options.Model = None,
    edits: Annotated[
        Path | None,
        typer.Option(
            help="Serve the model with the edits of this ledger.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen at; 0.0.0.0 lets other machines ask, too."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="The port to listen at; 0: any free one."),
    ] = 8000,
    key: Annotated[
        str | None,
        typer.Option(
            envvar="MMEDIT_KEY",
            help="Answer only those who send this key; in the variable other users of the machine do not see it.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Longest answer where a request does not say it, or more where a target needs it.",
        ),
    ] = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    debug: options.Debug = False,
) -> None:
    """Serve a model, edited or not, to clients of the OpenAI API (chat completions). Control-C ends it.

    Examples:

      mmedit serve --edits my-edits

      mmedit serve --model mini-llava --port 8080
    """
    from mmedit_cli.knowledge import loading
    from mmedit_cli.knowledge.workflow import asking

    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise UserError(
            "mmedit serve needs starlette and uvicorn",
            "pip install 'mmedit-cli[serve]'",
        )
    from mmedit_cli.serving.site import ServerOptions, Site

    out = Output()
    where = ServerOptions(host, port, key)
    if key is None and not where.local:
        out.note(f"--host {host} without --key: whoever reaches this machine can ask")
    named = (model or "") if edits is not None else options.named(model, out)
    chosen = loading.ModelOptions(named, device, dtype, device_map, revision)
    with asking.Asker(chosen, edits, out, max_new_tokens=max_new_tokens) as asker:
        name = asker.backbone.name if edits is None else edits.resolve().name
        with Site(asker, name, where, out) as site:
            out.write(f"{name} answers at {site.url}; control-C ends it\n")
            site.run()
