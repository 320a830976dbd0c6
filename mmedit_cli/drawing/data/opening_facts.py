"""Open a set of facts about what a model draws, by its name and split."""

from __future__ import annotations

from pathlib import Path

from mmedit_cli.drawing.data import emojikb_facts, fact_tables
from mmedit_cli.drawing.data.facts import FactSet
from mmedit_cli.errors import DataError, near_miss

# the splits of each set, its usual one first
SPLITS = {emojikb_facts.NAME: emojikb_facts.SPLITS, **fact_tables.SPLITS}


def is_facts(data: str) -> bool:
    """Whether data of that name are facts about what a model draws."""
    return data.partition(":")[0] in SPLITS


def open_facts(
    data: str,
    *,
    root: Path | None = None,
    model: Path | None = None,
    limit: int | None = None,
) -> FactSet:
    """Return the facts of NAME or NAME:SPLIT, at most `limit`.

    `root` is the file or folder of a published table. The folder of the `model` lists what it was taught to draw.
    Raises DataError with all that is wrong.
    """
    name, _, split = data.partition(":")
    if name not in SPLITS:
        names = list(SPLITS)
        near = near_miss(name, names)
        raise DataError(
            f"--data {data}: no facts about drawings{near}",
            f"give {', '.join(names)}",
        )
    splits = SPLITS[name]
    split = split or splits[0]
    if split not in splits:
        near = near_miss(split, splits)
        raise DataError(
            f"--data {data}: no split {split}{near}", f"there are: {', '.join(splits)}"
        )
    if name != emojikb_facts.NAME:
        return fact_tables.read(name, split, root).first(limit)
    return emojikb_facts.read(model, split).first(limit)
