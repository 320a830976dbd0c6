"""Edits as a picture: what was asked, what the model said before, and what it says now."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mmedit_cli.errors import RunError
from mmedit_cli.pictures import Picture, load_picture, png

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SIDE, GAP, TEXT, LINE = (
    96,
    16,
    300,
    19,
)  # pixels: a picture, between things, room for text, a line of it
THUMB = 240  # pixels: least side of a picture on the sheet of an image edit
HEADS = {"request": "the edit", "general": "must follow", "local": "must stay"}
# words, and groups of pictures by name
Row = tuple[str, Sequence[tuple[str, Sequence[Path]]]]
INK, GREY, GREEN, RED = "#202020", "#707070", "#1a7f37", "#b42318"


def draw(examples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a sheet with one row an edit: the edit, a question that must change with it, and one that must not.

    Raises RunError if there is nothing to draw, DataError for a picture that is gone.
    """
    from PIL import Image, ImageDraw

    rows = [example for example in examples if example.get("panels")]
    if not rows:
        raise RunError(
            "no edits with pictures and generated answers in this report",
            "evaluate with protocol ar",
        )
    columns = [kind for kind in HEADS if any(kind in row["panels"] for row in rows)]
    width, height = GAP + len(columns) * (SIDE + TEXT + 2 * GAP), SIDE + GAP
    sheet = Image.new("RGB", (width, 40 + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, kind in enumerate(columns):
        left = GAP + i * (SIDE + TEXT + 2 * GAP)
        pen.text((left, 12), HEADS[kind], GREY, _font(15))
        for j, row in enumerate(rows):
            if kind in row["panels"]:
                _panel(sheet, pen, (left, 40 + j * height), row["panels"][kind], kind)
    from mmedit_cli.storage import write_atomic

    write_atomic(path, png(sheet, small=True))


def edit_sheet(
    source: Path, background: str, edits: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Draw a picture and its edited versions side by side, with their seeds, and write the sheet as a PNG.

    `edits` are records of `mmedit image-edit` about that picture.
    """
    from PIL import Image, ImageDraw

    from mmedit_cli.storage import write_atomic

    shown = [(load_picture(Picture(source, background)), "before")]
    for edit in edits:
        edited = load_picture(Picture(Path(edit["output"]), background))
        shown.append((edited, f"seed {edit['seed']}"))
    across = math.ceil(math.sqrt(len(shown))) if len(shown) > 3 else len(shown)
    side = max(THUMB, min(2 * THUMB, 1200 // across))
    down = math.ceil(len(shown) / across)
    column_width = side + GAP
    row_height = side + LINE + GAP
    size = (GAP + across * column_width, 2 * LINE + down * row_height)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    title = _cut(edits[0]["instruction"], sheet.width // 9)
    pen.text((GAP, GAP), title, INK, _font(15))
    for i, (picture, caption) in enumerate(shown):
        row, column = divmod(i, across)
        left = GAP + column * column_width
        top = 2 * LINE + row * row_height
        scale = side / max(picture.size)
        fitted = picture.resize(
            [max(1, round(length * scale)) for length in picture.size]
        )
        margin_left = (side - fitted.width) // 2
        margin_top = (side - fitted.height) // 2
        sheet.paste(fitted, (left + margin_left, top + margin_top))
        pen.text((left, top + side + 2), caption, GREY, _font(13))
    write_atomic(path, png(sheet, small=True))


def contact_sheet(rows: Sequence[Row], path: Path) -> None:
    """Draw rows of pictures, each below its words and grouped by name, and write the sheet as a PNG."""
    from PIL import Image, ImageDraw

    from mmedit_cli.storage import write_atomic

    gap, height = GAP // 4, 2 * LINE + SIDE + GAP // 2
    shown = {
        file: _thumbnail(file)
        for _, groups in rows
        for _, files in groups
        for file in files
    }
    across = max(
        sum(GAP + sum(shown[file].width + gap for file in files) for _, files in groups)
        for _, groups in rows
    )
    sheet = Image.new("RGB", (GAP + across, GAP + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (words, groups) in enumerate(rows):
        left, top = GAP, GAP + i * height
        pen.text((left, top), _cut(words, sheet.width // 8), INK, _font(14))
        for name, files in groups:
            pen.text((left, top + LINE), name, GREY, _font(13))
            for file in files:
                sheet.paste(shown[file], (left, top + 2 * LINE))
                left += shown[file].width + gap
            left += GAP
    write_atomic(path, png(sheet, small=True))


def _thumbnail(file: Path) -> Image.Image:
    """Return a picture as high as a row."""
    picture = load_picture(Picture(file))
    return picture.resize((max(1, round(SIDE * picture.width / picture.height)), SIDE))


def page(title: str, sections: Sequence[tuple[str, Sequence[Row]]], path: Path) -> None:
    """Write an HTML page with a card a row of a contact sheet, whose type is its heading.

    It links to the pictures where they are.
    """
    from mmedit_cli.page.writing import Card, Page, write_page

    content = Page(title)
    places: dict[Path, int] = {}
    for heading, rows in sections:
        for words, groups in rows:
            shown = []
            for name, files in groups:
                found = [places.setdefault(file, len(places)) for file in files]
                shown.append((name, found))
            content.cards.append(Card(words, heading, groups=shown))
    for file in places:
        link = Path(os.path.relpath(file, path.parent)).as_posix()
        content.pictures.append(quote(link))
    write_page(content, path)


def _panel(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    panel: Mapping[str, Any],
    kind: str,
) -> None:
    """One picture and beside it the question, the answer before and the answer after."""
    left, top = place
    picture = load_picture(Picture(Path(panel["image"]), panel["background"]))
    picture.thumbnail((SIDE, SIDE))
    if max(picture.size) < SIDE:
        scale = SIDE / max(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale))
        )
    sheet.paste(picture, (left, top))
    good = panel["right"]
    if kind == "local":
        good = panel["after"] == panel["before"]
    lines = [
        (panel["prompt"], INK),
        (f"before: {panel['before']}", GREY),
        (f"after: {panel['after']}", GREEN if good else RED),
    ]
    if kind == "request":
        lines.insert(1, (f"wanted: {panel['target']}", GREY))
    for i, (text, colour) in enumerate(lines):
        corner = (left + SIDE + GAP, top + 6 + i * LINE)
        pen.text(corner, _cut(text), colour, _font(14))


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _cut(text: str, most: int = 42) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
