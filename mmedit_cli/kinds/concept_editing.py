"""Concept editors on the command line: what `edit` and `edits` do with methods that change what a model draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
    from mmedit_cli.types import ConceptChange


@measures(options.Facts, "emojikb-facts")
def evaluate(request: DrawingEvalOptions, out: Output, dry_run: bool) -> None:
    """Edit facts about drawings, each alone and all of a kind at once, draw, judge and report. Again: goes on.

    --set eval.KEY=VALUE says how pictures are drawn and judged; KEY is steps, guidance, size, seeds, batch_size, clip
    or encoder. Other keys are hyper-parameters.

    Examples:

      mmedit eval uce --model mini-sd --data emojikb-facts --limit 20 --set eval.steps=10

      mmedit eval time --model stable-diffusion-v1-5 --data timed --root time-diffusion --set eval.seeds=4
    """
    from mmedit_cli.drawing.workflow import fact_evaluation, fact_plan
    from mmedit_cli.reports import concept_editing, show

    if dry_run:
        show.plan(out, fact_plan.plan_facts(request).describe())
    else:
        concept_editing.print_scores(out, fact_evaluation.evaluate_facts(request, out))


def edit(
    editor: options.Editor,
    into: options.Into,
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to draw otherwise.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The text to draw in its place; of several, joined by |, the mean.",
            show_default=False,
        ),
    ] = None,
    erase: Annotated[
        str | None,
        typer.Option(
            help="Texts to draw no more, separated by commas: each an edit of its own.",
            show_default=False,
        ),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            help="Many edits: .csv, .tsv, .json or .jsonl with prompt, target (none: erased) and keep.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(help="Texts to draw as before, separated by commas."),
    ] = "",
    model: options.DrawingModel = None,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Change or erase what a text-to-image model draws for a text, and keep the edits in a folder. Again: adds to it.

    Examples:

      mmedit edit time --model stable-diffusion-v1-5 --prompt "a rose" --target "a blue rose" --into my-edits

      mmedit edit uce --erase "Van Gogh" --keep "Monet, Picasso" --into erased

      mmedit edit speed --requests names.csv --into many

      mmedit generate --edits my-edits "a rose in a vase" --compare

      mmedit edits undo my-edits last
    """
    from mmedit_cli.drawing.workflow import concept_edits
    from mmedit_cli.records import CONCEPT_EDITS
    from mmedit_cli.reports import edit_tables

    out = Output(as_json=as_json)
    begun = (into / CONCEPT_EDITS).exists()
    named = model or ("" if begun else options.named_drawing(model, out))
    request = concept_edits.ConceptEditOptions(
        editor,
        named,
        tuple(_changes(prompt, target, erase, requests, keep)),
        into,
        hparams,
        tuple(overrides or ()),
        device=device,
        dtype=dtype,
        revision=revision,
    )
    report = concept_edits.make_edits(request, out)
    edit_tables.concept_edits(out, into, report, made=True)


def _changes(
    prompt: str | None,
    target: str | None,
    erase: str | None,
    requests: Path | None,
    keep: str,
) -> Iterator[ConceptChange]:
    """Yield what is to be drawn otherwise."""
    from mmedit_cli.drawing.data.changes import read_changes, split_texts
    from mmedit_cli.types import ConceptChange

    kept = split_texts(keep, ",")
    given = [option for option in (prompt, erase, requests) if option is not None]
    if len(given) != 1 or (prompt is None) != (target is None):
        raise UserError(
            "nothing to change: --prompt and --target are needed, or --erase or --requests alone",
            'e.g. --prompt "a rose" --target "a blue rose", or --erase "Van Gogh"',
        )
    if requests is not None:
        for change in read_changes(requests):
            yield replace(change, keep=tuple(dict.fromkeys((*change.keep, *kept))))
        return
    if prompt is not None and target is not None:
        yield ConceptChange(prompt.strip(), split_texts(target, "|") or ("",), kept)
        return
    erased = split_texts(erase or "", ",")
    if not erased:
        raise UserError("--erase: names nothing", 'e.g. --erase "Van Gogh"')
    for text in dict.fromkeys(erased):
        yield ConceptChange(text, (), kept)


