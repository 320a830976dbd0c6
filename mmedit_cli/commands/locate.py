"""`mmedit locate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.commands import completion

DEFAULT_EDITOR = "ft"


def locate(
    editor: Annotated[
        str | None,
        typer.Argument(
            metavar="[EDITOR]",
            autocompletion=completion.editors,
            help=f"A method of `mmedit list` that names layers. [default: {DEFAULT_EDITOR}]",
        ),
    ] = None,
    model: options.Model = None,
    data: options.Data = "emojikb",
    root: options.Root = None,
    images: options.Images = None,
    template: options.Template = "",
    skip_missing: options.SkipMissing = False,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Only these, by the highest: 8-23, or 3,7,11. [default: all]",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Cases that decide.")] = 20,
    sequential: Annotated[
        int | None,
        typer.Option(
            "--sequential",
            "-n",
            help="Edits in a row. [default: all cases]",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Whose scores decide: one of `mmedit eval`.")
    ] = "tf_em",
    batch_size: Annotated[int, typer.Option(help="Queries in one forward pass.")] = 32,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write the hyper-parameters there. [default: into the run's folder alone]",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the curve: .svg or .png (extra `plots`).",
            show_default=False,
        ),
    ] = None,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: options.Force = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Find out where to edit: evaluate each layer that an editor may work at on a few held-out cases.

    A named data set is asked on its val split. Each layer is a run of its own, as `mmedit eval` makes it; the same
    command again continues. A file of hyper-parameters with the best layer is written, for --hparams.

    Examples:

      mmedit locate grace --model mini-blip2

      mmedit locate ft --model llava-1.5-7b --data my_facts.csv --layers 12-31 -o ft-llava.yaml --plot layers.svg

      mmedit eval ft --model llava-1.5-7b --data my_facts.csv --hparams ft-llava.yaml
    """
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.loading import ModelOptions
    from mmedit_cli.knowledge.workflow import locating
    from mmedit_cli.reports.charts import plotter
    from mmedit_cli.reports.locating import draw_candidates, print_candidates

    out = options.output_of_process(as_json)
    if plot is not None:
        plotter(plot)
    if editor is None:
        editor = DEFAULT_EDITOR
        out.note(f"no EDITOR: {editor}")
    request = locating.LocateOptions(
        editor,
        ModelOptions(options.named(model, out), device, dtype, device_map, revision),
        data,
        DataOptions(root, images, template, skip_missing=skip_missing),
        layers=None if layers is None else options.ranges(layers, "--layers"),
        sequential=sequential,
        limit=limit,
        protocol=protocol,
        batch_size=batch_size,
        hparams=hparams,
        overrides=tuple(overrides or ()),
        seed=seed,
        records=records,
        force=force,
        output=output,
    )
    report = locating.locate(request, out)
    if plot is not None:
        draw_candidates(report, plot)
    print_candidates(out, report)
