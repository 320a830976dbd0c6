"""`mmedit covariance`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmedit_cli import options
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output


def covariance(
    model: options.DrawingModel = None,
    editor: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="EDITOR",
            help="Compute what this editor of a vision-language model needs: memit or alphaedit.",
            show_default=False,
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="A text file with a caption a line. [default: about the things of EmojiKB]",
            show_default=False,
        ),
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            "--import",
            help="Take this published matrix (.pt or .safetensors) instead.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The file to write. [default: where `mmedit` looks for it]",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        Literal["valid", "all"],
        typer.Option(
            "--tokens", help="valid: start to first end; all: the padding too."
        ),
    ] = "valid",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use the first captions only.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compute second moments of a model: of its text encodings (for Perfusion), or of what its layers read.

    One pass over the captions in constant memory; after an interruption the same command continues. With --for EDITOR
    the moments are those of a vision-language model, which its editors else compute before their first edit.

    Examples:

      mmedit covariance --model stable-diffusion-v1-5 --captions captions.txt

      mmedit covariance --model stable-diffusion-v1-5 --import covariance_CLIP_ViT-L-14.pt

      mmedit covariance --for memit --model mini-blip2
    """
    out = Output(as_json=as_json)
    if editor is not None:
        if captions or published or output or limit or force:
            raise UserError(
                f"--for {editor} takes no captions, file or limit",
                "its questions come along, and the moments are kept in the cache folder",
            )
        from mmedit_cli.knowledge.loading import ModelOptions
        from mmedit_cli.knowledge.workflow.moments import collect_moments

        named = options.named(model, out)
        place = ModelOptions(named, device, dtype, revision=revision)
        _show(collect_moments(editor, place, out), out)
        return
    from mmedit_cli.catalog import loading
    from mmedit_cli.drawing import covariance as moments
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    if published is not None and captions is not None:
        raise UserError(
            "--import and --captions exclude each other",
            "the published matrix needs no captions",
        )
    name = options.named_drawing(model, out)
    out.note(loading(name))
    loaded = load_stable_diffusion(name, device=device, dtype=dtype, revision=revision)
    path = output or moments.default_path(loaded)
    if path.exists() and not force:
        raise UserError(
            f"{path}: there already", "--force replaces it, -o FILE writes another"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if published is not None:
        found = moments.import_matrix(published, loaded)
        found.save(path)
    else:
        total = moments.survey(captions)[1]
        used = total if limit is None else min(limit, total)
        with out.progress({"captions": used}) as tick:
            found = moments.estimate(
                loaded,
                captions,
                path,
                rule=rule,
                limit=limit,
                tick=lambda n: tick("captions", n),
            )
    result: dict[str, Any] = {"path": str(path), **found.summary()}
    if result["ridge"]:
        out.note(
            f"a ridge of {result['ridge']:g} of the mean of the diagonal is needed to invert it"
        )

    _show(result, out)


def _show(result: dict[str, Any], out: Output) -> None:
    """Print what was computed as a table, or as JSON."""

    def show() -> None:
        rows = []
        for key, value in result.items():
            text = f"{value:,.5g}" if isinstance(value, float) else str(value)
            if value is not None:
                rows.append([key.replace("_", " "), text])
        out.table(["covariance", ""], rows)

    out.result(result, show)
