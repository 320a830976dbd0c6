"""The one reader: every file that a user or a third party wrote is opened, bounded, decoded and type-checked here.

Whatever is wrong with a file becomes one error that names the file, the line where it is known, and the way out. A
file must be a regular one: a FIFO would block for ever, and a device never ends. Sizes, depth, numbers and the count
of values are bounded, so no file takes more than a few hundred MiB or a few seconds.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import os
import re
import reprlib
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from mmedit_cli.errors import DataError, MmeditError, near_miss

ErrorType = type[MmeditError]

PACKED = ".gz"  # files of text may also be gzipped
LARGEST_TEXT = (
    48 << 20
)  # bytes of a file that is decoded as a whole: four bytes a character may be needed in memory
LARGEST_DATA = 512 << 20  # bytes, unpacked, of a file that is read line by line
LARGEST_LINE = 16 << 20
LARGEST_QUESTION = 100_000  # characters of a line of stdin
LARGEST_PICTURE = (
    256 << 20
)  # bytes of an image file: enough for the most pixels that are decoded
LARGEST_YAML = 1 << 20  # YAML is slow, and these files are written by hand
MOST_LINES = 5_000_000
MOST_VALUES = (
    4_000_000  # in one JSON text: an empty list takes 2 bytes on disk and 64 in memory
)
DEEPEST = 64
LONGEST_INTEGER = 64  # digits; tokenizers write 10**30 where they mean "no limit"
LONGEST_NUMBER = 1000  # characters of a number with a point
_HEADER_BYTES = 8  # the length that a safetensors file begins with
_LARGEST_HEADER = 32 << 20
_DELIMITERS = (",", ";", "\t")  # what spreadsheets write
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


# -- bytes --------------------------------------------------------------------------------------------------------


def require_regular(
    path: Path, *, error: ErrorType = DataError, hint: str = ""
) -> os.stat_result:
    """Return the status of a regular file (links are followed); raise `error` for anything else.

    Nothing is opened, so it never blocks. Call it before a path is given to a library that opens it.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as missing:
        raise error(f"{path}: no such file", hint) from missing
    except (OSError, ValueError) as refused:  # ValueError: a NUL in the name
        raise error(f"{path}: cannot be read: {_reason(refused)}", hint) from refused
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise error(
            f"{path}: is {kind}, not a file",
            hint or "give a regular file: save its content to one first",
        )
    return status


@contextmanager
def open_regular(
    path: Path, *, error: ErrorType = DataError, hint: str = ""
) -> Iterator[BinaryIO]:
    """Open a regular file for reading bytes; raise `error` if it is none, or if reading fails within the block."""
    require_regular(path, error=error, hint=hint)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            # it may have been replaced in between
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise error(f"{path}: is not a regular file", hint)
            yield file
    except OSError as refused:
        raise error(f"{path}: cannot be read: {_reason(refused)}", hint) from refused


def read_bytes(
    path: Path,
    *,
    limit: int = LARGEST_TEXT,
    error: ErrorType = DataError,
    hint: str = "",
) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; raise `error` otherwise."""
    with open_regular(path, error=error, hint=hint) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:  # what is too large is not read at all
            raise error(f"{path}: larger than {_size(limit)}", hint)
        data = file.read(limit + 1) or b""
    if len(data) > limit:
        raise error(f"{path}: larger than {_size(limit)}", hint)
    return data


def digest_of(
    path: Path, *, limit: int, error: ErrorType = DataError, hint: str = ""
) -> str:
    """Return the SHA-256 of a regular file of at most `limit` bytes; raise `error` otherwise."""
    with open_regular(path, error=error, hint=hint) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path}: larger than {_size(limit)}", hint)
        digest = hashlib.file_digest(cast(Any, file), "sha256")
    return digest.hexdigest()


# -- text ---------------------------------------------------------------------------------------------------------


def read_text(
    path: Path,
    *,
    limit: int = LARGEST_TEXT,
    error: ErrorType = DataError,
    hint: str = "",
) -> str:
    """Return the text of a UTF-8 file, unpacked if its name ends in .gz; raise `error` if it is none."""
    with _unpacked(path, error, hint) as file:
        data = file.read(limit + 1) or b""
    if len(data) > limit:
        raise error(
            f"{path}: larger than {_size(limit)}",
            hint or "give JSON lines, which are read one by one",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        raise error(
            f"{path}:{line}: not UTF-8 (byte {fault.start})", hint or "save it as UTF-8"
        ) from fault


def read_lines(
    path: Path, *, error: ErrorType = DataError, hint: str = ""
) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end) of a UTF-8 file, unpacked if its name ends in .gz.

    Only one line is in memory. Raises `error` with the line for what is not UTF-8, too long or too many.
    """
    total = 0
    with _unpacked(path, error, hint) as file:
        number = 0
        while data := file.readline(LARGEST_LINE + 1):
            number += 1
            total += len(data)
            if len(data) > LARGEST_LINE:
                raise error(
                    f"{path}:{number}: a line longer than {_size(LARGEST_LINE)}", hint
                )
            if total > LARGEST_DATA or number > MOST_LINES:
                bound = f"{_size(LARGEST_DATA)} or {MOST_LINES:,} lines"
                raise error(
                    f"{path}:{number}: more than {bound} (unpacked)",
                    hint or "split it into smaller files",
                )
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as fault:
                message = f"{path}:{number}: not UTF-8 (byte {fault.start} of the line)"
                raise error(message, hint or "save it as UTF-8") from fault
            yield number, text.removesuffix("\n").removesuffix("\r")


