"""The plan of an evaluation of a personalizer: subjects, settings, sheets of prompts. No model is loaded for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmedit_cli import registry
from mmedit_cli.catalog import ModelRef, in_cache
from mmedit_cli.drawing.data.base import Subject, SubjectSet, in_plain_words
from mmedit_cli.drawing.data.opening import open_subjects
from mmedit_cli.drawing.workflow.concepts import training_dtype
from mmedit_cli.drawing.workflow.resolving import (
    DrawingEvalOptions,
    named_settings,
    resolve,
)
from mmedit_cli.errors import DataError, UserError
from mmedit_cli.storage import sha256_json
from mmedit_cli.types import Concept

FOLDER = "eval-concepts"  # below the records
DATA = "emojikb-concepts"  # where no data are named
ROUTED = ("routed", "oracle", "always-on")  # sides of a method with a router of its own
# The published encoders, used if they are in the hub's cache.
CLIP = "openai/clip-vit-base-patch32"
DINO = "facebook/dino-vits16"
OWN = "mini-blip2"
KINDS: dict[str, type] = {
    "eval.steps": int,
    "eval.guidance": float,
    "eval.size": int,
    "eval.seeds": int,
    "eval.batch_size": int,
    "eval.clip": str,
    "eval.dino": str,
    "eval.encoder": str,
}


@dataclass(frozen=True)
class DrawingSettings:
    """How pictures are drawn and scored: `seeds` pictures for each prompt, `batch_size` at a time; encoders by name.

    For `clip` and `dino`, `auto` is the published encoder if it is in the hub's cache. For `encoder`, it is mini-blip2
    if there is no other one or the subjects are of EmojiKB. `none` leaves an encoder out.
    """

    steps: int = 25
    guidance: float = 7.5
    size: int | None = None
    seeds: int = 4
    batch_size: int = 8
    clip: str = "auto"
    dino: str = "auto"
    encoder: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "batch_size", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--set eval.{name}={value}: must be above 0")
        size = self.size
        if size is not None and size % 8:
            raise UserError(f"--set eval.size={size}: not a multiple of 8 pixels")

    def resolved(self, *, emoji: bool) -> DrawingSettings:
        """Return the settings with `auto` replaced by the name of an encoder, or by `none`."""
        clip = self.clip
        if clip == "auto":
            clip = CLIP if in_cache(CLIP) else "none"
        dino = self.dino
        if dino == "auto":
            dino = DINO if in_cache(DINO) else "none"
        encoder = self.encoder
        if encoder == "auto":
            no_other = clip == "none" and dino == "none"
            encoder = OWN if emoji or no_other else "none"
        return replace(self, clip=clip, dino=dino, encoder=encoder)


@dataclass(frozen=True)
class Sheet:
    """Prompts of a test, drawn with every seed, about `subjects`; `base` is the folder of the base model's pictures.

    `loaded` are the concepts in the model; None stands for all of them.
    """

    test: str
    name: str
    base: str
    prompts: tuple[str, ...]
    plain: tuple[str, ...]
    subjects: tuple[Subject, ...] = ()
    loaded: tuple[Subject, ...] | None = None


@dataclass(frozen=True)
class ConceptPlan:
    """Everything resolved before a model is loaded: what will run, and where it will be recorded."""

    options: DrawingEvalOptions
    ref: ModelRef
    hparams: Any
    settings: DrawingSettings
    found: SubjectSet
    config: dict[str, Any]
    folder: Path

    @property
    def routes(self) -> bool:
        """Whether concepts act only on prompts that name them, so that all of them are loaded at once."""
        return bool(registry.personalizers.get(self.options.editor).routes)

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides with concepts."""
        personalizer = registry.personalizers.get(self.options.editor)
        return ROUTED if hasattr(personalizer, "route") else ("edited",)

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        prompts = 0
        by_base = {}
        for sheet in sheets_of(self.found, routes=self.routes, several=self.several):
            count = len(sheet.prompts)
            prompts += count * len(self.sides)
            by_base[sheet.base] = count
        prompts += sum(by_base.values())
        return {
            **self.config,
            "pictures": prompts * self.settings.seeds,
            "run": str(self.folder),
        }

    @property
    def several(self) -> bool:
        """Whether two concepts can be in the model at a time."""
        return bool(registry.personalizers.get(self.options.editor).several)


