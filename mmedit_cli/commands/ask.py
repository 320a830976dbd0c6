"""`mmedit ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def ask(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    model: options.Model = None,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", help="The picture asked about.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Ask a model one question.

    Example:

      mmedit ask --model llava-1.5-7b --image cat.png "What is this?"
    """
    from mmedit_cli import workflows

    out = Output(as_json=as_json)
    asked = workflows.ModelOptions(options.named(model, out), device, dtype, device_map, revision)
    answer = workflows.answer(asked, prompt, image, max_new_tokens=max_new_tokens, out=out)
    out.result({"prompt": prompt, "image": str(image) if image else None, "answer": answer}, lambda: out.line(answer))