def read_stdin() -> Iterator[str]:
    """Yield the lines of stdin without blanks around them; raise DataError for what is too long or not text."""
    if sys.stdin is None:
        return
    while True:
        try:
            line = sys.stdin.readline(LARGEST_QUESTION + 1)
        except UnicodeDecodeError as fault:
            raise DataError(
                f"stdin: not UTF-8 (byte {fault.start})", "send text"
            ) from fault
        if len(line) > LARGEST_QUESTION:
            raise DataError(
                f"stdin: a line longer than {LARGEST_QUESTION:,} characters",
                "send a question a line",
            )
        if not line:
            return
        yield line.strip()


@contextmanager
def _unpacked(path: Path, error: ErrorType, hint: str) -> Iterator[BinaryIO]:
    with open_regular(path, error=error, hint=hint) as file:
        if path.suffix.lower() != PACKED:
            yield file
            return
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                yield cast(BinaryIO, stream)
        except (gzip.BadGzipFile, EOFError, zlib.error) as fault:
            raise error(
                f"{path}: not a whole gzip file ({fault})", hint or "pack it again"
            ) from fault


# -- JSON ---------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """What is wrong with a text that is otherwise valid; `literal` is where to look for the line."""

    def __init__(self, message: str, literal: str = "") -> None:
        super().__init__(message)
        self.literal = literal


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = _first_repeated([key for key, _ in pairs])
        raise _Refused(f"the key {shown(twice)} stands twice")
    return found


