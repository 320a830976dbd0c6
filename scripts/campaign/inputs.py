"""Hostile inputs: valid files and what becomes of them in the hands of an enemy or a bad disk."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# texts that stand for a value where JSON is written; `json.dumps` could not write most of them
LITERALS = (
    "null",
    "true",
    "0",
    "-1",
    "1.5",
    "9" * 4301,
    "1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    '""',
    '" "',
    '"\\u0000"',
    '"\\ud800"',
    '"a\\u001b[31mb"',
    '"[bold]:apple:\\\\"',
    '"../../canary/victim.txt"',
    '"/dev/zero"',
    '"x\\u0000y"',
    "[]",
    "{}",
    "[[]]",
    "[null]",
    '{"":null}',
    "[" * 300 + "]" * 300,
    "[" * 100_000,
    '{"a":' * 200 + "1" + "}" * 200,
    '"' + "x" * 100_000 + '"',
    "-0",
    "1_000",
    "undefined",
    '{"a":1,"a":2}',
    '["a","a"]',
    "10000000000000000000000",
)
MARK = "\x01HERE\x01"  # where a literal goes


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a value, and of the value itself."""
    yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from places(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from places(child, (*path, index))


def changed_json(value: Any, chance: random.Random) -> str:
    """Return a JSON text with one thing changed: a value, a key that is gone, unknown or given twice."""
    path = chance.choice(list(places(value)))
    if not path:
        return chance.choice(LITERALS)
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    last = path[-1]
    kind = chance.randrange(8)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(last) + "x"] = holder.pop(last)
    elif kind == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
    else:
        holder[last] = MARK
    return json.dumps(value).replace(json.dumps(MARK), chance.choice(LITERALS))


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return a file with bytes cut off, flipped, put in or taken out."""
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(8)
    noise = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: data[:at] + noise + data[at:],
        lambda: data[:at] + noise + data[at + len(noise) :],
        lambda: data[:at] + b"\0" * chance.choice((1, 100, 100_000)) + data[at:],
        lambda: b"",
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: data[:at] + b"\n" * chance.choice((1, 100_000)) + data[at:],
        lambda: data * chance.choice((2, 50)),
    )
    return changes[kind]()


def put_strange_file(path: Path, chance: random.Random) -> str:
    """Put something that is no plain file in the place of a file; return what it is."""
    path.unlink(missing_ok=True)
    kinds: dict[str, Callable[[], Any]] = {
        "a FIFO": lambda: os.mkfifo(path),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a link to /dev/tty": lambda: path.symlink_to("/dev/tty"),
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a folder": lambda: path.mkdir(),
        "a socket": lambda: _socket(path),
        "1 TiB of nothing": lambda: _sparse(path, 1 << 40),
        "100 MiB of nothing": lambda: _sparse(path, 100 << 20),
        "gzip of 300 MiB": lambda: path.write_bytes(_bomb()),
        "many empty lists": lambda: path.write_bytes(
            b"[" + b"[]," * 8_000_000 + b"[]]"
        ),
        "many lines": lambda: path.write_bytes(b"0\n" * 2_000_000),
        "no file": lambda: None,
    }
    kind = chance.choice(list(kinds))
    kinds[kind]()
    return kind


def _socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name[:90])
    finally:
        os.chdir(before)


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _bomb() -> bytes:
    part = gzip.compress(b"\0" * (10 << 20))
    return part * 30  # gzip files may follow each other
