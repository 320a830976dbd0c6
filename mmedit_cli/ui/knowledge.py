"""The model that visitors ask and teach: one model, and for each question the edits of whoever asks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmedit_cli import registry
from mmedit_cli.catalog import find_model
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.evaluation.answers import tokens_for
from mmedit_cli.knowledge.ledger.edited_model import (
    EditOptions,
    LedgerModel,
    described,
    open_edits,
)
from mmedit_cli.knowledge.ledger.ledger import Ledger
from mmedit_cli.knowledge.loading import ModelOptions, load_model
from mmedit_cli.knowledge.workflow import asking_otherwise, choosing, editing
from mmedit_cli.knowledge.workflow.evaluation import check_facts
from mmedit_cli.output import Output
from mmedit_cli.pictures import check_picture
from mmedit_cli.reports.edit_tables import fired
from mmedit_cli.types import EditCase, Query

LONGEST = 2000  # characters of a question or an answer
_LEAST = 32  # tokens of an answer, or more where a target needs it
_QUIET = Output(quiet=True)


@dataclass(frozen=True)
class Answer:
    """What the edited and the untouched model say, and which edits took part."""

    text: str
    base: str
    fired: str


def question(prompt: str, picture: str | None, target: str = "") -> Query:
    """Return what a visitor asks or teaches.

    Raises UserError for a text that is empty or long, DataError for what is no picture.
    """
    for text in (prompt, target):
        if len(text) > LONGEST:
            raise UserError(f"a text is longer than {LONGEST:,} characters")
    if not prompt.strip():
        raise UserError("the question is empty")
    image = Path(picture) if picture else None
    if image is not None:
        check_picture(image)
    return Query(prompt.strip(), target.strip(), image)


class Knowledge:
    """A vision-language model with at most one ledger of edits on it at a time; others wait for their turn."""

    def __init__(self, model: ModelOptions, records: Path, out: Output) -> None:
        self.model = replace(model, model=model.named)
        self.records = records
        ref = find_model(self.model.named, revision=model.revision)
        self.backbone = load_model(self.model, ref, out)
        self._turn = threading.Lock()

    def ask(self, ledger: Path, query: Query) -> Answer:
        """Answer a question with the edits of a ledger, which need not be there yet."""
        with self._turn:
            if not has_edits(ledger):
                (limit,) = tokens_for(self.backbone, [query], _LEAST)
                (text,) = self.backbone.generate([query], max_new_tokens=limit)
                return Answer(text, text, "none")
            with open_edits(ledger, model=self.model, backbone=self.backbone) as edited:
                return _compared(edited, query)

    def teach(
        self,
        ledger: Path,
        request: Query,
        wordings: Sequence[str] = (),
        editor: str = "",
    ) -> dict[str, Any]:
        """Make an edit and return what it did, as `mmedit edit --json` says it; without an editor one is chosen."""
        if not request.target:
            raise UserError("the new answer is empty")
        worded = tuple(replace(request, prompt=text) for text in wordings)
        fact = EditCase("fact", request, {"text": worded} if worded else {})
        choice = choosing.Choice(editor, "it was named")
        if not editor:
            choice = choosing.choose_editor(ledger, [fact], self.model, self.records)
        check_facts(registry.editors.get(choice.editor), [fact])
        options = EditOptions(
            choice.editor,
            self.model,
            checkpoint=choice.checkpoint,
            records=self.records,
        )
        ways = asking_otherwise.given_ways([fact])
        ways += asking_otherwise.own_ways(request)
        with self._turn:
            report: dict[str, Any] = editing.make_edits(
                ledger,
                options,
                [request],
                None,
                _QUIET,
                ways,
                self.backbone,
            )
        report["chosen"] = choice.why
        return report

    def change(self, ledger: Path, do: str, which: str) -> list[int]:
        """Undo or redo edits (`3`, `3-7`, `last`, `all`) and return their ids."""
        if not has_edits(ledger):
            raise UserError(f"nothing was taught yet: nothing to {do}")
        with self._turn:
            done = editing.change_edits(ledger, do, which, self.model, _QUIET)
        return list(done[do])


def has_edits(ledger: Path) -> bool:
    """Whether a ledger was begun there."""
    return ledger.is_dir() and Ledger.exists(ledger)


def edits_of(ledger: Path) -> list[dict[str, Any]]:
    """Return the edits of a ledger as plain values, those that are undone among them; none where it is not begun."""
    if not has_edits(ledger):
        return []
    with Ledger.open(ledger) as opened:
        edits = opened.edits.values()
        return [described(edit) for edit in edits]


def _compared(edited: LedgerModel, query: Query) -> Answer:
    """Ask the edited model and the base model."""
    (text,) = edited.generate([query])
    explained = edited.explain([query])
    took_part = None
    if explained is not None:
        weights = explained[0].items()
        took_part = [{"edit": edit, "weight": weight} for edit, weight in weights]
    with edited.paused():
        (base,) = edited.generate([query])
    return Answer(text, base, fired({"fired": took_part}))
