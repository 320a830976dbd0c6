"""Cases and plain requests from records: read strictly, whatever is wrong is named with its place and key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmedit_cli.errors import near_miss
from mmedit_cli.knowledge.data.shared.files import read_records
from mmedit_cli.types import EditCase, Query

FORMAT = (
    "a record needs `id` and `request`: {prompt, target, image}, or as a plain request `prompt`, `target` and "
    "`image`; see docs/data.md"
)
_FAMILIES = ("generality", "locality", "portability", "needs")
_CASE_KEYS = ("id", "type", "request", *_FAMILIES)
_QUERY_KEYS = ("prompt", "target", "image", "background")
_REPHRASES = {
    "rephrase": "text",
    "image_rephrase": "image",
}  # key of a plain request -> column of generality
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\Z")


class CaseReader:
    """Reads one file; `problems` collects what is wrong with it. Images lie under `images`, or beside the file."""

    def __init__(
        self, path: Path, problems: list[str], images: Path | None = None
    ) -> None:
        self.path, self.root, self.problems = path, images or path.parent, problems
        self.place = str(path)
        self._first: dict[str, str] = {}
        self._real_root = self.root.resolve()

    def cases(self) -> Iterator[EditCase]:
        """Yield the good records; the bad ones go to `problems`."""
        for number, (place, record) in enumerate(
            read_records(self.path, self.problems), 1
        ):
            self.place = place
            before = len(self.problems)
            plain = (
                isinstance(record, Mapping)
                and "request" not in record
                and ({"prompt", "target"} & record.keys())
            )
            case = self._request(record, str(number)) if plain else self._case(record)
            if case is not None and len(self.problems) == before:
                yield case

    def _add(self, key: str, message: str) -> None:
        self.problems.append(
            f"{self.place}: {key}: {message}" if key else f"{self.place}: {message}"
        )

    def _case(self, record: Any) -> EditCase | None:
        if not self._mapping(record, "", _CASE_KEYS, ("id", "request")):
            return None
        uid, kind = self._uid(record["id"]), record.get("type", "")
        if not isinstance(kind, str):
            self._add("type", "must be a text")
        request = self._query(record["request"], "request")
        probes = {key: self._probes(record.get(key, {}), key) for key in _FAMILIES}
        return (
            None
            if request is None
            else EditCase(uid, request, type=kind, place=self.place, **probes)
        )

    def _request(self, record: Mapping[str, Any], number: str) -> EditCase | None:
        """Read a plain request: a query with, optionally, an id and other wordings or pictures of the same fact.

        These are lists or single texts; in a table several columns may begin with the name (`rephrase1`, `rephrase2`).
        """
        listed = {
            name: next((key for key in _REPHRASES if _names(name, key)), "")
            for name in record
        }
        known = (*_QUERY_KEYS, "id", *_REPHRASES)
        own = {name: value for name, value in record.items() if not listed[name]}
        if not self._mapping(own, "", known, ("prompt", "target")):
            return None
        uid = self._uid(own.pop("id", number))
        request = self._query(own, "")
        generality: dict[str, tuple[Query, ...]] = {}
        for name, value in record.items():
            if request is None or not listed[name] or value in ("", []):
                continue
            changed = "prompt" if listed[name] == "rephrase" else "image"
            values = value if isinstance(value, list) else [value]
            read = [
                self._query({**own, changed: v}, f"{name}[{i}]")
                for i, v in enumerate(values)
            ]
            column = _REPHRASES[listed[name]]
            generality[column] = (
                *generality.get(column, ()),
                *(query for query in read if query is not None),
            )
        return (
            None
            if request is None
            else EditCase(uid, request, generality, place=self.place)
        )

    def _uid(self, uid: Any) -> str:
        if not isinstance(uid, str) or not uid:
            self._add("id", "must be a text")
            return ""
        if uid in self._first:
            first = self._first[uid]
            self._add(
                "id", f"{uid!r} stands in line {first.rpartition(':')[2]} already"
            )
        self._first.setdefault(uid, self.place)
        return uid

    def _probes(self, value: Any, key: str) -> dict[str, tuple[Query, ...]]:
        if not isinstance(value, dict):
            self._add(key, "must map names to lists of queries")
            return {}
        probes = {}
        for name, queries in value.items():
            if not isinstance(queries, list) or not queries:
                self._add(f"{key}.{name}", "must be a list of at least one query")
                continue
            read = [
                self._query(query, f"{key}.{name}[{i}]")
                for i, query in enumerate(queries)
            ]
            probes[name] = tuple(query for query in read if query is not None)
        return probes

    def _query(self, record: Any, key: str) -> Query | None:
        if not self._mapping(record, key, _QUERY_KEYS, ("prompt", "target")):
            return None
        before = len(self.problems)
        inside = f"{key}." if key else ""
        for name in ("prompt", "target"):
            if not isinstance(record[name], str) or not record[name].strip():
                self._add(f"{inside}{name}", "must be a text that is not empty")
        background = record.get("background", "#ffffff")
        if not isinstance(background, str) or not _COLOUR.match(background):
            self._add(
                f"{inside}background",
                f"must be a colour such as #cfe8ff, not {background!r}",
            )
        image = self._image(record.get("image"), f"{inside}image")
        return (
            Query(record["prompt"], record["target"], image, background)
            if len(self.problems) == before
            else None
        )

    def _image(self, value: Any, key: str) -> Path | None:
        if value is None:
            return None
        if isinstance(value, list):
            self._add(key, "one image a query; several are not supported")
            return None
        if not isinstance(value, str) or not value or "\0" in value:
            self._add(key, "must be a path")
            return None
        if PurePosixPath(value).is_absolute() or not Path(
            os.path.realpath(self.root / value)
        ).is_relative_to(self._real_root):
            self._add(key, f"{value} lies outside the folder {self.root}")
            return None
        return self.root / value

    def _mapping(
        self, value: Any, key: str, known: Sequence[str], needed: Sequence[str]
    ) -> bool:
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


def _names(name: str, key: str) -> bool:
    """Whether a column is one of those that hold `key`: rephrase, rephrases, rephrase1, rephrase_2, ..."""
    return re.fullmatch(rf"{key}(s|_?\d+)?", name) is not None
