"""Which cases are used: those of a list, and those whose pictures are there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError
from mmedit_cli.reading import read_json_object
from mmedit_cli.types import EditCase, Query

FAMILIES = ("generality", "locality", "portability", "needs")
_MOST_IMAGES = 20
Subset = Mapping[str, list[str]]  # case id -> columns that are left out of it


def change(case: EditCase, edit: Callable[[Query], Query | None]) -> EditCase:
    """Return the case with `edit` applied to each query; a probe for which it returns None is left out."""
    families: dict[str, Any] = {}
    for family in FAMILIES:
        columns = {}
        for name, queries in getattr(case, family).items():
            changed = [edit(query) for query in queries]
            left = tuple(query for query in changed if query is not None)
            if left:
                columns[name] = left
        families[family] = columns
    request = edit(case.request) or case.request
    return replace(case, request=request, **families)


class Pictures:
    """Looks for every distinct picture once; `missing` are those that are not there, with the first place of each."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.missing: dict[Path, str] = {}
        self._there: dict[Path, bool] = {}
        self._cases = 0
        self._queries: Counter[str] = Counter()

    def check(self, case: EditCase) -> EditCase | None:
        """Return the case, without the probes whose picture is missing if these are skipped.

        None if it is the picture of the request that is missing.
        """
        gone: Counter[str] = Counter()
        for column, queries in case.columns():
            place = f"{case.place}: {_key(column)}"
            for query in queries:
                if query.image is not None and not self._look(query.image, place):
                    gone[column] += 1
        if not gone or not self.skip:
            return case
        if case.request.image in self.missing:
            self._cases += 1
            return None
        self._queries += gone

        def if_there(query: Query) -> Query | None:
            return None if query.image in self.missing else query

        return change(case, if_there)

    def _look(self, image: Path, place: str) -> bool:
        if image not in self._there:
            # `os.path` answers False for a name that no file can have; `Path` raises
            self._there[image] = os.path.isfile(image)
            if not self._there[image]:
                self.missing[image] = place
        return self._there[image]

    def problems(self, data: str | Path) -> list[str]:
        """Return one line for each of a few missing pictures, one with the counts for many."""
        if self.skip:
            return []
        lines = []
        for image, place in self.missing.items():
            lines.append(f"{place}: {image}: no such image")
        if len(lines) <= _MOST_IMAGES:
            return lines
        return [f"{data}: {self.count()}; the first: {lines[0]}"]

    def count(self) -> str:
        """Return how many pictures are missing, in words."""
        return f"{len(self.missing):,} of {len(self._there):,} images are missing"

    def skipped(self) -> dict[str, Any]:
        """Return what was left out, as plain values for a report; empty if nothing was."""
        if not self.skip or not self.missing:
            return {}
        skipped = {
            "cases": self._cases,
            "queries": dict(self._queries),
            "missing_images": len(self.missing),
            "images": len(self._there),
        }
        return {"skipped": skipped}


def _key(column: str) -> str:
    return "request.image" if column == "reliability" else f"{column}.image"


def read_subset(path: Path) -> Subset:
    """Return the list of cases in a file; raise DataError if it is none."""
    hint = 'give `clean`, or a file of a list of cases: {"cases": {id: [columns]}}'
    kept = read_json_object(path, hint=hint).record("cases")
    return {uid: kept.array(uid, str) for uid in kept.values}


def _without(case: EditCase, columns: Collection[str]) -> EditCase:
    """Return the case without the columns that are named."""
    families: dict[str, Any] = {}
    for family in FAMILIES:
        families[family] = {
            name: queries
            for name, queries in getattr(case, family).items()
            if f"{family}.{name}" not in columns
        }
    return replace(case, **families)


def select(cases: Iterable[EditCase], kept: Subset) -> Iterator[EditCase]:
    """Yield the cases that are in the list, without the columns it names.

    Raises DataError if the data end before all of them were met.
    """
    wanted = set(kept)
    for case in cases:
        if case.uid in wanted:
            wanted.remove(case.uid)
            yield _without(case, kept[case.uid])
    if wanted:
        some = ", ".join(sorted(wanted)[:3])
        raise DataError(
            f"--subset: {len(wanted)} of its cases are not in the data ({some})",
            "it is for other data",
        )
