"""Personalizers on the command line: what `eval`, `edit` and `edits` do with methods that teach a model to draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedit_cli import options, registry
from mmedit_cli.errors import UserError
from mmedit_cli.kinds.base import Kind, Noun
from mmedit_cli.kinds.measuring_drawings import measures
from mmedit_cli.output import Output

if TYPE_CHECKING:
    from mmedit_cli.drawing.workflow.resolving import DrawingEvalOptions
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.data.shared.audit import Finding
    from mmedit_cli.types import Concept


@measures(options.Subjects, "emojikb-concepts")
def evaluate(request: DrawingEvalOptions, out: Output, dry_run: bool) -> None:
    """Teach a model each subject of a set, draw it, and report. The same command again continues, or shows the report.

    --set eval.KEY=VALUE says how pictures are drawn and scored; KEY is steps, guidance, size, seeds, batch_size, clip,
    dino or encoder. Other keys are hyper-parameters.

    Examples:

      mmedit eval perfusion --model mini-sd --data emojikb-concepts --set eval.seeds=4

      mmedit eval dreambooth-lora --model stable-diffusion-v1-5 --data dreambooth --limit 5
    """
    from mmedit_cli.drawing.workflow import evaluation, plan
    from mmedit_cli.reports import drawing, show

    if dry_run:
        show.plan(out, plan.plan_evaluation(request).describe())
    else:
        drawing.print_scores(out, evaluation.evaluate(request, out))


def edit(
    editor: options.Editor,
    into: options.Into,
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
    lora: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help="multi-melo-diffusion: instead of photos, a LoRA of kohya, peft or diffusers.",
            show_default=False,
        ),
    ] = None,
    embedding: Annotated[
        Path | None,
        typer.Option(
            help="multi-melo-diffusion: instead of photos, or with --lora, a textual inversion.",
            show_default=False,
        ),
    ] = None,
    covariance: Annotated[
        Path | None,
        typer.Option(
            help="perfusion: a file of `mmedit covariance`. [default: where that puts it]",
            show_default=False,
        ),
    ] = None,
    model: options.DrawingModel = None,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a concept of the same name.")
    ] = False,
    low_memory: options.LowMemory = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Teach a model a new thing to draw, and keep it in a folder of concepts. Again: adds to it.

    Examples:

      mmedit edit perfusion --images photos/teddy --superclass teddy --token "<my-teddy>" --into my-concepts

      mmedit edit multi-melo-diffusion --lora dog.safetensors:0.8 --superclass dog --token "<dog>" --into my-concepts

      mmedit generate --edits my-concepts "a <my-teddy> in the snow"
    """
    from mmedit_cli.drawing.workflow.adopting import AdoptOptions, adopt_concept
    from mmedit_cli.drawing.workflow.concepts import LearnOptions, learn_concept
    from mmedit_cli.reports import edit_tables

    out = Output(as_json=as_json)
    if lora is not None or embedding is not None:
        _check_adopted(photos, superclass, token)
        adopted = AdoptOptions(
            editor,
            options.named_drawing(model, out),
            token or "",
            superclass or "",
            into,
            lora,
            embedding,
            hparams,
            tuple(overrides or ()),
            force,
            device=device,
            dtype=dtype,
            revision=revision,
        )
        edit_tables.learned(out, into, adopt_concept(adopted, out))
        return
    concept = _concept(photos, superclass, token)
    request = LearnOptions(
        editor,
        options.named_drawing(model, out),
        concept,
        into,
        hparams,
        tuple(overrides or ()),
        covariance,
        seed,
        force,
        low_memory,
        device=device,
        dtype=dtype,
        revision=revision,
    )
    edit_tables.learned(out, into, learn_concept(request, out))


def _check_adopted(
    photos: Path | None, superclass: str | None, token: str | None
) -> None:
    """Raise UserError unless an adapter has a name, and no photos beside it."""
    if photos is not None:
        raise UserError(
            "--images: an adapter was learned already",
            "either photos, or --lora and --embedding",
        )
    if not superclass or not token:
        raise UserError(
            "--superclass and --token are needed: the plain word for the thing, and its name in prompts",
            'e.g. --superclass dog --token "<my-dog>"',
        )


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


def list_concepts(
    folder: options.Ledger,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the concepts of a folder."""
    from mmedit_cli.drawing.workflow.concepts import ConceptFolder
    from mmedit_cli.reports import edit_tables

    found = ConceptFolder(folder)
    edit_tables.concepts(Output(as_json=as_json), found.head, found.entries)


def forget(
    folder: options.Ledger,
    which: Annotated[
        str,
        typer.Argument(metavar="CONCEPTS", help="Tokens of concepts, or last, or all."),
    ],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Forget concepts: take them out of their folder.

    Example:

      mmedit edits undo my-concepts "<my-teddy>"
    """
    from mmedit_cli.drawing.workflow.concepts import ConceptFolder

    out = Output(as_json=as_json)
    concepts = ConceptFolder(folder)
    gone = concepts.forget(which)
    left = len(concepts.tokens)
    out.result(
        {"undo": gone, "concepts": concepts.tokens},
        lambda: out.line(f"forgotten: {', '.join(gone)}; {left} left"),
    )


def export(
    folder: options.Ledger,
    to: options.NewFolder,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    model: options.DrawingModel = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write each concept as a LoRA file that diffusers loads.

    Example:

      mmedit edits export my-concepts --to loras
    """
    from mmedit_cli.drawing.workflow.concepts import ConceptFolder, export_concepts
    from mmedit_cli.knowledge.workflow import pushing
    from mmedit_cli.reports import edit_tables

    out = Output(as_json=as_json)
    how = {"adapters": False, "model": model}
    asked = pushing.Export(folder, to, how, push_to_hub, private)
    done = pushing.export_and_push(
        asked,
        lambda: export_concepts(ConceptFolder(folder), to, model, device, out),
        out,
    )
    edit_tables.exported_concepts(out, done)


def _list_row(name: str) -> dict[str, str]:
    from mmedit_cli.catalog import DRAWS

    several = registry.personalizers.fact(name, "several")
    return {
        "personalizer": name,
        "summary": registry.personalizers.summary(name),
        "concepts at a time": "several" if several else "one",
        "models": DRAWS,
    }


def _list_data() -> list[dict[str, str]]:
    return [
        {
            "data": "emojikb-concepts",
            "summary": "things of EmojiKB that mini-sd never drew, for personalizers",
        },
        {
            "data": "dreambooth",
            "summary": "30 subjects in photos, for personalizers (mmedit download dreambooth)",
        },
    ]


def _has_edits(folder: Path) -> bool:
    from mmedit_cli.records import CONCEPT_INDEX

    return (folder / CONCEPT_INDEX).exists()


def _has_data(data: str) -> bool:
    from mmedit_cli.drawing.data.opening import NAMED

    return data in NAMED or (Path(data) / "subjects.yaml").is_file()


def _check_data(data: str, options: DataOptions) -> Iterator[Finding]:
    from mmedit_cli.doctor import check_subjects

    return check_subjects(data, options)


DRAWING = Kind(
    method=Noun("a personalizer", "personalizers"),
    folder=Noun("a folder of concepts", "folders of concepts"),
    registry=registry.personalizers,
    commands={
        "eval": evaluate,
        "edit": edit,
        "edits list": list_concepts,
        "edits undo": forget,
        "edits export": export,
    },
    list_row=_list_row,
    list_data=_list_data,
    has_edits=_has_edits,
    has_data=_has_data,
    check_data=_check_data,
)
