"""`mmedit ui`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output


def ui(
    model: options.Model = None,
    ledgers: Annotated[
        Path | None,
        typer.Option(
            help="A folder of ledgers that visitors open by name, and share. [default: each has one of their own]",
            show_default=False,
        ),
    ] = None,
    concepts: Annotated[
        Path | None,
        typer.Option(
            help="A folder of concepts, or of concept edits, to draw with.",
            show_default=False,
        ),
    ] = None,
    drawing_model: Annotated[
        str | None,
        typer.Option(
            help="The text-to-image model. [default: that of --concepts, else one that comes along]",
            show_default=False,
        ),
    ] = None,
    image_editor: Annotated[
        str, typer.Option(help="What changes pictures: an image editor.")
    ] = "mgie",
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen at; 0.0.0.0 lets other machines in, too."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="The port to listen at; 0: any free one."),
    ] = 7860,
    key: Annotated[
        str | None,
        typer.Option(
            envvar="MMEDIT_KEY",
            help="The password of the user `mmedit`; in the variable other users of the machine do not see it.",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    records: options.Records = Path("records"),
    debug: options.Debug = False,
) -> None:
    """Open a page for the browser: ask a picture, teach, undo, draw, change pictures, look at runs. Control-C ends it.

    Examples:

      mmedit ui

      mmedit ui --model mini-llava --ledgers our-edits --concepts zoo --port 8080
    """
    if not find_spec("gradio"):
        raise UserError("mmedit ui needs gradio", "pip install 'mmedit-cli[ui]'")
    from mmedit_cli import registry
    from mmedit_cli.knowledge.loading import ModelOptions
    from mmedit_cli.runtime import LoadOptions
    from mmedit_cli.serving.site import ServerOptions

    out = Output()
    registry.image_editors.get(image_editor)
    where = ServerOptions(host, port, key)
    if key is None and not where.local:
        out.note(f"--host {host} without --key: whoever reaches this machine can teach")
    chosen = ModelOptions(options.named(model, out), device, dtype)
    load = LoadOptions(device=device, dtype=dtype)
    with TemporaryDirectory(prefix="mmedit-ui-") as folder:
        home = Path(folder)
        from mmedit_cli.ui import server

        server.settle(home / "uploads")
        from mmedit_cli.ui.draw_tab import DrawTab
        from mmedit_cli.ui.knowledge import Knowledge
        from mmedit_cli.ui.learning import Learning
        from mmedit_cli.ui.making import Changing, Drawing
        from mmedit_cli.ui.page import Page
        from mmedit_cli.ui.visitors import Visitors

        visitors = Visitors(home, ledgers)
        drawing = Drawing(drawing_model, concepts, home, load)
        learning = Learning(drawing.model, load)
        page = Page(
            knowledge=Knowledge(chosen, records, out),
            drawing=DrawTab(drawing, learning, visitors),
            changing=Changing(image_editor, load),
            visitors=visitors,
            records=records,
        )
        with server.served(page, where) as address:
            out.write(f"mmedit is at {address}; control-C ends it\n")
            server.wait()
            learning.stop()