def _first_repeated(keys: list[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("every key stands once")


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise _Refused(f"a whole number of {len(text):,} digits", text)
    return int(text)


def _number(text: str) -> float:
    value = float(text) if len(text) <= LONGEST_NUMBER else math.inf
    if not math.isfinite(value):
        raise _Refused(f"the number {shorten(text)} is out of range", text)
    return value


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is no JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_number,
    parse_constant=_constant,
)


def parse_json(
    text: str | bytes,
    place: str,
    *,
    halves: bool = False,
    error: ErrorType = DataError,
    hint: str = "",
) -> Any:
    """Return the value that a JSON text holds; raise `error` naming `place` ("file:line") if it is none.

    `halves` allows halves of characters (lone surrogates): so Python spells file names that are not UTF-8, and so the
    program's own records name them.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as fault:
            raise error(f"{place}: not UTF-8 (byte {fault.start})", hint) from fault
    return _whole_json(text, lambda line: place, error, hint, halves=halves)


def parse_json_object(
    text: str | bytes,
    place: str,
    *,
    halves: bool = False,
    error: ErrorType = DataError,
    hint: str = "",
) -> Record:
    """Return the object that a JSON text holds, ready to be asked for its fields; raise `error` otherwise."""
    return Record(
        parse_json(text, place, halves=halves, error=error, hint=hint),
        place,
        error=error,
        hint=hint,
    )


def read_json(
    path: Path, *, halves: bool = False, error: ErrorType = DataError, hint: str = ""
) -> Any:
    """Return the value that a JSON file holds; raise `error` with the file and the line if it cannot be read."""
    text = read_text(path, error=error, hint=hint)
    return _whole_json(
        text,
        lambda line: f"{path}:{line}" if line else str(path),
        error,
        hint,
        halves=halves,
    )


def read_json_object(
    path: Path, *, halves: bool = False, error: ErrorType = DataError, hint: str = ""
) -> Record:
    """Return the object that a JSON file holds, ready to be asked for its fields; raise `error` otherwise."""
    return Record(
        read_json(path, halves=halves, error=error, hint=hint),
        str(path),
        error=error,
        hint=hint,
    )


def json_item(text: str, start: int) -> tuple[Any, int]:
    """Return (value, where it ends) of the JSON value that begins at `start`; raise ValueError in one line."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        if text.count("[", start, end) + text.count(
            "{", start, end
        ) > DEEPEST or _ESCAPED_SURROGATE.search(text, start, end):
            check_values(value)
    except json.JSONDecodeError as fault:
        raise ValueError(
            f"not valid JSON ({fault.msg} in line {fault.lineno}, column {fault.colno})"
        ) from fault
    except RecursionError as fault:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from fault
    except _Refused as fault:
        raise ValueError(str(fault)) from fault
    return value, end


def count_of_values(text: str) -> int:
    """Return at most how many values a JSON text holds."""
    return text.count(",") + text.count("[") + text.count("{")


def _whole_json(
    text: str, place: Any, error: ErrorType, hint: str, *, halves: bool
) -> Any:
    """Return the value of a text; `place` maps a line (0: not known) to what an error names."""
    if count_of_values(text) > MOST_VALUES:
        raise error(f"{place(0)}: more than {MOST_VALUES:,} values", hint)
    try:
        value = _DECODER.decode(text)
        if text.count("[") + text.count("{") > DEEPEST or _ESCAPED_SURROGATE.search(
            text
        ):
            check_values(value, halves=halves)
    except json.JSONDecodeError as fault:
        raise error(
            f"{place(fault.lineno)}: not valid JSON ({fault.msg}, column {fault.colno})",
            hint,
        ) from fault
    except RecursionError as fault:
        raise error(f"{place(0)}: nested deeper than {DEEPEST} levels", hint) from fault
    except _Refused as fault:
        line = text.count("\n", 0, text.find(fault.literal)) + 1 if fault.literal else 0
        raise error(f"{place(line)}: {fault}", hint) from fault
    return value


def check_values(value: Any, *, halves: bool = False) -> None:
    """Raise an exception unless a value is at most DEEPEST levels deep and, but for `halves`, can be encoded."""
    check_text = _no_check if halves else _check_text
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > DEEPEST:
            raise _Refused(f"nested deeper than {DEEPEST} levels")
        if isinstance(item, str):
            check_text(item)
        elif isinstance(item, dict):
            for key in item:
                check_text(key)
            waiting.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list):
            waiting.extend((child, depth + 1) for child in item)


def _no_check(text: str) -> None:
    pass


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise _Refused(
            f"the text {shown(text)} holds half a character (a lone surrogate)"
        )


# -- JSON lines and CSV -------------------------------------------------------------------------------------------


def read_json_lines(
    path: Path, *, error: ErrorType = DataError, hint: str = ""
) -> Iterator[Record]:
    """Yield the objects of a JSON lines file, each with its place; blank lines are skipped.

    Raises `error` at the first line that is no JSON object.
    """
    for number, line in read_lines(path, error=error, hint=hint):
        if line.strip():
            place = f"{path}:{number}"
            yield parse_json_object(line, place, error=error, hint=hint)


