"""Which editor suits some facts, where none is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmedit_cli.catalog import find_model
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.ledger.ledger import Ledger
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.knowledge.trained_networks import (
    LATEST,
    default_editor,
    find_networks,
    trained_networks,
)
from mmedit_cli.types import EditCase

BY_PICTURE = "liveedit"
ANY_FACT = "multi-melo"  # with and without a picture, on any model, untrained


@dataclass(frozen=True)
class Choice:
    """An editor, and in a few words why it was taken.

    `checkpoint` names its networks where they are not those that come along.
    """

    editor: str
    why: str
    checkpoint: str | None = None


def choose_editor(
    folder: Path,
    facts: Sequence[EditCase],
    model: ModelOptions,
    records: Path,
    checkpoint: str | None = None,
) -> Choice:
    """Return the editor for some facts that are to be kept in a folder.

    A ledger that is there keeps its editor, and networks that are named bring theirs. Else it is LiveEdit, if every
    fact has a picture and networks for the model are at hand, or Multi-MELO. Raises UserError for networks that do not
    say whose they are, and ModelError for a model that is not found.
    """
    if Ledger.exists(folder):
        with Ledger.open(folder) as ledger:
            return Choice(ledger.config["editor"], f"{folder} holds its edits")
    if checkpoint is not None:
        editor, _ = default_editor(records, model.named, checkpoint)
        return Choice(editor, "the networks are its", checkpoint)
    name = find_model(model.named, revision=model.revision).name
    if any(fact.request.image is None for fact in facts):
        which = "the fact has" if len(facts) == 1 else "some of the facts have"
        return Choice(ANY_FACT, f"{which} no picture")
    try:
        find_networks(BY_PICTURE, name, records)
    except UserError:
        return _without_shipped_networks(name, records)
    return Choice(BY_PICTURE, f"{_seen(facts)}, and it comes trained for {name}")


def _seen(facts: Sequence[EditCase]) -> str:
    return "the fact has a picture" if len(facts) == 1 else "the facts have pictures"


def _without_shipped_networks(model: str, records: Path) -> Choice:
    """Return LiveEdit with the user's own networks for a model, or the editor that needs none."""
    own = trained_networks(records, BY_PICTURE, model)
    if own:
        run = own[0].parent.name
        return Choice(BY_PICTURE, f"run {run} trained it for {model}", LATEST)
    why = f"it needs no training, and {BY_PICTURE} has none for {model}"
    return Choice(ANY_FACT, why)
