"""`mmedit edits`: what only ledgers can do; the rest is in `mmedit_cli.kinds`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def show(
    folder: options.Ledger,
    which: options.WhichEdits,
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


def diff(
    first: options.Ledger,
    second: options.Ledger,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare the active edits of two ledgers: edits of one only (< and >), and differing targets (!)."""
    from mmedit_cli.knowledge.workflow import editing
    from mmedit_cli.reports import edit_tables

    edit_tables.compared(Output(as_json=as_json), editing.diff(first, second))


def check(
    folder: options.Ledger,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show active edits that contradict each other: one question about one picture, or in text, with two answers.

    Exit 1 if there are any. No model is loaded.

    Examples:

      mmedit edits check my-edits
    """
    from mmedit_cli.knowledge.workflow import editing
    from mmedit_cli.reports import edit_tables

    found = editing.contradictions(folder)
    edit_tables.contradicting(Output(as_json=as_json), found)
    if found:
        raise typer.Exit(1)


def verify(
    folder: options.Ledger,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Ask every edit again and show which ones hold; exit 1 if one does not."""
    from mmedit_cli.knowledge.ledger.edited_model import open_edits
    from mmedit_cli.knowledge.loading import ModelOptions
    from mmedit_cli.reports import edit_tables

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
    folder: options.Ledger,
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
    """Rewrite the ledger in a few files. Edits and answers stay; the history of undo and redo is dropped.

    Files of tensors and pictures that the ledger does not mention are removed, and listed in the output.
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
    folder: options.Ledger, as_json: options.Json = False, debug: options.Debug = False
) -> None:
    """Recover edits whose tensors exist but whose lines are lost or unreadable. No model is loaded."""
    from mmedit_cli.knowledge.workflow.repairing import repair as repair_ledger
    from mmedit_cli.reports import edit_tables

    edit_tables.repaired(Output(as_json=as_json), folder, vars(repair_ledger(folder)))
