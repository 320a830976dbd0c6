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

    prompt.json holds `edit`, and `input`, `output` (captions) and `expressive` if they are known. Pairs that differ
    in their seed alone share an instruction.
    """
    found: list[EditPair] = []
    problems: list[str] = []
    for file in sorted(root.glob("*/prompt.json")):
        told = _told(file, problems)
        before = sorted(
            p
            for p in file.parent.iterdir()
            if p.stem.endswith("_0") and p.suffix.lower() in _ENDINGS
        )
        if not before:
            problems.append(f"{file.parent}: no picture named SEED_0.jpg")
        for source in before:
            target = source.with_stem(source.stem[:-1] + "1")
            if not target.is_file():
                problems.append(f"{source}: its pair {target.name} is missing")
            elif told:
                found.append(_pair(file, source, target, told))
    if problems:
        raise DataError(problems[:20], 'prompt.json holds {"edit": "make it winter"}')
    return found


def _told(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        told = read_json_object(file)
        told.text("edit", empty=False)
        for key in ("input", "output", "expressive"):
            told.text(key, "")
    except DataError as error:
        problems += error.problems
        return {}
    return told.values


def _pair(file: Path, source: Path, target: Path, told: dict[str, Any]) -> EditPair:
    return EditPair(
        uid=f"{file.parent.name}/{source.stem[:-2]}",
        instruction=told["edit"].strip(),
        source=partial(load_picture, Picture(source)),
        target=partial(load_picture, Picture(target)),
        digest=picture_content(source, target),
        expressive=told.get("expressive", "").strip(),
        caption=told.get("input", "").strip(),
        target_caption=told.get("output", "").strip(),
        place=str(file),
    )
