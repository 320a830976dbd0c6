"""Image editors on the command line: what `eval` and `train-editor` do with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedit_cli import options, registry
from mmedit_cli.kinds.base import Kind, Noun
from mmedit_cli.output import Output

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.data.shared.audit import Finding


def evaluate(
    editor: options.Editor,
    config: options.RunFile = None,
    model: options.OwnModel = None,
    data: options.Pairs = "emojikb-edits",
    limit: options.Limit = None,
    batch_size: Annotated[int, typer.Option(help="Pictures edited at a time.")] = 32,
    overrides: options.Overrides = None,
    checkpoint: options.Checkpoint = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: options.Force = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Edit the pictures of a set of pairs, and compare each with its goal. The same command again continues.

    --set takes steps, text_guidance, image_guidance and resolution, and the models that score the pictures: clip,
    dino, lpips, judge.

    Example:

      mmedit eval mgie --data emojikb-edits --limit 100 --set steps=20 --set clip=openai/clip-vit-base-patch32
    """
    from mmedit_cli.picture_editing.workflow import evaluation
    from mmedit_cli.reports.picture_editing import print_scores
    from mmedit_cli.runtime import LoadOptions

    out = Output(as_json=as_json)
    request = evaluation.ImageEvalOptions(
        editor,
        model,
        LoadOptions(device=device, dtype=dtype, revision=revision),
        data,
        tuple(overrides or ()),
        limit,
        batch_size,
        seed,
        records,
        force,
        checkpoint,
    )
    print_scores(out, evaluation.evaluate(request, out))


def train(
    editor: options.Editor,
    model: options.Model = "llava-1.5-7b",
    data: options.Pairs = "emojikb-edits",
    validation: options.Validation = None,
    limit: options.Limit = None,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: options.Force = False,
    tensorboard: options.Tensorboard = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train an image editor on edit pairs. The same command again continues where it stopped.

    A named set is trained on its train split; its val split chooses the checkpoint. `--checkpoint latest`, or the id
    of the run, lets `mmedit eval` and `image-edit` use what was trained. Under `accelerate launch` or `torchrun`
    several processes train together.

    Example:

      mmedit train-editor mgie --model llava-1.5-7b --data edit-pairs/ --dtype bfloat16 --set train_lm=two_phase
    """
    from mmedit_cli.knowledge import loading
    from mmedit_cli.knowledge.workflow.training import EditorTrainingOptions
    from mmedit_cli.picture_editing.workflow import training
    from mmedit_cli.reports.picture_editing import print_training

    out = options.output_of_process(as_json)
    request = EditorTrainingOptions(
        editor,
        loading.ModelOptions(
            model or "llava-1.5-7b",
            device=device,
            dtype=dtype,
            revision=revision,
        ),
        data,
        validation=validation,
        hparams=hparams,
        overrides=tuple(overrides or ()),
        limit=limit,
        seed=seed,
        records=records,
        force=force,
        tensorboard=tensorboard,
    )
    print_training(out, training.train(request, out))


def _list_row(name: str) -> dict[str, str]:
    trains = registry.image_editors.fact(name, "trains")
    return {
        "image editor": name,
        "summary": registry.image_editors.summary(name),
        "trained first": "yes" if trains else "no",
    }


def _list_data() -> list[dict[str, str]]:
    return [
        {
            "data": "emojikb-edits",
            "summary": "EmojiKB as edit pairs, for image editors; see docs/image-editing.md",
        }
    ]


def _has_data(data: str) -> bool:
    from mmedit_cli.picture_editing.data.opening import NAMED

    return data.partition(":")[0] in NAMED


def _check_data(data: str, options: DataOptions) -> Iterator[Finding]:
    from mmedit_cli.doctor import check_pairs

    return check_pairs(data, options)


PICTURE_EDITING = Kind(
    method=Noun("an image editor", "image editors"),
    folder=Noun("a folder of pictures", "folders of pictures"),
    registry=registry.image_editors,
    commands={"eval": evaluate, "train-editor": train},
    list_row=_list_row,
    list_data=_list_data,
    has_edits=lambda folder: False,  # its edits are pictures
    has_data=_has_data,
    check_data=_check_data,
)
