"""TIMED (Orgad et al. 2023) and RoAD (Arad et al. 2024): tables of facts about what a text-to-image model draws.

Neither has a licence, so the files are the user's: TIMED's are in bahjat-kawar/time-diffusion, RoAD's in
technion-cs-nlp/ReFACT. Fields are named as there, without regard to capitals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmedit_cli.drawing.data.facts import (
    EFFICACY,
    GENERALITY,
    SPECIFICITY,
    DrawnFact,
    DrawnProbe,
    FactSet,
)
from mmedit_cli.errors import DataError
from mmedit_cli.reading import read_csv
from mmedit_cli.registry import data_home
from mmedit_cli.types import ConceptChange

TIMED, ROAD = "timed", "road"
_TIMED_FILES = {
    "test": "TIMED_test_set.csv",
    "filtered": "TIMED_test_set_filtered_SD14.csv",
    "validation": "TIMED_validation_set.csv",
}
# of a table that is named by what it holds: the word in its name that says it is for validation
_VALIDATION = "valid"
SPLITS = {TIMED: tuple(_TIMED_FILES), ROAD: ("test", "validation")}
_PROMPTS = 5  # of each sort in a row
_SHOWN = 20  # problems that are printed
_HINTS = {
    TIMED: "put the files of bahjat-kawar/time-diffusion in a folder and name it with --root",
    ROAD: "put the RoAD files of technion-cs-nlp/ReFACT in a folder and name it, or a file, with --root",
}
Row = Mapping[str, str]


def read(name: str, split: str, root: Path | None) -> FactSet:
    """Return the facts of a split of a table; raise DataError with all that is wrong with its file.

    `root` is the file, or the folder it lies in; None is the folder of downloads.
    """
    path = _locate(name, split, root)
    columns = _COLUMNS[name]
    fact_of = _FACTS[name]
    problems: list[str] = []
    facts: list[DrawnFact] = []
    for place, record in read_csv(path, problems):
        row = _row(record)
        missing = [column for column in columns if not row.get(column)]
        if missing:
            problems.append(f"{place}: {missing[0]} is missing")
        else:
            facts.append(fact_of(f"{len(facts):03d}", row))
    if problems or not facts:
        raise DataError(problems[:_SHOWN] or f"{path}: no rows in it", _HINTS[name])
    called = name if split == "test" else f"{name}:{split}"
    return FactSet(called, tuple(facts))


def _row(record: Mapping[str, object]) -> Row:
    """Return the texts of a row by the name of their column, in small letters."""
    row = {}
    for key, value in record.items():
        row[key.strip().lower()] = str(value or "").strip()
    return row


def _locate(name: str, split: str, root: Path | None) -> Path:
    """Return the file of a split; raise DataError if there is none, or if it cannot be told from others."""
    home = root or data_home() / name
    if home.is_file():
        return home
    if name == TIMED:
        path = home / _TIMED_FILES[split]
        if path.is_file():
            return path
        raise DataError(
            f"--data {name}: no {path.name} in {home}",
            _HINTS[name],
        )
    found = []
    for path in sorted(home.glob("*.csv")):
        called = path.name.lower()
        is_validation = _VALIDATION in called
        if is_validation == (split == "validation") and _has_columns(path, name):
            found.append(path)
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(
            f"--data {name}: no table of it for {split} in {home}", _HINTS[name]
        )
    names = ", ".join(path.name for path in found)
    raise DataError(
        f"--data {name}: {len(found)} tables in {home}: {names}",
        "name the file with --root",
    )


def _has_columns(path: Path, name: str) -> bool:
    """Whether the first row of a table has the columns of a data set."""
    for _, record in read_csv(path, []):
        return set(_COLUMNS[name]) <= set(_row(record))
    return False


def _timed(name: str, row: Row) -> DrawnFact:
    """A row of TIMED: the prompt is drawn as another, and so are five that name it, but not five others."""
    probes = [_compared(EFFICACY, row["old"], row["new"], row["old"])]
    for i in range(1, _PROMPTS + 1):
        positive = row[f"positive{i}"]
        probes.append(_compared(GENERALITY, positive, row[f"gt{i}"], positive))
    probes += _negatives(row, "gn{}")
    change = ConceptChange(row["old"], (row["new"],))
    return DrawnFact(name, TIMED, change, tuple(probes))


def _road(name: str, row: Row) -> DrawnFact:
    """A row of RoAD: a role, or an appearance, is another's; `old` and `new` say what pictures are compared with."""
    probes = [_compared(EFFICACY, row["prompt"], row["new"], row["old"])]
    for i in range(1, _PROMPTS + 1):
        probe = _compared(
            GENERALITY,
            row[f"positive{i}"],
            row[f"positive_new{i}"],
            row[f"positive_old{i}"],
        )
        probes.append(probe)
    probes += _negatives(row, "negative_new{}")
    change = ConceptChange(row["prompt"], (row["new"],))
    return DrawnFact(name, row["type"].lower(), change, tuple(probes))


def _negatives(row: Row, changed: str) -> list[DrawnProbe]:
    """Return probes of what is to stay: a picture fits its own prompt better than the changed one."""
    probes = []
    for i in range(1, _PROMPTS + 1):
        negative = row[f"negative{i}"]
        other = row[changed.format(i)]
        probes.append(_compared(SPECIFICITY, negative, negative, other))
    return probes


def _compared(column: str, prompt: str, wanted: str, other: str) -> DrawnProbe:
    return DrawnProbe(
        column,
        prompt,
        needs="" if column == SPECIFICITY else wanted,
        texts=(wanted, other),
    )


def _numbered(*names: str) -> Sequence[str]:
    return [f"{name}{i}" for name in names for i in range(1, _PROMPTS + 1)]


_COLUMNS = {
    TIMED: ["old", "new", *_numbered("positive", "gt", "negative", "gn")],
    ROAD: [
        *("type", "prompt", "old", "new"),
        *_numbered("positive", "positive_old", "positive_new"),
        *_numbered("negative", "negative_new"),
    ],
}
_FACTS = {TIMED: _timed, ROAD: _road}