def plan_evaluation(options: DrawingEvalOptions) -> ConceptPlan:
    """Resolve names, hyper-parameters and subjects; raise a UserError if anything cannot be used. Loads no model."""
    from mmedit_cli.drawing.methods.base import check_concept

    training_dtype(options.device, options.dtype)
    resolved = resolve(options, registry.personalizers)
    data = DATA if options.data == "emojikb" else options.data
    found = open_subjects(
        data,
        root=options.root,
        model=resolved.ref.folder,
        limit=options.limit,
    )
    problems: list[str] = []
    for subject in found.subjects:
        try:
            check_concept(subject.concept)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(
            problems[:20], "replace the pictures, or take them out of the folder"
        )
    values: dict[str, Any] = {"guidance": found.guidance}
    values |= named_settings(resolved.settings, KINDS)
    settings = DrawingSettings(**values).resolved(emoji=found.name == DATA)
    cases = len(found.subjects)
    return resolved.planned(
        ConceptPlan,
        FOLDER,
        found,
        cases,
        settings,
    )


def sheets_of(found: SubjectSet, *, routes: bool, several: bool) -> Iterator[Sheet]:
    """Yield every sheet.

    If the method routes, prompts about no subject are drawn once, with all concepts loaded; otherwise they are drawn
    once for each subject, with that one loaded.
    """
    for subject in found.subjects:
        yield from _sheets_of_subject(found, subject, routes=routes)
    if routes:
        yield Sheet(
            "other",
            "other",
            "other",
            found.locality,
            found.locality,
        )
    if several:
        ring = list(found.subjects)
        if len(ring) > 2:
            ring.append(ring[0])
        for both in pairwise(ring):
            yield _sheet_of_pair(found, both, routes=routes)


def _sheets_of_subject(
    found: SubjectSet, subject: Subject, *, routes: bool
) -> Iterator[Sheet]:
    concept = subject.concept
    loaded = None if routes else (subject,)
    tests = {
        "reliability": found.reliability,
        "generality": found.generality_of(subject),
    }
    for test, templates in tests.items():
        prompts = tuple(text.replace("{}", concept.token) for text in templates)
        plain = tuple(in_plain_words(prompt, [concept]) for prompt in prompts)
        sheet = Sheet(
            test,
            f"{subject.name}.{test}",
            _base(plain, concept),
            prompts,
            plain,
            subjects=(subject,),
            loaded=loaded,
        )
        yield sheet
        if test == "reliability":
            name = f"{subject.name}.class"
            yield replace(sheet, test="class", name=name, prompts=plain)
    if not routes:
        yield Sheet(
            "other",
            f"{subject.name}.other",
            "other",
            found.locality,
            found.locality,
            subjects=(subject,),
            loaded=loaded,
        )


def _sheet_of_pair(
    found: SubjectSet, both: tuple[Subject, Subject], *, routes: bool
) -> Sheet:
    concepts = [subject.concept for subject in both]
    prompt = found.pair
    for concept in concepts:
        prompt = prompt.replace("{}", concept.token, 1)
    plain = (in_plain_words(prompt, concepts),)
    return Sheet(
        "pair",
        "+".join(subject.name for subject in both),
        _base(plain, *concepts),
        (prompt,),
        plain,
        subjects=both,
        loaded=None if routes else both,
    )


def _base(plain: Sequence[str], *concepts: Concept) -> str:
    """Return the folder of the base model's pictures for plain prompts; equal prompts share a folder."""
    kinds = "+".join(re.sub(r"\W+", "-", concept.superclass) for concept in concepts)
    return f"{kinds}-{sha256_json(list(plain))[:6]}"
