"""Records from JSON, JSON lines and CSV, each with its file and line; what cannot be read is named and passed over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError
from mmedit_cli.reading import (
    MOST_VALUES,
    PACKED,
    count_of_values,
    json_item,
    parse_json,
    read_csv,
    read_lines,
    read_text,
)

FORMATS = (".jsonl", ".json", ".csv", ".tsv")  # each of them may also be gzipped
Record = tuple[str, Any]  # "file:line", what stands there
_MOST_PROBLEMS = 1000  # a file with more of them is not what it was taken for


def form(path: Path) -> str:
    """Return which of FORMATS a file is in by its name, as `.jsonl` for `cases.jsonl.gz`; or what else it ends in."""
    name = path.name.lower().removesuffix(PACKED)
    return Path(name).suffix


def read_records(path: Path, problems: list[str]) -> Iterator[Record]:
    """Yield the records of a file with their places; a record that cannot be read goes to `problems`.

    JSON is one array of records, JSON lines one record a line, CSV a header and one record a row. Reading ends where
    there are very many problems. Raises DataError for a file that cannot be read at all.
    """
    reader = {".json": _json, ".csv": read_csv, ".tsv": _tabs}.get(form(path), _lines)
    for record in reader(path, problems):
        yield record
        if len(problems) > _MOST_PROBLEMS:
            return


def _tabs(path: Path, problems: list[str]) -> Iterator[Record]:
    yield from read_csv(path, problems, delimiter="\t")


def _lines(path: Path, problems: list[str]) -> Iterator[Record]:
    for number, line in read_lines(path):
        if line.strip():
            place = f"{path}:{number}"
            try:
                record = parse_json(line, place)
            except DataError as error:
                problems += error.problems
                if len(problems) > _MOST_PROBLEMS:
                    return
                continue
            yield place, record


def _json(path: Path, problems: list[str]) -> Iterator[Record]:
    """Decode the array item by item, so that each has its line and the good ones before a fault are not lost."""
    text = read_text(path)
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        problems.append(f"{path}: must be an array of records")
        return
    if count_of_values(text) > MOST_VALUES:
        problems.append(
            f"{path}: more than {MOST_VALUES:,} values (JSON lines have no such bound)"
        )
        return
    line = 1
    counted = 0
    end = "["
    while True:
        start = _skip(text, at + 1)
        line = line + text.count("\n", counted, start)
        counted = start
        if text[start : start + 1] == "]" and end == "[":
            return
        try:
            record, stop = json_item(text, start)
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}; is the file cut off?")
            return
        yield f"{path}:{line}", record
        at = _skip(text, stop)
        end = text[at : at + 1]
        if end == "]":
            return
        if end != ",":
            problems.append(
                f"{path}:{line}: not valid JSON (no comma or bracket after the record)"
            )
            return


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
