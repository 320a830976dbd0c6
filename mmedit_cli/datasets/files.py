"""Records from JSON, JSON lines and CSV, each with its file and line; what cannot be read is named and passed over."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError

FORMATS = (".jsonl", ".json", ".csv")
Record = tuple[str, Any]  # "file:line", what stands there
PACKED = ".gz"  # each of them may also be gzipped
_DELIMITERS = (",", ";", "\t")  # what spreadsheets write
_LARGEST = 2**31  # bytes of an unpacked file


def form(path: Path) -> str:
    """Return which of FORMATS a file is in by its name, as `.jsonl` for `cases.jsonl.gz`; or what else it ends in."""
    name = path.name.lower().removesuffix(PACKED)
    return Path(name).suffix


def read_text(path: Path) -> str:
    """Return the text of a file, unpacked if it is gzipped.

    Raises DataError if it cannot be read, is not UTF-8, or is no gzip file though it is called one.
    """
    try:
        if path.suffix.lower() != PACKED:
            data = path.read_bytes()
        else:
            with gzip.open(path) as stream:
                data = stream.read(_LARGEST)
                if stream.read(1):
                    raise DataError(f"{path}: more than {_LARGEST >> 30} GiB unpacked", "split it into smaller files")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})", "pack it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_records(path: Path, problems: list[str]) -> Iterator[Record]:
    """Yield the records of a file with their places; a record that cannot be read goes to `problems`.

    JSON is one array of records, JSON lines one record a line, CSV a header and one record a row. Raises DataError for
    a file that `read_text` cannot read.
    """
    reader = {".json": _json, ".csv": _csv}.get(form(path), _lines)
    yield from reader(path, read_text(path), problems)


def _lines(path: Path, text: str, problems: list[str]) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                problems.append(f"{path}:{number}: not valid JSON ({error})")


def _json(path: Path, text: str, problems: list[str]) -> Iterator[Record]:
    """Decode the array item by item, so that each has its line and the good ones before a fault are not lost."""
    decoder, at = json.JSONDecoder(), _skip(text, 0)
    if text[at : at + 1] != "[":
        problems.append(f"{path}: must be an array of records")
        return
    line, counted, end = 1, 0, "["
    while True:
        start = _skip(text, at + 1)
        line, counted = line + text.count("\n", counted, start), start
        if text[start : start + 1] == "]" and end == "[":
            return
        try:
            record, stop = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(f"{path}:{getattr(error, 'lineno', line)}: not valid JSON ({error}); is the file cut off?")
            return
        yield f"{path}:{line}", record
        at = _skip(text, stop)
        end = text[at : at + 1]
        if end == "]":
            return
        if end != ",":
            problems.append(f"{path}:{line}: not valid JSON (no comma or bracket after the record)")
            return


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _csv(path: Path, text: str, problems: list[str]) -> Iterator[Record]:
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(_DELIMITERS, key=header.count), strict=True)
    done = 1  # a quoted cell may hold line breaks: a record begins where the one before it ended
    try:
        names = [name.strip() for name in rows.fieldnames or ()]
        rows.fieldnames = names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"{path}:1: column {', '.join(twice)} stands twice")
            return
        for row in rows:
            place, done = f"{path}:{done + 1}", rows.line_num
            if None in row:
                problems.append(f"{place}: more cells than the header has columns (put quotes around a comma)")
            else:
                yield place, {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        problems.append(f"{path}:{done + 1}: not valid CSV ({error})")
