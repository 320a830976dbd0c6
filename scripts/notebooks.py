"""Make a notebook of each tutorial: its text, and its commands as cells to run.

    python scripts/notebooks.py             # into notebooks/; with another folder: --out FOLDER

The text is written once, in docs/tutorials/. A block of commands becomes a cell, a block with a file name a cell that
writes the file; pictures that a command draws are shown below it. What a tutorial does not run stays text. A notebook
has no outputs until it is run.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmedit_cli.storage import write_atomic

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
_BLOCK = re.compile(
    r"(?:^<!-- (?P<remark>[^>]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```\n?",
    re.DOTALL | re.MULTILINE,
)
_LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")
_PICTURES = (".png", ".webp", ".jpg")
_START = """# this cell finds the checkout, and mmedit where this notebook's Python has it
import os
import sys
from pathlib import Path

os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
here = Path.cwd()
os.chdir(next(folder for folder in (here, *here.parents) if (folder / "data/emojikb").exists()))
"""
_SHOW = "from IPython.display import Image, display\n"
Cell = dict[str, Any]


def notebook(page: Path) -> dict[str, Any]:
    """Return a tutorial as a notebook."""
    text = page.read_text(encoding="utf-8")
    cells = [_code(_START)]
    after = 0
    for block in _BLOCK.finditer(text):
        made = list(_cells(block))
        if made:
            cells += _prose(text[after : block.start()], page)
            cells += made
            after = block.end()
    cells += _prose(text[after:], page)
    # the title stands first
    cells[0], cells[1] = cells[1], cells[0]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            }
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cells(block: re.Match[str]) -> Iterator[Cell]:
    """Yield the cells of a block; none, if it stays text."""
    kind, _, name = (block["remark"] or "").partition(": ")
    if kind == "file":
        yield _code(f"%%writefile {name}\n{block['text']}")
    elif kind != "not run" and block["language"] == "console":
        commands = commands_in(block["text"])
        yield _code("\n".join(f"!{command}" for command in commands))
        drawn = [picture for command in commands for picture in _drawn_by(command)]
        if drawn:
            shown = "\n".join(f'display(Image("{picture}"))' for picture in drawn)
            yield _code(_SHOW + shown)


def commands_in(dialogue: str) -> list[str]:
    """Return the commands of a dialogue, without what they print."""
    return re.findall(r"^\$ (.*)$", dialogue, re.MULTILINE)


def _drawn_by(command: str) -> list[str]:
    """Return the picture files that a command writes."""
    words = shlex.split(command)
    found = []
    for option, name in pairwise(words):
        if option in ("-o", "--sheet") and name.endswith(_PICTURES):
            found.append(name)
    return found


def _prose(text: str, page: Path) -> list[Cell]:
    """Return text as a cell; its links lead to the pages as they lie in the checkout."""
    text = text.strip()
    if not text:
        return []

    def turned(match: re.Match[str]) -> str:
        target = (page.parent / match[1]).resolve()
        return f"../{target.relative_to(ROOT).as_posix()}"

    linked = _LINK.sub(turned, text)
    return [{"cell_type": "markdown", "metadata": {}, "source": linked}]


def _code(source: str) -> Cell:
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": source.rstrip("\n"),
    }


def written(page: Path) -> str:
    """Return the notebook of a tutorial as the text of its file."""
    return json.dumps(notebook(page), ensure_ascii=False, indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "notebooks")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for page in sorted(TUTORIALS.glob("*.md")):
        file = args.out / f"{page.stem}.ipynb"
        write_atomic(file, written(page))
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
