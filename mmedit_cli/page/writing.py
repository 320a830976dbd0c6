"""The page as a file: what is said stands in it as text, the cases as data that its script shows."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from mmedit_cli.reading import read_bytes
from mmedit_cli.storage import dump_json, write_atomic

# Nothing is fetched, and no script runs but the one of the page, whatever the text of a case says.
_POLICY = (
    "default-src 'none'; img-src data: file: 'self'; style-src 'unsafe-inline'; "
    "script-src 'sha256-{digest}'"
)
_NO_SCRIPT = "Without JavaScript the cases are not shown, all else is."
_KEYS = "j next, k previous, / search, w wrong only, c changed only, t dark or light"


@dataclass(frozen=True)
class Question:
    """A question of a case: its probe, place of its picture among those of the page (-1: none), and answer before."""

    probe: str
    prompt: str
    picture: int
    background: str
    target: str
    before: str | None


@dataclass(frozen=True)
class Answers:
    """What was said after so many edits, a value a question: the answer, whether it is right, which edit answered.

    A value is None where it is not known.
    """

    edits: int
    after: Sequence[str | None]
    right: Sequence[bool | None]
    fired: Sequence[str] = ()


@dataclass(frozen=True)
class Card:
    """One case: words, groups of pictures by caption (places among those of the page), questions and answers."""

    title: str
    kind: str = ""
    run: int = 0
    notes: Sequence[str] = ()
    groups: Sequence[tuple[str, Sequence[int]]] = ()
    questions: Sequence[Question] = ()
    answers: Sequence[Answers] = ()


@dataclass
class Page:
    """What a page shows. `sections` are HTML, made by the functions below; everything else is plain text.

    pictures: addresses, of files beside the page or with the data inside. runs: names, for the cases of several.
    probes: the names of probes; `kept` are those whose answers are to stay as they were.
    """

    title: str
    sections: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def write_page(page: Page, file: Path) -> None:
    """Write a page atomically; raise RunError if that fails."""
    style = _own("page.css")
    script = _own("page.js")
    digest = hashlib.sha256(script.encode()).digest()
    policy = _POLICY.format(digest=base64.b64encode(digest).decode())
    title = escape(page.title)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{style}</style></head><body>",
        f'<header><h1>{title}</h1><button id="theme">dark / light</button></header>',
        "<main>",
        *page.sections,
        '<form id="filters" aria-label="Filters" hidden></form>',
        '<div id="cases"></div><div id="more"></div>',
        f"<noscript><p>{_NO_SCRIPT}</p></noscript>",
        f'<p class="keys">Keys: {_KEYS}</p></main>',
        f'<script type="application/json" id="data">{_data(page)}</script>',
        f"<script>{script}</script></body></html>",
    ]
    write_atomic(file, "\n".join(parts) + "\n")


def _own(name: str) -> str:
    """Return a file of this package."""
    return read_bytes(Path(__file__).with_name(name)).decode()


def _data(page: Page) -> str:
    """Return the cases as JSON in which nothing can end the element that it stands in."""
    values: dict[str, Any] = {
        "cards": [asdict(card) for card in page.cards],
        "pictures": page.pictures,
        "runs": page.runs,
        "probes": page.probes,
        "kept": page.kept,
    }
    return dump_json(values).decode().replace("<", "\\u003c")


# -- HTML -----------------------------------------------------------------------------------------------------------


def section(heading: str, parts: Sequence[str]) -> str:
    """Return HTML parts under a heading that opens and closes."""
    name = escape(heading)
    start = f"<details open><summary><h2>{name}</h2></summary>"
    return "\n".join([start, *parts, "</details>"])


def paragraph(text: str) -> str:
    """Return a line of text as HTML."""
    return f"<p>{escape(text)}</p>"


def folded(heading: str, text: str) -> str:
    """Return a text to the letter, shown on demand."""
    name = escape(heading)
    return f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], sections: Sequence[int] = ()
) -> str:
    """Return a table as HTML; a rule is drawn below each row whose index is in `sections`."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = [f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>']
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        ends = ' class="end"' if index in sections else ""
        lines.append(f"<tr{ends}>{cells}</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)
