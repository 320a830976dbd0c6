"""`mmedit edits`: what can be done with the edits of a ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output

Folder = Annotated[
    Path, typer.Argument(metavar="LEDGER", help="The folder of the edits.")
]
Which = Annotated[
    str, typer.Argument(metavar="EDITS", help="3, or 3-7, or 1,4-6, or last, or all.")
]


def list_edits(
    folder: Folder,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that are undone.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the active edits."""
    from mmedit_cli.drawing.workflow.concepts import ConceptFolder
    from mmedit_cli.knowledge import edit_tables
    from mmedit_cli.knowledge.ledger.edited_model import described, head
    from mmedit_cli.knowledge.ledger.ledger import Ledger

    if (concepts := ConceptFolder(folder)).head:
        edit_tables.concepts(Output(as_json=as_json), concepts.head, concepts.entries)
        return
    with Ledger.open(folder) as ledger:
        edits = [
            described(edit)
            for edit in ledger.edits.values()
            if edit.active or everything
        ]
        edit_tables.listed(Output(as_json=as_json), edits, head(ledger))


def show(
    folder: Folder,
    which: Which,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show everything about some edits, and what they were made with."""
    from mmedit_cli.knowledge.ledger.edited_model import described, head
    from mmedit_cli.knowledge.ledger.ledger import Ledger

    out = Output(as_json=as_json)
    with Ledger.open(folder) as ledger:
        found = [described(ledger.edits[i]) for i in ledger.select(which)]
        data = {**head(ledger), "hparams": ledger.config["hparams"], "show": found}
    out.result(data, lambda: out.yaml(data))


def undo(
    folder: Folder,
    which: Which,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Take edits back; without any, the model is the base model bit for bit. Of a folder of concepts: forget some.

    Examples:

      mmedit edits undo my-edits 3-7

      mmedit edits undo my-edits all

      mmedit edits undo my-concepts "<my-teddy>"
    """
    from mmedit_cli.drawing.workflow.concepts import ConceptFolder

    if (concepts := ConceptFolder(folder)).head:
        out, gone = Output(as_json=as_json), concepts.forget(which)
        left = {"undo": gone, "concepts": concepts.tokens}
        out.result(
            left,
            lambda: out.line(
                f"forgotten: {', '.join(gone)}; {len(concepts.tokens)} left"
            ),
        )
        return
    _change("undo", folder, which, (model, device), as_json)


def redo(
    folder: Folder,
    which: Which,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Bring back edits that were undone, each in its old place."""
    _change("redo", folder, which, (model, device), as_json)


def diff(
    first: Folder,
    second: Folder,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare the active edits of two ledgers: those of one only (< and >), and those with another target (!)."""
    from mmedit_cli.knowledge import edit_tables
    from mmedit_cli.knowledge.workflow import editing

    edit_tables.compared(Output(as_json=as_json), editing.diff(first, second))


def verify(
    folder: Folder,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Ask every edit again and say which hold; exit 1 if one does not."""
    from mmedit_cli.knowledge import edit_tables
    from mmedit_cli.knowledge.ledger.edited_model import open_edits
    from mmedit_cli.knowledge.loading import ModelOptions

    out = Output(as_json=as_json)
    with (
        open_edits(folder, model=ModelOptions(model or "", device), out=out) as edited,
        out.progress({"edits": len(edited.ledger.active)}) as tick,
    ):
        found = edited.verify(tick)
    edit_tables.verified(out, found)
    raise typer.Exit(
        0 if all(row["holds"] or row["replaced_by"] for row in found) else 1
    )


def compact(
    folder: Folder,
    remake: Annotated[
        bool,
        typer.Option(
            "--remake",
            help="Make every edit again from its request: mends damaged tensors.",
        ),
    ] = False,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write the ledger anew in few files; edits and answers stay, the history of undo and redo goes.

    Files of tensors and pictures that no line of the ledger names are removed, and named here.
    """
    from mmedit_cli.knowledge.loading import ModelOptions
    from mmedit_cli.knowledge.workflow import editing

    out = Output(as_json=as_json)
    done = editing.compact(folder, remake, ModelOptions(model or "", device), out)

    def show() -> None:
        before, after = done["before"], done["after"]
        out.line(
            f"{before['shards']:,} files of tensors became {after['shards']:,}; "
            f"{before['bytes'] / (1 << 20):,.1f} MiB became {after['bytes'] / (1 << 20):,.1f} MiB"
        )
        for file in done["removed"]["unnamed"]:
            out.line(
                f"removed {file['file']} ({file['bytes']:,} bytes): no line of the ledger named it"
            )

    out.result(done, show)


def repair(
    folder: Folder, as_json: options.Json = False, debug: options.Debug = False
) -> None:
    """Take up edits whose tensors are there but whose lines were lost or cannot be read; no model is loaded."""
    from mmedit_cli.knowledge import edit_tables
    from mmedit_cli.knowledge.workflow.repairing import repair as repair_ledger

    edit_tables.repaired(Output(as_json=as_json), folder, vars(repair_ledger(folder)))


def export(
    folder: Folder,
    to: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    adapters: Annotated[
        bool,
        typer.Option(
            "--adapters",
            help="PEFT adapters of a routed LoRA method, without what routes.",
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Also upload the folder.", show_default=False
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the hub repository private.")
    ] = False,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write the edited model as a folder that loads without this program, and check that it answers the same.

    Plain weights where the method allows it, PEFT adapters of LoRA methods, else the base model with one small file
    that routes. Of a folder of concepts: LoRA files for diffusers.

    Examples:

      mmedit edits export my-edits --to edited-model

      mmedit edits export my-edits --to edited-model --push-to-hub me/edited-model

      mmedit edits export my-edits --to blocks --adapters
    """
    from mmedit_cli.drawing.workflow.concepts import ConceptFolder, export_concepts
    from mmedit_cli.knowledge import edit_tables
    from mmedit_cli.knowledge.loading import ModelOptions
    from mmedit_cli.knowledge.workflow import exporting, pushing

    out = Output(as_json=as_json)
    how = {"adapters": adapters, "model": model}
    done = None
    if push_to_hub is not None:
        pushing.check(push_to_hub)
        done = pushing.waiting(to, folder, how)
    concepts = ConceptFolder(folder)
    if done is not None:
        out.note(f"{to} is complete, and not uploaded yet")
    elif concepts.head:
        done = export_concepts(concepts, to, model, device, out)
    else:
        done = exporting.export(
            folder, to, ModelOptions(model or "", device), out, adapters=adapters
        )
    if push_to_hub is not None:
        done["url"] = pushing.push(
            done, to, push_to_hub, private=private, made_from=folder, how=how
        )
    if concepts.head:
        edit_tables.exported(out, done)
    else:
        out.result(
            done, lambda: [out.line(line) for line in exporting.said(done)] and None
        )


def _change(
    do: str, folder: Path, which: str, where: tuple[str | None, str], as_json: bool
) -> None:
    from mmedit_cli.knowledge.loading import ModelOptions
    from mmedit_cli.knowledge.workflow import editing

    out, (model, device) = Output(as_json=as_json), where
    done = editing.change_edits(
        folder, do, which, ModelOptions(model or "", device), out
    )
    word = {"undo": "undone", "redo": "redone"}[do]
    edits = ", ".join(map(str, done[do]))
    out.result(done, lambda: out.line(f"{word}: {edits}; {done['active']:,} active"))
