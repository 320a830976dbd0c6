"""The folders of InstructPix2Pix, which MGIE uses too: ID/prompt.json, and ID/SEED_0.jpg with ID/SEED_1.jpg."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError
from mmedit_cli.picture_editing.data.base import EditPair, picture_content
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.reading import read_json_object

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def pairs(root: Path) -> list[EditPair]:
    """Return the pairs of a folder by name; raise DataError with all that is wrong.

    prompt.json contains `edit`, and `input`, `output` (captions) and `expressive` if they are known. Pairs that differ
    only in their seed share an instruction.
    """
    found: list[EditPair] = []
    problems: list[str] = []
    for file in sorted(root.glob("*/prompt.json")):
        texts = _texts(file, problems)
        sources = _sources(file.parent)
        if not sources:
            problems.append(f"{file.parent}: no picture named SEED_0.jpg")
        for source in sources:
            target = source.with_stem(source.stem[:-1] + "1")
            if not target.is_file():
                problems.append(f"{source}: its pair {target.name} is missing")
            elif texts:
                found.append(_pair(file, source, target, texts))
    if problems:
        raise DataError(problems[:20], 'prompt.json holds {"edit": "make it winter"}')
    return found


def _sources(folder: Path) -> list[Path]:
    """Return the pictures of a folder that are to be edited, by name."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.stem.endswith("_0") and path.suffix.lower() in _ENDINGS:
            found.append(path)
    return found


def _texts(file: Path, problems: list[str]) -> dict[str, Any]:
    """Return the content of a prompt.json; what is wrong is added to the problems."""
    try:
        content = read_json_object(file)
        content.text("edit", empty=False)
        for key in ("input", "output", "expressive"):
            content.text(key, "")
    except DataError as error:
        problems += error.problems
        return {}
    return content.values


def _pair(file: Path, source: Path, target: Path, texts: dict[str, Any]) -> EditPair:
    return EditPair(
        uid=f"{file.parent.name}/{source.stem[:-2]}",
        instruction=texts["edit"].strip(),
        source=partial(load_picture, Picture(source)),
        target=partial(load_picture, Picture(target)),
        digest=picture_content(source, target),
        expressive=texts.get("expressive", "").strip(),
        caption=texts.get("input", "").strip(),
        target_caption=texts.get("output", "").strip(),
        place=str(file),
    )
