"""Edit pairs of one's own: a JSONL file with source, target, instruction and, if known, expressive and captions."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.image_pairs.base import EditPair, file_digest
from mmedit_cli.pictures import Picture, load_picture

_NEEDED = ("source", "target", "instruction")
_TEXTS = ("expressive", "plain", "caption", "target_caption", "kind")
_KNOWN = (*_TEXTS, "id")


def pairs(file: Path) -> list[EditPair]:
    """Return the pairs of a file in order, pictures named relative to it; raise DataError with every bad line."""
    found: list[EditPair] = []
    problems: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            place = f"{file}:{number}"
            try:
                record = json.loads(line)
                fault = _fault(record, file.parent)
            except ValueError as error:
                fault = f"not JSON ({error})"
            if fault:
                problems.append(f"{place}: {fault}")
            else:
                found.append(_pair(record, file.parent, place, number))
    twice = [uid for uid, count in Counter(pair.uid for pair in found).items() if count > 1]
    problems += [f"{file}: the id {uid!r} stands more than once" for uid in twice]
    if problems:
        raise DataError(problems[:20], 'a line is {"source": ..., "target": ..., "instruction": ...}')
    return found


def _fault(record: Any, folder: Path) -> str:
    """Return what is wrong with a record, or an empty text."""
    if not isinstance(record, dict):
        return "not a JSON object"
    for key, value in record.items():
        if key not in (*_NEEDED, *_KNOWN):
            return f"unknown key {key!r}{near_miss(key, (*_NEEDED, *_KNOWN))}"
        if not isinstance(value, str):
            return f"{key}: expected text, got {value!r}"
    for key in _NEEDED:
        if not record.get(key, "").strip():
            return f"no {key}"
    for key in ("source", "target"):
        if not (folder / record[key]).is_file():
            return f"{key}: {record[key]}: no such image"
    return ""


def _pair(record: dict[str, str], folder: Path, place: str, number: int) -> EditPair:
    source, target = folder / record["source"], folder / record["target"]
    return EditPair(
        uid=record.get("id") or str(number),
        instruction=record["instruction"].strip(),
        source=partial(load_picture, Picture(source)),
        target=partial(load_picture, Picture(target)),
        digest=file_digest(source, target),
        place=place,
        **{key: record.get(key, "").strip() for key in _TEXTS},
    )
