"""What `mmedit ask` does: one question, a file of questions, or a conversation; with the edits of a ledger or not."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmedit_cli.catalog import find_model
from mmedit_cli.errors import DataError, MmeditError, UserError
from mmedit_cli.knowledge import edit_tables
from mmedit_cli.knowledge.evaluation.answers import tokens_for
from mmedit_cli.knowledge.ledger.edited_model import LedgerModel, open_edits
from mmedit_cli.knowledge.loading import ModelOptions, load_model
from mmedit_cli.knowledge.models.shared.generation import SAMPLINGS, described
from mmedit_cli.knowledge.workflow.editing import read_facts
from mmedit_cli.output import Output, report_error
from mmedit_cli.reading import read_lines, read_stdin
from mmedit_cli.types import Query

_BATCH = 32
_MOST_QUESTIONS = (
    100_000  # of a file: all are in memory, and more would take days to answer
)
_HELP = "a question a line; /image FILE changes the picture, /quit ends"


class Asker:
    """A model that answers, with the edits of a ledger on it if a folder is named; for `with`.

    `compare` also asks the base model, and which edits took part.
    """

    def __init__(
        self,
        model: ModelOptions,
        edits: Path | None,
        out: Output,
        *,
        compare: bool = False,
        max_new_tokens: int = 32,
        sampling: str = "greedy",
    ) -> None:
        if sampling not in SAMPLINGS:
            raise UserError(
                f"--sampling {sampling}: not a way to answer",
                f"use {' or '.join(SAMPLINGS)}",
            )
        self.out, self.compare, self.sampling = out, compare, sampling
        self._stack = ExitStack()
        self.edited: LedgerModel | None = None
        if edits is not None:
            self.edited = self._stack.enter_context(
                open_edits(edits, model=model, out=out)
            )
            self.backbone = self.edited.backbone
        elif compare:
            raise UserError("--compare: there is nothing to compare without --edits")
        else:
            self.backbone = load_model(
                model, find_model(model.model, revision=model.revision), out
            )
        taught = (
            []
            if self.edited is None
            else [edit.request for edit in self.edited.ledger.active]
        )
        self.least = max([max_new_tokens, *tokens_for(self.backbone, taught)])
        own = self.backbone.own_settings
        if own and sampling == "greedy":
            out.note(
                f"answers are greedy: {described(own)} of the model is ignored (--sampling model follows it)"
            )

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def answers(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """Return the questions with their answers."""
        said = self._generate(queries)
        rows: list[dict[str, Any]] = [
            {
                "prompt": query.prompt,
                "image": query.image and str(query.image),
                "answer": answer,
            }
            for query, answer in zip(queries, said, strict=True)
        ]
        if self.compare and self.edited is not None:
            explained = self.edited.explain(queries)
            with self.edited.paused():
                base = self._generate(queries)
            for i, row in enumerate(rows):
                row["base"] = base[i]
                row["fired"] = None if explained is None else _fired(explained[i])
        return rows

    def one(self, query: Query) -> None:
        """Answer one question: in words as they come, or as a whole where it is JSON or a comparison."""
        if (
            self.out.as_json or self.compare or self.sampling == "model"
        ):  # beams are not known word by word
            (row,) = self.answers([query])
            show = self._show_pair if self.compare else self._show_answer
            self.out.result(row, lambda: show(row))
            return
        self._generate([query], self._streamer())
        self.out.line()

    def many(self, queries: Sequence[Query]) -> None:
        """Answer many questions and print a table."""
        edit_tables.answers(self.out, self.answers(queries), compare=self.compare)

    def talk(self, image: Path | None) -> None:
        """Answer the lines of stdin until they end; a mistake is reported and the talk goes on."""
        if sys.stdin is not None and sys.stdin.isatty():
            self.out.note(_HELP)
        asked = False
        for text in read_stdin():
            asked = asked or bool(text)
            if text in ("/quit", "/exit"):
                return
            try:
                if text.startswith("/image"):
                    image = _picture(text)
                elif text.startswith("/"):
                    raise UserError(f"{text.split()[0]}: no such command", _HELP)
                elif text:
                    self.one(Query(text, image=image))
            except MmeditError as error:
                report_error(error)
        if not asked and not sys.stdin.isatty():
            raise UserError(
                "nothing was asked: no question, and stdin is empty",
                'e.g. mmedit ask "What is this?"',
            )

    def _show_pair(self, row: dict[str, Any]) -> None:
        self.out.table(
            ["", "answer"], [["base", row["base"]], ["edited", row["answer"]]]
        )
        self.out.line(f"edits that took part: {edit_tables.fired(row)}")

    def _show_answer(self, row: dict[str, Any]) -> None:
        self.out.line(row["answer"])

    def _generate(self, queries: Sequence[Query], streamer: Any = None) -> list[str]:
        """Return the answers, as long as the targets of the questions and of the edits need."""
        said: list[str] = []
        for at in range(0, len(queries), _BATCH):
            part = queries[at : at + _BATCH]
            limits = tokens_for(self.backbone, part, self.least)
            said += self.backbone.generate(
                part, max_new_tokens=limits, streamer=streamer, sampling=self.sampling
            )
        return said

    def _streamer(self) -> Any:
        """Return a streamer that prints just what `generate` returns."""
        from transformers import TextStreamer

        out = self.out

        class Words(TextStreamer):  # type: ignore[misc]
            begun = ended = False
            blank = ""

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if self.ended:
                    return
                text = text if self.begun else text.lstrip("\r ")
                line, newline, _ = (self.blank + text).partition("\n")
                words = line.rstrip()
                self.blank, self.ended = line[len(words) :], bool(newline)
                self.begun = self.begun or bool(words)
                out.write(words)

        return Words(
            self.backbone.tokenizer, skip_prompt=True, skip_special_tokens=True
        )


def read_questions(file: Path, image: Path | None) -> list[Query]:
    """Return the questions of a .txt file, a question a line, all about `image`; or of a file of facts or cases."""
    if file.suffix.lower() != ".txt":
        return [fact.request for fact in read_facts(file)]
    questions: list[Query] = []
    for _, line in read_lines(file, hint="a text file with a question a line"):
        if text := line.strip():
            questions.append(Query(text, image=image))
        if len(questions) > _MOST_QUESTIONS:
            raise DataError(
                f"{file}: more than {_MOST_QUESTIONS:,} questions",
                "split it into smaller files",
            )
    if not questions:
        raise DataError(f"{file}: no questions in it", "a question a line")
    return questions


def _fired(weights: dict[int, float]) -> list[dict[str, Any]]:
    return [{"edit": edit, "weight": weight} for edit, weight in weights.items()]


def _picture(text: str) -> Path:
    from mmedit_cli.pictures import check_picture

    words = shlex.split(text)[1:]
    if len(words) != 1:
        raise UserError("/image: name one file", _HELP)
    check_picture(Path(words[0]))
    return Path(words[0])
