"""What the tabs of the page are made of: fields, tables and buttons, and how an error is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.pictures import check_picture
from mmedit_cli.ui.making import MOST_STEPS

_DRAWN_HEIGHT = 300  # pixels of the page
_MOST = 2**63  # no seed is that large
_WIDTHS: list[str | int] = [
    "15%",
    "25%",
    "17%",
    "15%",
    "15%",
    "13%",
]  # of the columns of a table


def on(
    event: Any,
    do: Callable[..., Any],
    given: list[Any],
    shown: list[Any],
    *,
    named: bool = True,
    queue: str = "model",
) -> Any:
    """Let a function answer an event, and return the event; clients know it by its own name.

    Of a queue one is answered at a time.
    """
    return event(
        _told(do),
        given,
        shown,
        api_name=do.__name__,
        api_visibility="public" if named else "private",
        concurrency_limit=1,
        concurrency_id=queue,
    )


def _told(do: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose errors are told to the visitor."""

    @wraps(do)
    def run(*given: Any) -> Any:
        try:
            return do(*given)
        except MmeditError as error:
            said = "; ".join(error.problems)
            hint = f" ({error.hint})" if error.hint else ""
            raise gr.Error(said + hint, print_exception=False) from error

    return run


def picture_field() -> Any:
    """Return a field for a picture, which is checked as on the command line before anything decodes it."""
    field = gr.Image(
        label="Picture",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=260,
    )

    def checked(upload: Any) -> str | None:
        if upload is None or upload.path is None:
            return None
        try:
            check_picture(Path(upload.path))
        except MmeditError as error:
            said = "; ".join(error.problems)
            folder = Path(upload.path).parent
            told = said.replace(f"{folder}/", "")
            raise gr.Error(told, print_exception=False) from error
        return str(upload.path)

    # the field's own way would decode whatever Pillow knows
    vars(field)["preprocess"] = checked
    return field


def shown_picture(label: str) -> Any:
    """Return a place for a picture that was made, of one height with and without it."""
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        height=_DRAWN_HEIGHT,
    )


def number_fields(steps: int) -> tuple[Any, Any]:
    """Return the fields for a seed and for denoising steps."""
    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
    number = gr.Slider(1, MOST_STEPS, value=steps, step=1, label="Steps")
    return seed, number


def shown_text(label: str, *, lines: int = 1) -> Any:
    """Return a place for a text."""
    return gr.Textbox(label=label, lines=lines, interactive=False)


def shown_table(header: list[str], label: str) -> Any:
    """Return a table without rows."""
    return gr.Dataframe(
        headers=header,
        datatype="str",
        label=label,
        interactive=False,
        wrap=True,
        max_height=320,
        column_widths=_WIDTHS,
    )


def whole(number: float | None, what: str) -> int:
    """Return a number of a field; raise UserError unless it is a whole one that a seed may be."""
    if number is not None and 0 <= number < _MOST:
        rounded = int(number)
        if rounded == number:
            return rounded
    raise UserError(f"{what}: not a whole number from 0 on")


def lines_of(text: str) -> list[str]:
    """Return the lines of a text that are not empty."""
    found = []
    for line in text.splitlines():
        if stripped := line.strip():
            found.append(stripped)
    return found
