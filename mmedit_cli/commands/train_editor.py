"""`mmedit train-editor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def train_editor(
    editor: Annotated[
        str,
        typer.Argument(
            metavar="EDITOR",
            help="An editor of `mmedit list` that is trained first, also of images.",
        ),
    ],
    model: options.Model = None,
    data: options.Data = "emojikb",
    validation: Annotated[
        str | None,
        typer.Option(
            help="Cases that choose the checkpoint. [default: the val split, else every 20th case]",
            show_default=False,
        ),
    ] = None,
    root: options.Root = None,
    images: options.Images = None,
    template: options.Template = "",
    skip_missing: options.SkipMissing = False,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train on the first so many cases.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Queries in one frozen forward pass.")
    ] = 32,
    cache_gib: Annotated[
        float,
        typer.Option(min=0, help="Memory for frozen activations; more goes to disk."),
    ] = 4.0,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: options.Force = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Also write the curves for TensorBoard."),
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train the networks of an editor for a model. The same command again continues where it stopped.

    A named data set is trained on its train split; its val split chooses the checkpoint. `--checkpoint latest`, or the
    id of the run, lets `mmedit eval`, `edit` and `image-edit` answer with what was trained. Under `accelerate launch`
    or `torchrun` several processes train together.

    Examples:

      mmedit train-editor liveedit --model mini-blip2

      mmedit train-editor liveedit --model mini-llava --set training.steps=1000 --records my-records

      mmedit train-editor mgie --model llava-1.5-7b --data edit-pairs/ --dtype bfloat16 --set train_lm=two_phase
    """
    from mmedit_cli import registry
    from mmedit_cli.knowledge import loading
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.workflow import training
    from mmedit_cli.picture_editing.workflow import training as picture_training
    from mmedit_cli.reports import show

    out = Output(as_json=as_json)
    of_images = editor in registry.image_editors.names()
    if of_images:
        model, data = (
            model or "llava-1.5-7b",
            picture_training.DATA if data == "emojikb" else data,
        )
    request = training.EditorTrainingOptions(
        editor, loading.ModelOptions(options.named(model, out), device, dtype, device_map, revision), data,
        validation=validation, data_options=DataOptions(root, images, template, skip_missing=skip_missing),
        hparams=hparams, overrides=tuple(overrides or ()), limit=limit, batch_size=batch_size,
        cache_bytes=options.cache_bytes(cache_gib), seed=seed, records=records, force=force, tensorboard=tensorboard,
    )  # fmt: skip
    if of_images:
        show.image_training(out, picture_training.train(request, out))
    else:
        show.training(out, training.train(request, out))
