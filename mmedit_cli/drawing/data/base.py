"""Sets of subjects: what is learned from which photos, the prompts it is drawn to, and where a set comes from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmedit_cli.errors import DataError
from mmedit_cli.pictures import photos_in, picture_digest
from mmedit_cli.types import Concept

RELIABILITY = ("a photo of a {}",)
GENERALITY = (
    "a {} in the rain", "a {} on a sunny meadow", "a {} in a museum", "a {} on a kitchen table",
    "a {} under water", "a {} at night, lit by a lantern", "a painting of a {}", "a pencil sketch of a {}",
    "a {} made of glass", "a blue {}",
)  # fmt: skip
LOCALITY = (
    "a lighthouse on a cliff", "a bowl of soup with bread", "an old steam locomotive", "a street market",
    "a sailing boat on a calm lake", "a library full of books", "a snowy village at dusk", "a portrait of a sailor",
    "a violin on a chair", "a bicycle against a brick wall", "a field of lavender", "a desk with a typewriter",
    "an astronaut on the moon", "a castle in the mist", "a basket of apples", "a waterfall in a forest",
    "a crowded railway station", "a bridge over a river at night", "a watercolour of a garden", "a hot-air balloon",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """Something to learn; `name` is once in its set, `answer` what everybody calls it (empty: it has no such name).

    `key` is what lists of what a model never saw call it.
    """

    name: str
    concept: Concept
    answer: str = ""
    key: str = ""


@dataclass(frozen=True)
class SubjectSet:
    """Subjects, and prompts with `{}` where the noun stands; `locality` are about other things and have none.

    `special` are prompts for generality by superclass, where the usual ones make no sense. A `gallery` of pictures by
    name is what a drawn picture is compared with to say whose it is (empty: the photos). `guidance` is the scale of
    classifier-free guidance the set is drawn with.
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
        return self.gallery or tuple(
            (s.name, path) for s in self.subjects for path in s.concept.images
        )

    def fingerprint(self) -> str:
        """Return a digest of all texts and of the content of all pictures."""
        texts = [
            self.reliability,
            self.generality,
            self.locality,
            dict(self.special),
            self.pair,
        ]
        for subject in self.subjects:
            texts.append(
                (
                    subject.name,
                    subject.answer,
                    subject.concept.token,
                    subject.concept.superclass,
                )
            )
        photos = [(s.name, path) for s in self.subjects for path in s.concept.images]
        digest = hashlib.sha256(
            json.dumps(texts, sort_keys=True, ensure_ascii=False).encode()
        )
        for name, path in (*photos, *self.gallery):
            digest.update(f"{name}:{picture_digest(path)};".encode())
        return digest.hexdigest()[:16]


def in_plain_words(prompt: str, concepts: Sequence[Concept]) -> str:
    """Return a prompt with the superclass in the place of each token, and the article that goes with it."""
    for concept in concepts:
        an = concept.superclass[:1].lower() in set("aeiou")
        prompt = re.sub(
            rf"\b([Aa])n? (?={re.escape(concept.token)})",
            r"\1n " if an else r"\1 ",
            prompt,
        )
        prompt = prompt.replace(concept.token, concept.superclass)
    return prompt


def with_article(words: str) -> str:
    """Return `a cat`, `an owl`."""
    return f"{'an' if words[:1].lower() in set('aeiou') else 'a'} {words}"


def photos_of(root: Path, names: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return the photos in the folder of each name below `root`; raise DataError naming every one without."""
    found, problems = {}, []
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
