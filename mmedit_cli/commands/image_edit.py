"""`mmedit image-edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def image_edit(
    editor: Annotated[
        str, typer.Argument(metavar="EDITOR", help="An image editor of `mmedit list`.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The file to write; with --batch, the folder.",
            show_default=False,
        ),
    ],
    instruction: Annotated[
        str | None,
        typer.Argument(
            metavar="[INSTRUCTION]", help="What to change.", show_default=False
        ),
    ] = None,
    image: options.Image = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='A JSONL file: {"image": ..., "instruction": ...} and, if you like, output, seed, expressive.',
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A name, a folder or a hub id. [default: the editor's own]",
            show_default=False,
        ),
    ] = None,
    seed: options.Seed = 0,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Make so many, with seeds from --seed on: OUTPUT-0.png, ...",
        ),
    ] = 1,
    sheet: Annotated[
        Path | None,
        typer.Option(
            help="Also draw before and after beside each other (PNG).",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.", show_default=False)
    ] = None,
    text_guidance: Annotated[
        float | None,
        typer.Option(
            "--text-guidance", "--tg", help="How strictly the instruction is followed."
        ),
    ] = None,
    image_guidance: Annotated[
        float | None,
        typer.Option(
            "--image-guidance",
            "--ig",
            help="How much of the picture stays; 1 is a third faster.",
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Long side at which the model works. [default: the model's]",
            show_default=False,
        ),
    ] = None,
    restore: Annotated[
        bool,
        typer.Option(
            "--restore/--working-size", help="Give the picture back in its own size."
        ),
    ] = True,
    background: Annotated[
        str, typer.Option(help="Colour behind transparent parts.")
    ] = "#ffffff",
    keep_alpha: Annotated[
        bool, typer.Option("--keep-alpha", help="Make what was transparent so again.")
    ] = False,
    expressive: Annotated[
        str | None,
        typer.Option(
            help="Use this in place of the instruction the model derives (mgie).",
            show_default=False,
        ),
    ] = None,
    show_instruction: Annotated[
        bool,
        typer.Option(
            "--show-instruction",
            help="Also print the expressive instruction the model derived (mgie).",
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures that go through the model together.")
    ] = 1,
    low_memory: options.LowMemory = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    checkpoint: options.Checkpoint = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite what is there.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Change a picture as an instruction says. The same --batch again makes what is missing.

    Pictures may have any size: the model works at its own, the result has the size of the picture. Turned photos are
    set upright; transparent parts are composed on --background.

    Examples:

      mmedit image-edit instruct-pix2pix --image street.jpg "make it winter" -o winter.png --ig 1.0 --steps 30

      mmedit image-edit instruct-pix2pix -i cat.png "turn it into a dog" -o dog.png --samples 4 --sheet dogs.png

      mmedit image-edit mgie --image beach.jpg "make it more dramatic" -o drama.png --show-instruction

      mmedit image-edit mgie --batch edits.jsonl -o edited/ --batch-size 4
    """
    from mmedit_cli.picture_editing.methods.base import EditSettings
    from mmedit_cli.picture_editing.workflow import editing
    from mmedit_cli.reports.picture_editing import print_edits
    from mmedit_cli.runtime import LoadOptions

    out = Output(as_json=as_json)
    editing.one_of(image, instruction, batch)
    options = editing.PictureEditOptions(
        editor,
        model,
        LoadOptions(device=device, dtype=dtype, revision=revision),
        EditSettings(steps, text_guidance, image_guidance, resolution, restore),
        background=editing.colour(background),
        keep_alpha=keep_alpha,
        batch_size=batch_size,
        force=force,
        records=records,
        checkpoint=checkpoint,
        low_memory=low_memory,
    )
    if batch is not None:
        requests = editing.read_requests(batch, output, seed)
        report = editing.edit_batch(requests, output, options, out)
    else:
        request = editing.RequestedEdit(image, instruction, output, seed, expressive)  # type: ignore[arg-type]
        requests = editing.samples(request, samples)
        report = editing.edit_pictures(requests, options, out, sheet)
    print_edits(out, report, with_instruction=show_instruction)