def read_csv(
    path: Path,
    problems: list[str],
    *,
    delimiter: str = "",
    error: ErrorType = DataError,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("file:line", cells by column) of a CSV file with a header; empty cells are left out.

    Without a `delimiter` it is a comma, a semicolon or a tab, whichever the header has most of. A column that stands
    twice, rows with more cells than the header and what is not CSV go to `problems`.
    Raises `error` if the file cannot be read.
    """
    lines = read_lines(path, error=error)
    header = next((line for _, line in lines), "")
    delimiter = delimiter or max(_DELIMITERS, key=header.count)
    rows = csv.reader(_with_ends(header, lines), delimiter=delimiter, strict=True)
    done = 0  # a quoted cell may hold line breaks: a record begins where the one before it ended
    names: list[str] = []
    try:
        for row in rows:
            place, done = f"{path}:{done + 1}", rows.line_num
            if not names:
                names = [name.strip() for name in row]
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    problems.append(f"{place}: column {', '.join(twice)} stands twice")
                    return
            elif len(row) > len(names):
                problems.append(
                    f"{place}: more cells than the header has columns (put quotes around a comma)"
                )
            elif row:
                yield (
                    place,
                    {
                        name: cell
                        for name, cell in zip(names, row, strict=False)
                        if cell
                    },
                )
    except csv.Error as fault:
        problems.append(f"{path}:{done + 1}: not valid CSV ({fault})")


def _with_ends(header: str, lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Yield the lines with their ends, which cells in quotes keep."""
    yield header + "\n"
    for _, line in lines:
        yield line + "\n"


# -- YAML ---------------------------------------------------------------------------------------------------------


def read_yaml(
    path: Path, *, halves: bool = False, error: ErrorType = DataError, hint: str = ""
) -> Any:
    """Return the value that a YAML file holds; raise `error` with the file and the line if it cannot be read.

    Anchors, aliases and tags are refused (they multiply), so are keys that are not text or stand twice. Dates stay
    text.
    """
    text = read_text(path, limit=LARGEST_YAML, error=error, hint=hint)
    return parse_yaml(text, str(path), halves=halves, error=error, hint=hint)


def read_yaml_object(
    path: Path, *, error: ErrorType = DataError, hint: str = ""
) -> Record:
    """Return the mapping that a YAML file holds, ready to be asked for its fields; raise `error` otherwise."""
    return Record(
        read_yaml(path, error=error, hint=hint), str(path), error=error, hint=hint
    )


def parse_yaml(
    text: str,
    file: str,
    *,
    halves: bool = False,
    error: ErrorType = DataError,
    hint: str = "",
) -> Any:
    """Return the value that a YAML text holds; raise `error` with the file and the line otherwise."""
    from mmedit_cli.reading_yaml import YamlFault, load

    try:
        value = load(text, DEEPEST, LONGEST_INTEGER)
        check_values(value, halves=halves)
    except YamlFault as fault:
        place = f"{file}:{fault.line}" if fault.line else file
        raise error(f"{place}: {fault}", hint) from fault
    except _Refused as fault:
        raise error(f"{file}: {fault}", hint) from fault
    return value


# -- safetensors --------------------------------------------------------------------------------------------------


def read_tensor_header(
    path: Path, *, error: ErrorType = DataError, hint: str = ""
) -> tuple[Record, dict[str, str]]:
    """Return (what the header says of each tensor, the metadata) of a safetensors file; raise `error` otherwise.

    No tensor is read, and torch is not imported.
    """
    with open_regular(path, error=error, hint=hint) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        if size < _HEADER_BYTES or not 2 <= length <= min(
            size - _HEADER_BYTES, _LARGEST_HEADER
        ):
            raise error(f"{path}: not a safetensors file, or cut off", hint)
        header = file.read(length)
    record = parse_json_object(header, f"{path}: header", error=error, hint=hint)
    metadata = record.mapping("__metadata__", {})
    tensors = {
        name: value for name, value in record.values.items() if name != "__metadata__"
    }
    about = Record(tensors, record.place, error=error, hint=hint)
    for name in tensors:
        about.record(name)
    texts = Record(metadata, f"{path}: header: __metadata__", error=error, hint=hint)
    return about, {name: texts.text(name) for name in metadata}


@contextmanager
def open_tensors(
    path: Path, *, error: ErrorType = DataError, hint: str = ""
) -> Iterator[Any]:
    """Open a safetensors file as `safetensors.safe_open` does; raise `error` if it is none or damaged."""
    from safetensors import SafetensorError, safe_open

    read_tensor_header(path, error=error, hint=hint)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as fault:
        raise error(f"{path}: damaged: {fault}", hint) from fault


# -- fields -------------------------------------------------------------------------------------------------------

_NEEDED: Any = object()


class Record:
    """A mapping that was read. Each field is asked for with its type; what is wrong names the place and the key.

    `values` is the mapping itself. A field without a default must be there.
    """

    def __init__(
        self,
        value: Any,
        place: str,
        *,
        key: str = "",
        error: ErrorType = DataError,
        hint: str = "",
    ) -> None:
        self.place = place
        self.key = key
        self.error = error
        self.hint = hint
        if not isinstance(value, dict):
            start = f"{place}: {key}" if key else place
            raise error(
                f"{start}: expected an object with keys, got {shown(value)}", hint
            )
        self.values: dict[str, Any] = value

    def __contains__(self, key: object) -> bool:
        return key in self.values

    def fail(self, key: str, message: str) -> NoReturn:
        """Raise the error of this record about one of its keys (empty: about the record)."""
        dotted = ".".join(part for part in (self.key, key) if part)
        raise self.error(
            f"{self.place}: {dotted}: {message}"
            if dotted
            else f"{self.place}: {message}",
            self.hint,
        )

    def only(self, *known: str) -> None:
        """Raise unless every key is one of those known."""
        for key in self.values:
            if key not in known:
                self.fail("", f"unknown key {shown(key)}{near_miss(key, known)}")

    def text(self, key: str, default: Any = _NEEDED, *, empty: bool = True) -> str:
        """Return a text; `empty` allows it to be blank."""
        value = self._value(key, default)
        if value is default:
            return cast(str, value)
        if not isinstance(value, str):
            self._wrong(key, "a text", value)
        if not empty and not value.strip():
            self.fail(key, "must be a text that is not empty")
        return value

    def path(self, key: str, default: Any = _NEEDED) -> str:
        """Return a text that may name a file: not empty unless it is the default, and without a NUL."""
        value = self.text(key, default)
        named = bool(value) and "\0" not in value
        if value is not default and not named:
            self._wrong(key, "the name of a file", value)
        return value

    def integer(
        self,
        key: str,
        default: Any = _NEEDED,
        *,
        low: int = -(2**63),
        high: int = 2**63 - 1,
    ) -> int:
        """Return a whole number from `low` to `high`."""
        value = self._value(key, default)
        if value is default:
            return cast(int, value)
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(key, "a whole number", value)
        if not low <= value <= high:
            self._wrong(key, f"a whole number from {low} to {high}", value)
        return value

    def number(self, key: str, default: Any = _NEEDED) -> float:
        """Return a finite number."""
        value = self._value(key, default)
        if value is default:
            return cast(float, value)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            self._wrong(key, "a number", value)
        return value

    def flag(self, key: str, default: Any = _NEEDED) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if value is not default and not isinstance(value, bool):
            self._wrong(key, "true or false", value)
        return cast(bool, value)

    def array(self, key: str, kind: type = object, default: Any = _NEEDED) -> list[Any]:
        """Return a list whose items are all of one Python type."""
        value = self._value(key, default)
        if value is default:
            return cast("list[Any]", value)
        if not isinstance(value, list):
            self._wrong(key, "a list", value)
        takes_flags = kind in (bool, object)  # a bool is an int to Python
        for index, item in enumerate(value):
            is_flag = isinstance(item, bool) and not takes_flags
            if is_flag or not isinstance(item, kind):
                wanted = _WORDS.get(kind, kind.__name__)
                self._wrong(f"{key}[{index}]", wanted, item)
        return value

    def mapping(self, key: str, default: Any = _NEEDED) -> Mapping[str, Any]:
        """Return a mapping."""
        value = self._value(key, default)
        if value is not default and not isinstance(value, dict):
            self._wrong(key, "an object with keys", value)
        return cast("Mapping[str, Any]", value)

    def record(self, key: str, default: Any = _NEEDED) -> Record:
        """Return a mapping, ready to be asked for its own fields."""
        return self._inner(key, dict(self.mapping(key, default)))

    def records(self, key: str, default: Any = _NEEDED) -> list[Record]:
        """Return a list of mappings, each ready to be asked for its own fields."""
        return [
            self._inner(f"{key}[{i}]", item)
            for i, item in enumerate(self.array(key, dict, default))
        ]

    def _inner(self, key: str, value: Any) -> Record:
        dotted = ".".join(part for part in (self.key, key) if part)
        return Record(value, self.place, key=dotted, error=self.error, hint=self.hint)

    def _value(self, key: str, default: Any) -> Any:
        if key in self.values:
            return self.values[key]
        if default is _NEEDED:
            self.fail("", f"{key} is missing{near_miss(key, self.values)}")
        return default

    def _wrong(self, key: str, wanted: str, value: Any) -> NoReturn:
        self.fail(key, f"expected {wanted}, got {shown(value)}")


_WORDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    dict: "an object with keys",
}


def whole_number(text: str) -> int | None:
    """Return the number that a text of at most 18 digits stands for, None for any other text."""
    return (
        int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None
    )


def shorten(text: str, most: int = 40) -> str:
    """Return a text of at most `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: Any) -> str:
    """Say in a few characters what stands in a file."""
    if isinstance(value, dict):
        return "an object with keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    return (
        shorten(reprlib.repr(value))
        if not isinstance(value, bool)
        else str(value).lower()
    )


def _reason(refused: Exception) -> str:
    return (
        (refused.strerror or str(refused))
        if isinstance(refused, OSError)
        else str(refused)
    )


def _size(limit: int) -> str:
    return f"{limit >> 20} MiB"
