"""`mmedit edit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedit_cli import options, registry
from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.output import Output

if TYPE_CHECKING:
    from mmedit_cli.types import Concept, EditCase


def edit(
    editor: Annotated[
        str, typer.Argument(metavar="EDITOR", help="An editor of `mmedit list`.")
    ],
    into: Annotated[
        Path,
        typer.Option(
            help="The ledger, a folder: it is begun, or added to.", show_default=False
        ),
    ],
    image: Annotated[
        Path | None,
        typer.Option(
            "--image", "-i", help="The picture of the fact.", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The answer to be given from now on.", show_default=False),
    ] = None,
    background: Annotated[
        str, typer.Option(help="Colour behind transparent parts of the picture.")
    ] = "#ffffff",
    requests: Annotated[
        Path | None,
        typer.Option(
            help="Many facts: .csv, .json or .jsonl; see docs/data.md.",
            show_default=False,
        ),
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(
            "--images",
            help="What to draw: a folder of three to six photos.",
            show_default=False,
        ),
    ] = None,
    superclass: Annotated[
        str | None,
        typer.Option(
            help="What to draw: the word for what the photos show.", show_default=False
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="What to draw: its name in prompts, e.g. <my-dog>.", show_default=False
        ),
    ] = None,
    covariance: Annotated[
        Path | None,
        typer.Option(
            help="perfusion: a file of `mmedit covariance`. [default: where that puts it]",
            show_default=False,
        ),
    ] = None,
    edit_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Edits an operation. [default: 1, or 32 where independent]",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    checkpoint: options.Checkpoint = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of everything random. [default: 0]", show_default=False
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="What to draw: replace a concept of the same name."
        ),
    ] = False,
    low_memory: options.LowMemory = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Teach a model new answers, or a new thing to draw; show what that did, and keep it. Again: adds to it.

    An editor of answers writes a ledger, one of drawings (perfusion, dreambooth, ...) a folder of concepts. Where none
    of the new answers is given the exit code is 1.

    Examples:

      mmedit edit liveedit --image cat.png --prompt "What is this?" --target "a lynx" --into my-edits

      mmedit edit multi-melo --model llava-1.5-7b --requests my_facts.csv --into my-facts

      mmedit ask --edits my-edits --image cat.png "What is this?"

      mmedit edits undo my-edits last

      mmedit edit perfusion --images photos/teddy --superclass teddy --token "<my-teddy>" --into my-concepts

      mmedit generate --edits my-concepts "a <my-teddy> in the snow"
    """  # fmt: skip
    from mmedit_cli.drawing.workflow.concepts import LearnOptions, learn_concept
    from mmedit_cli.knowledge import edit_tables, loading
    from mmedit_cli.knowledge.ledger.edited_model import EditOptions
    from mmedit_cli.knowledge.ledger.ledger import Ledger
    from mmedit_cli.knowledge.workflow import editing, evaluation

    out = Output(as_json=as_json)
    draws = (
        registry.kind_of(editor, registry.editors, registry.personalizers)
        is registry.personalizers
    )
    _check_kind(
        editor, draws,
        answers={"--image": image, "--prompt": prompt, "--target": target, "--requests": requests,
                 "--edit-batch": edit_batch, "--checkpoint": checkpoint},
        drawings={"--images": photos, "--superclass": superclass, "--token": token, "--covariance": covariance,
                  "--force": force or None, "--low-memory": low_memory or None},
    )  # fmt: skip
    if draws:
        concept = _concept(photos, superclass, token)
        asked_for = LearnOptions(
            editor, options.named_drawing(model, out), concept, into, hparams, tuple(overrides or ()), covariance,
            seed or 0, device, dtype, revision, force, low_memory,
        )  # fmt: skip
        edit_tables.learned(out, into, learn_concept(asked_for, out))
        return
    facts = _facts(requests, image, prompt, target, background)
    evaluation.check_facts(registry.editors.get(editor), facts)
    named = (model or "") if Ledger.exists(into) else options.named(model, out)
    asked = EditOptions(
        editor, loading.ModelOptions(named, device, dtype, device_map, revision), hparams=hparams,
        overrides=tuple(overrides or ()), checkpoint=checkpoint, seed=seed, records=records,
    )  # fmt: skip
    report = editing.make_edits(
        into, asked, [fact.request for fact in facts], edit_batch, out
    )
    edit_tables.made(out, report)
    if not any(made["holds"] for made in report["edits"]):
        raise MmeditError(*edit_tables.advice(report))


def _concept(photos: Path | None, superclass: str | None, token: str | None) -> Concept:
    """Return what a text-to-image model is to be taught."""
    from mmedit_cli.pictures import photos_in
    from mmedit_cli.types import Concept

    if photos is None or not superclass or not token:
        raise UserError(
            "nothing to learn: --images, --superclass and --token are needed",
            'e.g. --images photos/teddy --superclass teddy --token "<my-teddy>"',
        )
    return Concept(token, superclass, photos_in(photos))


def _check_kind(
    editor: str, draws: bool, answers: dict[str, object], drawings: dict[str, object]
) -> None:
    """Raise UserError for an option that belongs to the other kind of editor."""
    wrong = [
        name
        for name, value in (answers if draws else drawings).items()
        if value is not None
    ]
    if wrong:
        kind = (
            "teaches a model what to draw"
            if draws
            else "teaches a model what to answer"
        )
        takes = list(drawings if draws else answers)
        raise UserError(f"{wrong[0]}: {editor} {kind}", f"it takes {', '.join(takes)}")


def _facts(
    file: Path | None,
    image: Path | None,
    prompt: str | None,
    target: str | None,
    background: str,
) -> list[EditCase]:
    """Return what a vision-language model is to be taught."""
    from mmedit_cli.knowledge.workflow.editing import read_facts
    from mmedit_cli.types import EditCase, Query

    one = [
        name
        for name, value in (
            ("--image", image),
            ("--prompt", prompt),
            ("--target", target),
        )
        if value
    ]
    if file is not None:
        if one:
            raise UserError(
                f"--requests and {one[0]}: one fact, or a file of them",
                "leave one of the two out",
            )
        return read_facts(file)
    if prompt is None or target is None:
        missing = [
            name
            for name, value in (("--prompt", prompt), ("--target", target))
            if value is None
        ]
        raise UserError(
            f"nothing to teach: {' and '.join(missing)} missing",
            'e.g. --image cat.png --prompt "What is this?" --target "a lynx", or --requests FILE',
        )
    return [EditCase("fact", Query(prompt, target, image, background))]
