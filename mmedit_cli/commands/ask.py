"""`mmedit ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output


def ask(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The question; without one, the lines of stdin are asked.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    image: options.Image = None,
    edits: Annotated[
        Path | None,
        typer.Option(
            help="Ask the model with the edits of this ledger.", show_default=False
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="A file of questions: .txt, one a line, or facts as .csv or .jsonl.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Show base and edited side by side, and which edits took part.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(min=1, help="Longest answer, or more where a target needs it."),
    ] = 32,
    sampling: Annotated[
        str,
        typer.Option(
            help="greedy, or model: as the model's own generation_config says."
        ),
    ] = "greedy",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Ask a model one question, a file of questions, or line by line.

    Examples:

      mmedit ask --model llava-1.5-7b --image cat.png "What is this?"

      mmedit ask --edits my-edits --image cat.png "What is this?" --compare

      mmedit ask --edits my-edits --questions facts.csv --json
    """
    from mmedit_cli.knowledge import loading
    from mmedit_cli.knowledge.workflow import asking
    from mmedit_cli.pictures import check_picture
    from mmedit_cli.reports import answers
    from mmedit_cli.types import Query

    out = Output(as_json=as_json)
    if prompt is not None and questions is not None:
        raise UserError(
            "a question and --questions: one question, or a file of them",
            "leave one of the two out",
        )
    if prompt is not None and not prompt.strip():
        raise UserError(
            "the question is empty", 'e.g. mmedit ask --image cat.png "What is this?"'
        )
    if image is not None:
        check_picture(image)
    asked = [] if questions is None else asking.read_questions(questions, image)
    named = (model or "") if edits is not None else options.named(model, out)
    chosen = loading.ModelOptions(named, device, dtype, device_map, revision)
    with asking.Asker(
        chosen,
        edits,
        out,
        compare=compare,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    ) as asker:
        if questions is not None:
            answers.many(out, asker, asked)
        elif prompt is not None:
            answers.one(out, asker, Query(prompt, image=image))
        else:
            answers.talk(out, asker, image)
