"""The folders of InstructPix2Pix, which MGIE uses too: ID/prompt.json, and ID/SEED_0.jpg with ID/SEED_1.jpg."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError
from mmedit_cli.image_pairs.base import EditPair, file_digest
from mmedit_cli.pictures import Picture, load_picture

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
        before = sorted(p for p in file.parent.iterdir() if p.stem.endswith("_0") and p.suffix.lower() in _ENDINGS)
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
        told = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(told["edit"], str) or not told["edit"].strip():
            raise ValueError("edit is empty")
        if not all(isinstance(told.get(key, ""), str) for key in ("input", "output", "expressive")):
            raise ValueError("input, output and expressive are texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{file}: no instruction in it ({type(error).__name__}: {error})")
        return {}
    return dict(told)


def _pair(file: Path, source: Path, target: Path, told: dict[str, Any]) -> EditPair:
    return EditPair(
        uid=f"{file.parent.name}/{source.stem[:-2]}",
        instruction=told["edit"].strip(),
        source=partial(load_picture, Picture(source)),
        target=partial(load_picture, Picture(target)),
        digest=file_digest(source, target),
        expressive=told.get("expressive", "").strip(),
        caption=told.get("input", "").strip(),
        target_caption=told.get("output", "").strip(),
        place=str(file),
    )
