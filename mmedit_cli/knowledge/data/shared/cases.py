"""Cases and plain requests from records: read strictly, whatever is wrong is named with its place and key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedit_cli.errors import near_miss
from mmedit_cli.knowledge.data.shared.files import read_records
from mmedit_cli.types import EditCase, Query

FORMAT = (
    "a record needs `id` and `request`: {prompt, target, image}, or as a plain request `prompt`, `target` and "
    "`image`; see docs/data.md"
)
_FAMILIES = ("generality", "locality", "portability", "needs")
_CASE_KEYS = ("id", "type", "concept", "request", *_FAMILIES)
_QUERY_KEYS = ("prompt", "target", "image", "background")
# key of a plain request -> column of generality
_REPHRASES = {"rephrase": "text", "image_rephrase": "image"}
# other names of the keys of a plain request, as tables of others have them
_SYNONYMS = {
    "question": "prompt",
    "query": "prompt",
    "answer": "target",
    "new_answer": "target",
    "target_new": "target",
    "image_path": "image",
    "picture": "image",
    "rephrase_prompt": "rephrase",
}
# keys of EasyEdit's JSON for vision-language models: the same as of MMEdit's releases
_OF_EASYEDIT = (
    *("src", "pred", "rephrase", "alt", "image", "image_rephrase"),
    *("loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a", "id"),
)
_SHORTEST_MISSPELT = 5  # letters: of shorter names most others are akin
_ALIKE = 0.8  # share of letters in their order; one letter of five may be another
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\Z")


class CaseReader:
    """Reads one file; `problems` collects what is wrong with it. Images lie under `images`, or beside the file.

    `ignored` are the keys of plain requests, and of records of EasyEdit, that mean nothing here.
    """

    def __init__(
        self, path: Path, problems: list[str], images: Path | None = None
    ) -> None:
        self.ignored: dict[str, None] = {}
        self.path = path
        self.root = images or path.parent
        self.problems = problems
        self.place = str(path)
        self._first: dict[str, str] = {}
        self._real_root = self.root.resolve()

    def cases(self) -> Iterator[EditCase]:
        """Yield the good records; the bad ones go to `problems`."""
        records = read_records(self.path, self.problems)
        for number, (place, record) in enumerate(records, 1):
            self.place = place
            before = len(self.problems)
            record = self._renamed(record)
            if _is_plain_request(record):
                case = self._request(record, str(number))
            elif _is_of_easyedit(record):
                case = self._of_easyedit(record, str(number))
            else:
                case = self._case(record)
            if case is not None and len(self.problems) == before:
                yield case

    def _add(self, key: str, message: str) -> None:
        self.problems.append(
            f"{self.place}: {key}: {message}" if key else f"{self.place}: {message}"
        )

    def _renamed(self, record: Any) -> Any:
        """Return a plain request with the keys of this project; two names of one key go to the problems."""
        if not isinstance(record, Mapping) or "request" in record:
            return record
        renamed: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for name, value in record.items():
            words = name.strip().lower()
            key = _SYNONYMS.get(words) or name
            if words in _QUERY_KEYS:
                key = words
            if key in renamed:
                self._add("", f"{spelled[key]} and {name} both say {key}: keep one")
                continue
            renamed[key] = value
            spelled[key] = name
        return renamed

    def _case(self, record: Any) -> EditCase | None:
        if not self._mapping(record, "", _CASE_KEYS, ("id", "request")):
            return None
        uid = self._uid(record["id"])
        kind = self._text(record, "type")
        concept = self._text(record, "concept")
        request = self._query(record["request"], "request")
        probes: dict[str, Any] = {}
        for family in _FAMILIES:
            probes[family] = self._probes(record.get(family, {}), family)
        if request is None:
            return None
        return EditCase(
            uid,
            request,
            type=kind,
            place=self.place,
            concept=concept,
            **probes,
        )

    def _text(self, record: Mapping[str, Any], key: str) -> str:
        """Return a text that need not be there."""
        value = record.get(key, "")
        if isinstance(value, str):
            return value
        self._add(key, "must be a text")
        return ""

    def _request(self, record: Mapping[str, Any], number: str) -> EditCase | None:
        """Read a plain request: a query with, optionally, an id and other wordings or pictures of the same fact.

        These are lists or single texts; in a table several columns may begin with the name (`rephrase1`, `rephrase2`).
        """
        own = {}
        rephrased = {}
        for name, value in record.items():
            if _rephrases(name):
                rephrased[name] = value
            else:
                own[name] = value
        known = (*_QUERY_KEYS, "id", "concept", *_REPHRASES)
        own = self._without_others(own, known)
        if not self._mapping(own, "", known, ("prompt", "target")):
            return None
        uid = self._uid(own.pop("id", number))
        concept = self._text(own, "concept")
        own.pop("concept", None)
        request = self._query(own, "")
        if request is None:
            return None
        generality: dict[str, tuple[Query, ...]] = {}
        for name, value in rephrased.items():
            if value in ("", []):
                continue
            column = _REPHRASES[_rephrases(name)]
            read = self._variants(own, name, value)
            generality[column] = (*generality.get(column, ()), *read)
        return EditCase(
            uid,
            request,
            generality,
            place=self.place,
            concept=concept,
        )

    def _of_easyedit(self, record: Mapping[str, Any], number: str) -> EditCase | None:
        """Read a record of EasyEdit: src and alt are the request; what else is there becomes probes."""
        record = self._without_others(record, _OF_EASYEDIT)
        given = {
            name: value for name, value in record.items() if value not in ("", [], None)
        }
        request = self._asked(given, "src", "alt", "image")
        generality = {}
        locality = {}
        if "rephrase" in given:
            generality["text"] = self._asked(given, "rephrase", "alt", "image")
        if "image_rephrase" in given:
            generality["image"] = self._asked(given, "src", "alt", "image_rephrase")
        if "loc" in given:
            locality["text"] = self._asked(given, "loc", "loc_ans", "")
        if "m_loc" in given:
            locality["image"] = self._asked(given, "m_loc_q", "m_loc_a", "m_loc")
        uid = self._uid(given.get("id", number))
        if not request:
            return None
        (taught,) = request
        return EditCase(uid, taught, generality, locality, place=self.place)

    def _asked(
        self, record: Mapping[str, Any], prompt: str, target: str, image: str
    ) -> tuple[Query, ...]:
        """Return the query that stands under three keys of a record; nothing if it cannot be used."""
        before = len(self.problems)
        for key in (prompt, target):
            if key not in record:
                self._add("", f"{key} is missing")
                continue
            value = record[key]
            if not isinstance(value, str) or not value.strip():
                self._add(key, "must be a text that is not empty")
        picture = self._image(record.get(image), image)
        if len(self.problems) > before:
            return ()
        return (Query(record[prompt], record[target], picture),)

    def _without_others(
        self, record: Mapping[str, Any], known: Sequence[str]
    ) -> dict[str, Any]:
        """Return a record without keys that mean nothing here; one that looks misspelt goes to the problems."""
        kept = {}
        for name, value in record.items():
            if name in known:
                kept[name] = value
                continue
            meant = _misspelt(name, (*known, *_SYNONYMS))
            if meant:
                self._add("", f"unknown key {name!r} (did you mean {meant}?)")
            else:
                self.ignored[name] = None
        return kept

    def _variants(
        self, own: Mapping[str, Any], name: str, value: Any
    ) -> Iterator[Query]:
        """Yield the request with the other wordings, or the other pictures, of a column."""
        changed = "prompt" if _rephrases(name) == "rephrase" else "image"
        values = value if isinstance(value, list) else [value]
        for index, other in enumerate(values):
            query = self._query({**own, changed: other}, f"{name}[{index}]")
            if query is not None:
                yield query

    def _uid(self, uid: Any) -> str:
        if not isinstance(uid, str) or not uid:
            self._add("id", "must be a text")
            return ""
        if uid in self._first:
            _, _, line = self._first[uid].rpartition(":")
            self._add("id", f"{uid!r} stands in line {line} already")
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
            read = []
            for index, record in enumerate(queries):
                query = self._query(record, f"{key}.{name}[{index}]")
                if query is not None:
                    read.append(query)
            probes[name] = tuple(read)
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
        if len(self.problems) > before:
            return None
        return Query(
            record["prompt"],
            record["target"],
            image,
            background,
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
        if _ADDRESS.match(value):
            self._add(key, f"{value} is an address: download it and name the file")
            return None
        image = self.root / value
        real = Path(os.path.realpath(image))
        if not real.is_relative_to(self._real_root):
            self._add(key, f"{value} lies outside the folder {self.root}")
            return None
        return image

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


def _is_plain_request(record: Any) -> bool:
    """Whether a record is a query that is taught, and not a case with probes."""
    if not isinstance(record, Mapping) or "request" in record:
        return False
    return "prompt" in record or "target" in record


def _is_of_easyedit(record: Any) -> bool:
    """Whether a record is one of EasyEdit's."""
    if not isinstance(record, Mapping) or "request" in record:
        return False
    return "src" in record or "alt" in record


def _misspelt(name: str, known: Iterable[str]) -> str:
    """Return the key that a name differs from by about one letter, or nothing."""
    if len(name) < _SHORTEST_MISSPELT:
        return ""
    of_that_length = [key for key in known if abs(len(key) - len(name)) <= 1]
    found = difflib.get_close_matches(name.lower(), of_that_length, 1, _ALIKE)
    return found[0] if found else ""


def _rephrases(name: str) -> str:
    """Return which of _REPHRASES a column holds (`rephrase` for rephrases, rephrase1, rephrase_2, ...), or nothing."""
    for key in _REPHRASES:
        if re.fullmatch(rf"{key}(s|_?\d+)?", name):
            return key
    return ""
