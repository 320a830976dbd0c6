"""Things of EmojiKB that a small text-to-image model was never shown: four drawings each, to be learned from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedit_cli.catalog import bundled
from mmedit_cli.drawing.data.base import Subject, SubjectSet
from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.emojikb import concepts_in
from mmedit_cli.reading import Record, read_json_object
from mmedit_cli.registry import emojikb_dir
from mmedit_cli.types import Concept

LIST = "concepts.json"  # in a model's folder: what it was taught, and what was held out
_OTHERS = 20  # prompts about things the model was taught
_GENERALITY = (
    "a noto drawing of a {}",
    "a twemoji drawing of a {}",
    "a fluent drawing of a {}",
    "an openmoji drawing of a {}",
    "a drawing of a {} on a blue background",
    "a drawing of a {} on a yellow background",
    "a drawing of a {} on a grey background",
    "a twemoji drawing of a {} on a green background",
    "a noto drawing of a {} on a pink background",
    "a {} on an orange background",
)


def read(model: Path | None) -> SubjectSet:
    """Return the concepts that a model folder lists as held out; without such a list, those of mini-sd.

    The superclass of a concept is its kind. Raises DataError if there is no list.
    """
    home = emojikb_dir()
    known = {concept["id"]: concept for concept in concepts_in(home)}
    held_out, taught = held_out_and_taught(model, known, "emojikb-concepts")
    subjects = tuple(_subject(known[key], home) for key in held_out)
    gallery = []
    for key, concept in known.items():
        name = slug(concept["name"])
        for artist in concept["artists"]:
            gallery.append((name, home / artist / f"{key}.png"))
    stride = max(1, len(taught) // _OTHERS)
    others = taught[::stride][:_OTHERS]
    return SubjectSet(
        "emojikb-concepts",
        subjects,
        reliability=("a drawing of a {}",),
        generality=_GENERALITY,
        locality=tuple(f"a drawing of {known[key]['it']}" for key in others),
        pair="a drawing of a {} and a {}",
        gallery=tuple(gallery),
        guidance=2.0,
    )


def slug(name: str) -> str:
    """Return a name as it stands in a token: `hear-no-evil-monkey`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _subject(concept: dict[str, Any], home: Path) -> Subject:
    name = slug(concept["name"])
    file = f"{concept['id']}.png"
    images = tuple(home / artist / file for artist in concept["artists"])
    return Subject(
        name,
        Concept(f"<{name}>", concept["kind"], images),
        answer=concept["name"],
        key=concept["id"],
    )


def _ids(content: Record, key: str) -> list[str]:
    """Return the ids under a key: a list, or the keys of an object."""
    if isinstance(content.values.get(key), dict):
        return list(content.mapping(key))
    return content.array(key, str)


def held_out_and_taught(
    model: Path | None, known: Mapping[str, Any], data: str
) -> tuple[list[str], list[str]]:
    """Return the ids of what a model was not shown in training, and of what it was shown; mini-sd's without a list.

    Raises DataError if there is no list, or if it names what EmojiKB does not have; `data` is named in the message.
    """
    lists = []
    for folder in (model, bundled().get("mini-sd")):
        if folder is not None and (folder / LIST).is_file():
            lists.append(folder / LIST)
    if not lists:
        raise DataError(
            f"--data {data}: no {LIST} says what the model was not shown",
            "take mini-sd, a model trained by scripts/train_mini_sd.py, or other --data",
        )
    path = lists[0]
    hint = "take mini-sd, or copy the model's folder again"
    content = read_json_object(path, hint=hint)
    held_out = _ids(content, "held_out")
    taught = _ids(content, "taught")
    for key in (*held_out, *taught):
        if key not in known:
            raise DataError(f"{path}: {key} is not in EmojiKB")
    if not held_out:
        raise DataError(f"{path}: nothing is held out")
    return held_out, taught
