"""`mmedit generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output


def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...", help="What to draw; several are several rows."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A picture for a sheet of all, or a folder for a file each.",
        ),
    ] = Path("generated.png"),
    edits: Annotated[
        Path | None,
        typer.Option(
            "--edits", help="A folder of concepts to draw with.", show_default=False
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help="A LoRA of kohya, peft or diffusers to draw with; repeatable, they add up.",
            show_default=False,
        ),
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:TOKEN]",
            help="A textual inversion to draw with, named in prompts as <TOKEN>; repeatable.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            show_default=False,
            help="A text-to-image model of `mmedit list`, a folder of "
            "diffusers, or a hub id. [default: that of --edits, else one that comes along]",
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="One picture of each prompt for each of these.")
    ] = "0",
    compare: Annotated[
        bool, typer.Option("--compare", help="Draw with the base model too, beside it.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Scale of classifier-free guidance. [default: the model's, else 7.5]",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels. [default: native]", show_default=False),
    ] = None,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    overrides: options.Overrides = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 4,
    low_memory: options.LowMemory = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is there.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Draw pictures from prompts, with your own concepts if you name them.

    Examples:

      mmedit generate --model stable-diffusion-v1-5 "a lighthouse in a storm" --seeds 0,1,2,3

      mmedit generate --edits my-concepts "a <my-teddy> in the snow" --compare -o teddy.png

      mmedit generate --edits my-concepts "a <my-teddy> in the snow" --set beta=0.6 -o pictures

      mmedit generate --edits my-concepts "a <my-teddy> and a <my-dog> on a beach" -o both.png

      mmedit generate --model stable-diffusion-v1-5 --lora style.safetensors:0.8 "a lighthouse" --compare
    """
    from mmedit_cli.drawing.models.stable_diffusion import Sampling
    from mmedit_cli.drawing.workflow import generation

    out = Output(as_json=as_json)
    if not all(prompt.strip() for prompt in prompts):
        raise UserError(
            "a prompt is empty: nothing to draw",
            'e.g. mmedit generate "a lighthouse in a storm"',
        )
    if model is None and edits is None:
        model = options.named_drawing(None, out)
    asked = generation.DrawOptions(
        tuple(dict.fromkeys(prompts)),
        options.numbers(seeds, "--seeds"),
        output,
        model,
        edits,
        compare,
        tuple(overrides or ()),
        force,
        low_memory,
        tuple(lora or ()),
        tuple(embedding or ()),
        device=device,
        dtype=dtype,
        revision=revision,
    )
    sampling = Sampling(steps, guidance, size, negative, batch_size)
    done = generation.draw(asked, sampling, out)

    def show() -> None:
        for path in done["files"]:
            out.line(path)

    out.result(done, show)