def list_edits(
    folder: options.Ledger,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that are undone.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the edits of a folder."""
    from mmedit_cli.drawing.workflow.concept_edits import ConceptEdits
    from mmedit_cli.reports import edit_tables

    found = ConceptEdits.existing(folder)
    edits = found.active
    if everything:
        edits = found.entries
    report = {**found.head, "edits": edits}
    edit_tables.concept_edits(Output(as_json=as_json), folder, report)


def undo(
    folder: options.Ledger,
    which: options.WhichEdits,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Take edits back: the model draws as if they had never been made, bit for bit.

    Examples:

      mmedit edits undo my-edits 3-7
    """
    _mark("undo", folder, which, as_json)


def redo(
    folder: options.Ledger,
    which: options.WhichEdits,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Bring back edits that were undone, bit for bit."""
    _mark("redo", folder, which, as_json)


def _mark(do: str, folder: Path, which: str, as_json: bool) -> None:
    from mmedit_cli.drawing.workflow.concept_edits import ConceptEdits

    out = Output(as_json=as_json)
    found = ConceptEdits.existing(folder)
    redone = do == "redo"
    ids = found.mark(which, active=redone)
    active = len(found.active)
    word = "redone" if redone else "undone"
    named = ", ".join(map(str, ids))
    out.result(
        {do: ids, "active": active},
        lambda: out.line(f"{word}: {named}; {active:,} active"),
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
    """Write the edited model as a folder of diffusers, and the changed weights alone, as others read them.

    changed.safetensors has the names of diffusers, changed.ldm.safetensors those of checkpoints of one file.

    Example:

      mmedit edits export my-edits --to edited-model
    """
    from mmedit_cli.drawing.workflow.concept_edits import ConceptEdits, export_edits
    from mmedit_cli.knowledge.workflow import pushing
    from mmedit_cli.reports import edit_tables

    out = Output(as_json=as_json)
    found = ConceptEdits.existing(folder)
    asked = pushing.Export(folder, to, {"model": model}, push_to_hub, private)
    done = pushing.export_and_push(
        asked, lambda: export_edits(found, to, model, device, out), out
    )
    edit_tables.exported_drawing_model(out, done)


def _list_row(name: str) -> dict[str, str]:
    from mmedit_cli.catalog import DRAWS

    return {
        "concept editor": name,
        "summary": registry.concept_editors.summary(name),
        "models": DRAWS,
    }


def _has_edits(folder: Path) -> bool:
    from mmedit_cli.records import CONCEPT_EDITS

    return (folder / CONCEPT_EDITS).exists()


def _list_data() -> list[dict[str, str]]:
    return [
        {
            "data": "emojikb-facts",
            "summary": "things of EmojiKB that mini-sd draws otherwise, or no more, for concept editors",
        },
        {
            "data": "timed, road",
            "summary": "published facts about drawings, for concept editors (files of your own, --root)",
        },
    ]


def _has_data(data: str) -> bool:
    from mmedit_cli.drawing.data.opening_facts import is_facts

    return is_facts(data)


def _check_data(data: str, options: DataOptions) -> Iterator[Finding]:
    from mmedit_cli.doctor import check_facts

    return check_facts(data, options)


CONCEPT_EDITING = Kind(
    method=Noun("a concept editor", "concept editors"),
    folder=Noun("a folder of concept edits", "folders of concept edits"),
    registry=registry.concept_editors,
    commands={
        "eval": evaluate,
        "edit": edit,
        "edits list": list_edits,
        "edits undo": undo,
        "edits redo": redo,
        "edits export": export,
    },
    list_row=_list_row,
    list_data=_list_data,
    has_edits=_has_edits,
    has_data=_has_data,
    check_data=_check_data,
)
