"""Sets of subjects: the photos that each is learned from, and the prompts that it is drawn with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError
from mmedit_cli.pictures import photos_in, picture_digest
from mmedit_cli.types import Concept

RELIABILITY = ("a photo of a {}",)
GENERALITY = (
    "a {} in the rain",
    "a {} on a sunny meadow",
    "a {} in a museum",
    "a {} on a kitchen table",
    "a {} under water",
    "a {} at night, lit by a lantern",
    "a painting of a {}",
    "a pencil sketch of a {}",
    "a {} made of glass",
    "a blue {}",
)
LOCALITY = (
    "a lighthouse on a cliff",
    "a bowl of soup with bread",
    "an old steam locomotive",
    "a street market",
    "a sailing boat on a calm lake",
    "a library full of books",
    "a snowy village at dusk",
    "a portrait of a sailor",
    "a violin on a chair",
    "a bicycle against a brick wall",
    "a field of lavender",
    "a desk with a typewriter",
    "an astronaut on the moon",
    "a castle in the mist",
    "a basket of apples",
    "a waterfall in a forest",
    "a crowded railway station",
    "a bridge over a river at night",
    "a watercolour of a garden",
    "a hot-air balloon",
)


@dataclass(frozen=True)
class Subject:
    """Something to learn; `name` is unique in its set.

    `answer` is what everybody calls it, empty if it has no such name. `key` is its id in the lists of what a model has
    not seen in training.
    """

    name: str
    concept: Concept
    answer: str = ""
    key: str = ""


@dataclass(frozen=True)
class SubjectSet:
    """Subjects, and prompts with `{}` where the noun stands; `locality` prompts are about other things and have none.

    `special` are generality prompts by superclass, for subjects that the usual ones do not suit. `gallery` holds
    pictures by name: a drawn picture shows the name of the nearest one (empty: the photos are the gallery).
    `guidance` is the scale of classifier-free guidance that the set is drawn with.
    """

    name: str
    subjects: tuple[Subject, ...]
    reliability: tuple[str, ...] = RELIABILITY
    generality: tuple[str, ...] = GENERALITY
    locality: tuple[str, ...] = LOCALITY
    special: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pair: str = "a photo of a {} and a {}"
    gallery: tuple[tuple[str, Path], ...] = ()
    guidance: float = 7.5

    def generality_of(self, subject: Subject) -> tuple[str, ...]:
        """Return the prompts that put a subject elsewhere."""
        return self.special.get(subject.concept.superclass, self.generality)

    def pictures(self) -> tuple[tuple[str, Path], ...]:
        """Return (name, picture) of everything a drawn picture is compared with."""
        return self.gallery or self.photos()

    def photos(self) -> tuple[tuple[str, Path], ...]:
        """Return (name of the subject, photo) of all photos."""
        found = []
        for subject in self.subjects:
            found += [(subject.name, path) for path in subject.concept.images]
        return tuple(found)

    def fingerprint(self) -> str:
        """Return a digest of all texts and of the content of all pictures."""
        texts: list[Any] = [
            self.reliability,
            self.generality,
            self.locality,
            dict(self.special),
            self.pair,
        ]
        for subject in self.subjects:
            concept = subject.concept
            described = (
                subject.name,
                subject.answer,
                concept.token,
                concept.superclass,
            )
            texts.append(described)
        text = json.dumps(texts, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode())
        for name, path in (*self.photos(), *self.gallery):
            line = f"{name}:{picture_digest(path)};"
            digest.update(line.encode())
        return digest.hexdigest()[:16]


def in_plain_words(prompt: str, concepts: Sequence[Concept]) -> str:
    """Return a prompt with each token replaced by its superclass, and the article that goes with it."""
    for concept in concepts:
        article = r"\1n " if _begins_with_vowel(concept.superclass) else r"\1 "
        before_token = rf"\b([Aa])n? (?={re.escape(concept.token)})"
        prompt = re.sub(before_token, article, prompt)
        prompt = prompt.replace(concept.token, concept.superclass)
    return prompt


def with_article(words: str) -> str:
    """Return `a cat`, `an owl`."""
    article = "an" if _begins_with_vowel(words) else "a"
    return f"{article} {words}"


def _begins_with_vowel(words: str) -> bool:
    return words[:1].lower() in set("aeiou")


def photos_of(root: Path, names: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return the photos in the folder of each name below `root`; raise DataError naming every folder without any."""
    found: dict[str, tuple[Path, ...]] = {}
    problems: list[str] = []
    for name in names:
        try:
            found[name] = photos_in(root / name)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(
            problems[:20], "each subject has a folder of three to six photos"
        )
    return found
