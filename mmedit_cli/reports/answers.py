"""Answers for people: one as it is generated, a table of many, or a conversation."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.output import Output, report_error
from mmedit_cli.reading import read_stdin
from mmedit_cli.reports import edit_tables
from mmedit_cli.types import Query

if TYPE_CHECKING:
    from mmedit_cli.knowledge.workflow.asking import Asker

_HELP = "a question a line; /image FILE changes the picture, /quit ends"


def one(out: Output, asker: Asker, query: Query) -> None:
    """Print the answer to one question: word by word where that is possible, else as a whole."""
    if asker.streams and not out.as_json:
        asker.stream(query, out.write)
        out.line()
        return
    (row,) = asker.answers([query])

    def show() -> None:
        if asker.compare:
            _show_pair(out, row)
        else:
            out.line(row["answer"])

    out.result(row, show)


def many(out: Output, asker: Asker, queries: Sequence[Query]) -> None:
    """Print a table of the answers to many questions."""
    edit_tables.answers(out, asker.answers(queries), compare=asker.compare)


def talk(out: Output, asker: Asker, image: Path | None) -> None:
    """Answer the lines of stdin until they end; a mistake is reported and the conversation goes on."""
    if sys.stdin is not None and sys.stdin.isatty():
        out.note(_HELP)
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
                one(out, asker, Query(text, image=image))
        except MmeditError as error:
            report_error(error)
    if not asked and not sys.stdin.isatty():
        raise UserError(
            "nothing was asked: no question, and stdin is empty",
            'e.g. mmedit ask "What is this?"',
        )


def _show_pair(out: Output, row: Mapping[str, Any]) -> None:
    """Print the answers of the base and of the edited model."""
    rows = [["base", row["base"]], ["edited", row["answer"]]]
    out.table(["", "answer"], rows)
    out.line(f"edits that took part: {edit_tables.fired(row)}")


def _picture(text: str) -> Path:
    """Return the file that a line `/image FILE` names; raise MmeditError if it is no picture."""
    from mmedit_cli.pictures import check_picture

    words = shlex.split(text)[1:]
    if len(words) != 1:
        raise UserError("/image: name one file", _HELP)
    path = Path(words[0])
    check_picture(path)
    return path
