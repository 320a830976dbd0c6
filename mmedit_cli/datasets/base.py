"""EditCases from JSON lines: read strictly, every bad record named with its file and line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.registry import datasets
from mmedit_cli.types import EditCase, Query

_HELP = "give a folder with a cases.jsonl, a .jsonl file of cases, or the name of a data set of `mmedit list`"
_FORMAT = "a record needs `id` and `request`: {prompt, target, image}; see docs/data.md"
_CASE_KEYS = ("id", "type", "request", "generality", "locality", "portability")
_QUERY_KEYS = ("prompt", "target", "image", "background")
_MOST_PROBLEMS = 20
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\Z")


@dataclass(frozen=True)
class Dataset:
    """A data set with a name: its folder, the file of each split, and how the folder is audited.

    `audit` returns counts, licences, and under `problems` one line for each thing that is wrong.
    """

    folder: Path
    splits: Mapping[str, str]
    default: str
    audit: Callable[[Path], dict[str, Any]]

    def file(self, split: str) -> Path:
        """Return the case file of a split (empty: the default one); raise DataError if there is none."""
        if split and split not in self.splits:
            problem = f"--data {self.folder.name}:{split}: no such split{near_miss(split, self.splits)}"
            raise DataError(problem, f"it has {', '.join(self.splits)}")
        path = self.folder / self.splits[split or self.default]
        if not path.is_file():
            raise DataError(f"{path}: not there", "the data come with a checkout of the repository")
        return path


def find_dataset(data: str | Path) -> Dataset | None:
    """Return the data set of that name (a split may follow after a colon), or None: then it is a path."""
    name = str(data).partition(":")[0]
    return None if Path(data).exists() or name not in datasets.names() else datasets.get(name)


def find_cases(data: str | Path) -> Path:
    """Return the file of cases for a path or a name such as `emojikb` or `emojikb:val`; raise DataError if none."""
    dataset = find_dataset(data)
    if dataset is not None:
        return dataset.file(str(data).partition(":")[2])
    path = Path(data)
    if path.is_dir():
        path = path / "cases.jsonl"
    if not path.is_file():
        raise DataError(
            f"--data {data}: no such file, folder or data set{near_miss(str(data), datasets.names())}", _HELP
        )
    return path


def load_cases(data: str | Path, *, limit: int | None = None) -> list[EditCase]:
    """Return the cases of a data set, folder or file, in file order, at most `limit`.

    Images are named relative to the folder of the file and must lie in it; they are not opened here. Raises DataError
    with every bad record (at most 20), its line and its key.
    """
    path = find_cases(data)
    reader = _Reader(path)
    cases = []
    for case in reader.cases():
        cases.append(case)
        if limit is not None and len(cases) + len(reader.problems) >= limit:
            break
    if reader.problems:
        more = len(reader.problems) - _MOST_PROBLEMS
        rest = [f"{path}: and {more} more problems"] if more > 0 else []
        raise DataError([*reader.problems[:_MOST_PROBLEMS], *rest], _FORMAT)
    if not cases:
        raise DataError(f"{path}: no cases in it", _FORMAT)
    return cases


def fingerprint(cases: Iterable[EditCase]) -> str:
    """Return a digest of all texts and of the content of all images; raise DataError if an image is gone."""
    digest, images = hashlib.sha256(), {}
    for case in cases:
        for column, queries in case.columns():
            for query in queries:
                if query.image is not None and query.image not in images:
                    images[query.image] = _digest(query.image, case)
                picture = images.get(query.image) if query.image is not None else None
                line = [case.uid, case.type, column, query.prompt, query.target, picture, query.background]
                digest.update(json.dumps(line, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def _digest(image: Path, case: EditCase) -> str:
    try:
        with image.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{case.place}: {image}: no such image") from error


class _Reader:
    """Reads one file and collects what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, path.parent
        self.problems: list[str] = []
        self.place = str(path)
        self._first: dict[str, int] = {}

    def cases(self) -> Iterator[EditCase]:
        """Yield the good records; the bad ones go to `problems`."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 (byte {error.start})", "save it as UTF-8") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            self.place = f"{self.path}:{number}"
            before = len(self.problems)
            case = self._case(line, number)
            if case is not None and len(self.problems) == before:
                yield case

    def _add(self, key: str, message: str) -> None:
        self.problems.append(f"{self.place}: {key}: {message}" if key else f"{self.place}: {message}")

    def _case(self, line: str, number: int) -> EditCase | None:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            self._add("", f"not valid JSON ({error})")
            return None
        if not self._mapping(record, "", _CASE_KEYS, ("id", "request")):
            return None
        uid = record["id"]
        if not isinstance(uid, str) or not uid:
            self._add("id", "must be a text")
            return None
        if uid in self._first:
            self._add("id", f"{uid!r} stands in line {self._first[uid]} already")
        self._first.setdefault(uid, number)
        kind = record.get("type", "")
        if not isinstance(kind, str):
            self._add("type", "must be a text")
        request = self._query(record["request"], "request")
        probes = {key: self._probes(record.get(key, {}), key) for key in ("generality", "locality", "portability")}
        return None if request is None else EditCase(uid, request, type=kind, place=self.place, **probes)

    def _probes(self, value: Any, key: str) -> dict[str, tuple[Query, ...]]:
        if not isinstance(value, dict):
            self._add(key, "must map names to lists of queries")
            return {}
        probes = {}
        for name, queries in value.items():
            if not isinstance(queries, list) or not queries:
                self._add(f"{key}.{name}", "must be a list of at least one query")
                continue
            read = [self._query(query, f"{key}.{name}[{i}]") for i, query in enumerate(queries)]
            probes[name] = tuple(query for query in read if query is not None)
        return probes

    def _query(self, record: Any, key: str) -> Query | None:
        if not self._mapping(record, key, _QUERY_KEYS, ("prompt", "target")):
            return None
        before = len(self.problems)
        for name in ("prompt", "target"):
            if not isinstance(record[name], str) or not record[name].strip():
                self._add(f"{key}.{name}", "must be a text that is not empty")
        background = record.get("background", "#ffffff")
        if not isinstance(background, str) or not _COLOUR.match(background):
            self._add(f"{key}.background", f"must be a colour such as #cfe8ff, not {background!r}")
        image = self._image(record.get("image"), f"{key}.image")
        return Query(record["prompt"], record["target"], image, background) if len(self.problems) == before else None

    def _image(self, value: Any, key: str) -> Path | None:
        if value is None:
            return None
        if isinstance(value, list):
            self._add(key, "one image a query; several are not supported")
            return None
        if not isinstance(value, str) or not value:
            self._add(key, "must be a path")
            return None
        if PurePosixPath(value).is_absolute() or not (self.root / value).resolve().is_relative_to(self.root.resolve()):
            self._add(key, f"{value} lies outside the folder {self.root}")
            return None
        path = self.root / value
        if not path.is_file():
            self._add(key, f"{path}: no such image")
        return path

    def _mapping(self, value: Any, key: str, known: Sequence[str], needed: Sequence[str]) -> bool:
        if not isinstance(value, Mapping):
            self._add(key, "must be an object with keys")
            return False
        for name in value:
            if name not in known:
                self._add(key, f"unknown key {name!r}{near_miss(name, known)}")
        missing = [name for name in needed if name not in value]
        if missing:
            self._add(key, f"{', '.join(missing)} is missing")
        return not missing
