"""A user's own edit pairs: a JSONL file with source, target, instruction and, if known, expressive and captions."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path

from mmedit_cli.errors import DataError
from mmedit_cli.picture_editing.data.base import EditPair, picture_content
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.reading import Record, parse_json_object, read_lines

_NEEDED = ("source", "target", "instruction")
_TEXTS = ("expressive", "plain", "caption", "target_caption", "kind")
_KNOWN = (*_TEXTS, "id")
_MOST_PROBLEMS = 20


def pairs(file: Path) -> list[EditPair]:
    """Return the pairs of a file in order, pictures named relative to it; raise DataError with every bad line."""
    found: list[EditPair] = []
    problems: list[str] = []
    for number, line in read_lines(file):
        if line.strip() and len(problems) < _MOST_PROBLEMS:
            place = f"{file}:{number}"
            try:
                record = parse_json_object(line, place)
                _check(record, file.parent)
                found.append(_pair(record.values, file.parent, place, number))
            except DataError as error:
                problems += error.problems
    counts = Counter(pair.uid for pair in found)
    for uid, count in counts.items():
        if count > 1:
            problems.append(f"{file}: the id {uid!r} stands more than once")
    if problems:
        raise DataError(
            problems, 'a line is {"source": ..., "target": ..., "instruction": ...}'
        )
    return found


def _check(record: Record, folder: Path) -> None:
    """Raise DataError for what is wrong with a record."""
    record.only(*_NEEDED, *_KNOWN)
    for key in record.values:
        record.text(key)
    for key in _NEEDED:
        record.text(key, empty=False)
    for key in ("source", "target"):
        name = record.text(key)
        # Unlike Path.is_file, it is also False for a name that no file can have.
        if not os.path.isfile(folder / name):
            record.fail(key, f"{name}: no such image")


def _pair(record: dict[str, str], folder: Path, place: str, number: int) -> EditPair:
    source = folder / record["source"]
    target = folder / record["target"]
    texts = {key: record.get(key, "").strip() for key in _TEXTS}
    return EditPair(
        uid=record.get("id") or str(number),
        instruction=record["instruction"].strip(),
        source=partial(load_picture, Picture(source)),
        target=partial(load_picture, Picture(target)),
        digest=picture_content(source, target),
        place=place,
        **texts,
    )
