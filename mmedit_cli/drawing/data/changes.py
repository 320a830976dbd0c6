"""Many concept edits from a file: a record each, with what is to be drawn otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.knowledge.data.shared.files import FORMATS, form, read_records
from mmedit_cli.types import ConceptChange

KEYS = ("prompt", "target", "keep")
_SHOWN = 20  # problems that are printed
_EXAMPLE = 'e.g. {"prompt": "a rose", "target": "a blue rose", "keep": "a tulip, a daisy"}; no target: erased'


def read_changes(path: Path) -> tuple[ConceptChange, ...]:
    """Return the edits of a .csv, .tsv, .json or .jsonl file; raise DataError with all that is wrong with it."""
    if form(path) not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(f"{path}: not one of {known}", _EXAMPLE)
    problems: list[str] = []
    changes = []
    for place, record in read_records(path, problems):
        try:
            change = _change(place, record)
            changes.append(change)
        except DataError as error:
            problems += error.problems
    if not changes and not problems:
        problems.append(f"{path}: no edits in it")
    if problems:
        raise DataError(problems[:_SHOWN], _EXAMPLE)
    return tuple(changes)


def split_texts(texts: str, mark: str) -> tuple[str, ...]:
    """Return the texts that a mark separates, without those that are empty."""
    stripped = [text.strip() for text in texts.split(mark)]
    return tuple(text for text in stripped if text)


def _change(place: str, record: Any) -> ConceptChange:
    if not isinstance(record, dict):
        raise DataError(f"{place}: must be an object with keys", _EXAMPLE)
    for key in record:
        if key not in KEYS:
            raise DataError(
                f"{place}: unknown key {key!r}{near_miss(key, KEYS)}", _EXAMPLE
            )
    prompt = record.get("prompt", "")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{place}: prompt is missing", _EXAMPLE)
    targets = _texts(place, record, "target", "|")
    keep = _texts(place, record, "keep", ",")
    return ConceptChange(prompt.strip(), targets, keep)


def _texts(place: str, record: dict[str, Any], key: str, mark: str) -> tuple[str, ...]:
    """Return the texts of a key: a text with marks between them, or a list."""
    value = record.get(key, "")
    if isinstance(value, str):
        return split_texts(value, mark)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(text.strip() for text in value if text.strip())
    raise DataError(f"{place}: {key}: must be a text or a list of texts", _EXAMPLE)
