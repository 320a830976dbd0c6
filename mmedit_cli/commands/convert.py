"""`mmedit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def minigpt4(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Where the model is written; it must not exist."
        ),
    ],
    vision: Annotated[Path, typer.Option(help="eva_vit_g.pth of LAVIS.")],
    qformer: Annotated[
        Path, typer.Option(help="blip2_pretrained_flant5xxl.pth of LAVIS.")
    ],
    projection: Annotated[
        Path, typer.Option(help="prerained_minigpt4_7b.pth of MiniGPT-4.")
    ],
    llm: Annotated[
        Path,
        typer.Option(
            help="Folder of Vicuna-7B with its tokenizer, e.g. of Vision-CAIR/vicuna-7b."
        ),
    ],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Put the four published parts of MiniGPT-4 together; nothing in them is executed.

    Where the parts are:

      https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/  (vision, qformer)

      https://huggingface.co/spaces/Vision-CAIR/minigpt4  (projection)

      https://huggingface.co/Vision-CAIR/vicuna-7b  (llm)

    Then:

      mmedit convert minigpt4 models/minigpt4-7b --vision eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth
      --projection prerained_minigpt4_7b.pth --llm vicuna-7b

      mmedit ask --model models/minigpt4-7b --image cat.png "What is this?"
    """
    from mmedit_cli import runtime
    from mmedit_cli.knowledge.models.shared.minigpt4_weights import (
        PublishedMiniGPT4,
        convert,
    )

    output = Output(as_json=as_json)
    runtime.quiet_libraries()
    folder = convert(
        PublishedMiniGPT4(vision, qformer, projection, llm), out, output.note
    )
    output.result(
        {"model": str(folder), "family": "minigpt4"}, lambda: output.line(str(folder))
    )


def safetensors(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A model folder or pipeline with pickled weights."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Where it is written anew; it must not exist."
        ),
    ],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Copy a model folder, with its pickled weights converted to safetensors. Nothing in them is executed.

    Example:

      mmedit convert safetensors old-blip2 old-blip2-safetensors
    """
    from mmedit_cli.pickled_weights import to_safetensors

    output = Output(as_json=as_json)
    files = to_safetensors(folder, out, output.note)
    output.result(
        {"model": str(out), "converted": files}, lambda: output.line(str(out))
    )


def mgie(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Where the pipeline is written; it must not exist."
        ),
    ],
    llava: Annotated[
        Path, typer.Option(help="Folder of LLaVA-Lightning-7B-v1-1 with its tokenizer.")
    ],
    vision: Annotated[
        Path, typer.Option(help="Folder of openai/clip-vit-large-patch14.")
    ],
    mllm: Annotated[Path, typer.Option(help="mllm.pt of MGIE.")],
    unet: Annotated[Path, typer.Option(help="unet.pt of MGIE.")],
    diffusion: Annotated[
        str,
        typer.Option(
            help="Pipeline whose VAE and scheduler are used: a folder or hub id."
        ),
    ] = "instruct-pix2pix",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Put the published parts of MGIE together as a pipeline of diffusers; nothing in them is executed.

    mllm.pt and unet.pt are those of apple/ml-mgie, or what its extract_ckpt.ipynb makes of one's own training; LLaVA
    is the merged LLaVA-7B-v1 that its README describes. Then:

      mmedit convert mgie models/mgie-7b --llava LLaVA-7B-v1 --vision clip-vit-large-patch14 --mllm mllm.pt
      --unet unet.pt

      mmedit image-edit mgie --model models/mgie-7b --image beach.jpg "make it more dramatic" -o drama.png
    """
    from mmedit_cli import runtime
    from mmedit_cli.picture_editing.methods.mgie.published import PublishedMgie, convert

    output = Output(as_json=as_json)
    runtime.quiet_libraries()
    folder = convert(
        PublishedMgie(llava, vision, mllm, unet, diffusion), out, output.note
    )
    output.result(
        {"model": str(folder), "editor": "mgie"}, lambda: output.line(str(folder))
    )


def liveedit(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="What train_vllm_editor.py of qizhou000/LiveEdit saved, or the same tensors as .safetensors.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A new folder, for --checkpoint."),
    ],
    model: options.Model = None,
    overrides: options.Overrides = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Turn a published checkpoint of LiveEdit into trained networks to go on with; nothing in it is executed.

    Widths, rank and tokens are read off the tensors. What these do not show is as published: 8 heads, a lora_scale
    of 5, and layer 21 of 32; --set heads=..., lora_scale=... or edit_layer=... says otherwise.

    Examples:

      mmedit convert liveedit epoch-50-i-39000-ema_loss-0.9 my-liveedit --model blip2-opt-2.7b

      mmedit eval liveedit --model blip2-opt-2.7b --checkpoint my-liveedit --data evqa --sequential 1000
    """
    from mmedit_cli.knowledge.workflow.published_liveedit import convert

    output = Output(as_json=as_json)
    named = options.named(model, output)
    facts = convert(file, out, named, tuple(overrides or ()), revision)
    output.result(facts, lambda: output.line(str(out)))


def checkpoint(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A checkpoint of Stable Diffusion 1.x or XL, .safetensors.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Where the model is written; it must not exist."
        ),
    ],
    like: Annotated[
        str | None,
        typer.Option(
            help="A model of the same kind, for configuration and vocabulary: a name, a folder of diffusers, or a "
            "hub id. [default: stable-diffusion-v1-5, or sdxl-1.0, as the file says]",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Make a folder of diffusers of a checkpoint of one file, as A1111 and ComfyUI keep them.

    Example:

      mmedit convert checkpoint dreamy.safetensors dreamy --like stable-diffusion-v1-5

      mmedit generate --model dreamy "a lighthouse in a storm"
    """
    from mmedit_cli import runtime
    from mmedit_cli.drawing.models.single_file import convert_checkpoint

    output = Output(as_json=as_json)
    runtime.quiet_libraries()
    folder = convert_checkpoint(file, out, like)
    output.result({"model": str(folder)}, lambda: output.line(str(folder)))
