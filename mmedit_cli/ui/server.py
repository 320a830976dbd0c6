"""The server of the page: where it listens, who is let in, and its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmedit_cli.errors import UserError
from mmedit_cli.reading import LARGEST_PICTURE
from mmedit_cli.serving.site import ServerOptions, ended_by_sigterm

# at run time not before `settle`: it imports gradio, which reads the environment
if TYPE_CHECKING:
    from mmedit_cli.ui.page import Page

USER = "mmedit"  # the name to log in with, beside the key


def settle(home: Path) -> None:
    """Let gradio keep what is uploaded in a folder of ours, and call nobody; before it is imported."""
    os.environ["GRADIO_TEMP_DIR"] = str(home)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@contextmanager
def served(page: Page, where: ServerOptions) -> Iterator[str]:
    """Serve a page within the block; yield its address. Raises UserError if nothing can listen there."""
    import gradio as gr

    blocks = page.build()
    theme = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    auth = None if where.key is None else (USER, where.key)
    try:
        _, address, _ = blocks.launch(
            server_name=where.host,
            server_port=where.port or None,
            auth=auth,
            app_kwargs=_app(where),
            max_file_size=LARGEST_PICTURE,
            theme=theme,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
        )
    except OSError as error:
        raise UserError(
            f"{where.host}, port {where.port}: cannot listen there: {error}",
            "another --port, or 0 for any free one; another --host",
        ) from error
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def wait() -> None:
    """Return at control-C or SIGTERM."""
    with ended_by_sigterm(), suppress(KeyboardInterrupt):
        threading.Event().wait()


def _app(where: ServerOptions) -> dict[str, Any]:
    """Return what the application is made with: for this machine alone, other names of it are refused.

    So a page of the web cannot reach it under a name of its own.
    """
    if not where.local or ":" in where.host:
        return {}
    names = ["localhost", "127.0.0.1", where.host]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=names)
    return {"middleware": [guard]}
