"""What is to be done to evaluate a personalizer: subjects, settings, sheets of prompts; no model is loaded for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, find_model, in_cache
from mmedit_cli.drawing.data.base import Subject, SubjectSet, in_plain_words
from mmedit_cli.drawing.data.opening import open_subjects
from mmedit_cli.drawing.workflow.concepts import training_dtype
from mmedit_cli.errors import DataError, UserError
from mmedit_cli.hparams import load_hparams, read_values, to_dict
from mmedit_cli.records import Run
from mmedit_cli.shapes import pick_variant, shape_of
from mmedit_cli.storage import sha256_json
from mmedit_cli.types import Concept

FOLDER = "eval-concepts"  # below the records
DATA = "emojikb-concepts"  # where no data are named
ROUTED = ("routed", "oracle", "always-on")  # sides of a method with a router of its own
CLIP, DINO = (
    "openai/clip-vit-base-patch32",
    "facebook/dino-vits16",
)  # as published, if they are in the hub's cache
OWN = "mini-blip2"
KINDS: dict[str, type] = {
    "eval.steps": int, "eval.guidance": float, "eval.size": int, "eval.seeds": int, "eval.batch_size": int,
    "eval.clip": str, "eval.dino": str, "eval.encoder": str,
}  # fmt: skip


@dataclass(frozen=True)
class ConceptEvalOptions:
    """What to evaluate; the defaults are those of `mmedit eval`. `overrides` are KEY=VALUE texts.

    Those that begin with `eval.` say how pictures are drawn and looked at, the others are hyper-parameters.
    """

    editor: str
    model: str
    data: str = DATA
    root: Path | None = None
    hparams: Path | None = None
    overrides: Sequence[str] = ()
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    records: Path = Path("records")
    force: bool = False


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn and looked at: `seeds` pictures a prompt, `batch_size` at a time; encoders by name.

    `auto` is the published encoder if it is in the hub's cache, for `encoder` mini-blip2 if nothing else looks or the
    subjects are of EmojiKB; `none` leaves one out.
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
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--set eval.{name}={value}: must be above 0")
        if self.size is not None and self.size % 8:
            raise UserError(f"--set eval.size={self.size}: not a multiple of 8 pixels")

    def found(self, *, emoji: bool) -> Settings:
        """Return the settings with the encoders that `auto` comes to."""
        clip, dino = (
            (name if in_cache(name) else "none") if given == "auto" else given
            for given, name in ((self.clip, CLIP), (self.dino, DINO))
        )
        own = OWN if emoji or (clip, dino) == ("none", "none") else "none"
        return replace(
            self,
            clip=clip,
            dino=dino,
            encoder=own if self.encoder == "auto" else self.encoder,
        )


@dataclass(frozen=True)
class Sheet:
    """Prompts of a test, drawn with every seed, about `subjects`; `base` is the folder of the base model's pictures.

    Pictures of a method that is always on differ by the concept `loaded`; None: all are.
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

    options: ConceptEvalOptions
    ref: ModelRef
    hparams: Any
    settings: Settings
    found: SubjectSet
    config: dict[str, Any]
    folder: Path

    @property
    def routes(self) -> bool:
        """Whether concepts act only on what names them, so that all of them are loaded at once."""
        return bool(registry.personalizers.get(self.options.editor).routes)

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides with concepts."""
        return (
            ROUTED
            if hasattr(registry.personalizers.get(self.options.editor), "route")
            else ("edited",)
        )

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        sheets = list(sheets_of(self.found, routes=self.routes, several=self.several))
        drawn = sum(len(s.prompts) for s in sheets) * len(self.sides)
        drawn += sum(len(s.prompts) for s in {s.base: s for s in sheets}.values())
        return {
            **self.config,
            "pictures": drawn * self.settings.seeds,
            "run": str(self.folder),
        }

    @property
    def several(self) -> bool:
        """Whether two concepts can be in the model at a time."""
        return bool(registry.personalizers.get(self.options.editor).several)


def plan_evaluation(options: ConceptEvalOptions) -> ConceptPlan:
    """Resolve names, hyper-parameters and subjects; raise a UserError if anything cannot be used. Loads no model."""
    from mmedit_cli.drawing.methods.base import check_concept
    from mmedit_cli.drawing.models.loading import check_draws

    options = replace(options, editor=options.editor.replace("_", "-"))
    cls = registry.personalizers.get(options.editor)
    training_dtype(options.device, options.dtype)
    ref = find_model(options.model, revision=options.revision)
    check_draws(ref)
    given = [text for text in options.overrides if text.startswith("eval.")]
    values = {
        key.removeprefix("eval."): value
        for key, value in read_values(given, KINDS).items()
    }
    file = options.hparams or registry.hparams_file(options.editor)
    variant = pick_variant(file, shape_of(ref), ref.name)
    hparams = load_hparams(
        file, cls.Hparams, variant=variant,
        overrides=[text for text in options.overrides if text not in given],
    )  # fmt: skip
    data = DATA if options.data == "emojikb" else options.data
    found = open_subjects(
        data, root=options.root, model=ref.folder, limit=options.limit
    )
    problems = []
    for subject in found.subjects:
        try:
            check_concept(subject.concept)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(
            problems[:20], "replace the pictures, or take them out of the folder"
        )
    settings = Settings(**{"guidance": found.guidance, **values}).found(
        emoji=found.name == DATA
    )
    config = {
        "command": "eval",
        "editor": options.editor,
        "hparams": to_dict(hparams),
        "variant": variant,
        "model": ref.described(),
        "device": options.device,
        "dtype": options.dtype,
        "data": {
            "name": found.name,
            "cases": len(found.subjects),
            "fingerprint": found.fingerprint(),
        },
        "settings": asdict(settings),
        "seed": options.seed,
        "versions": runtime.versions(),
    }
    folder = Run.locate(
        options.records, (FOLDER, options.editor, ref.name, found.name), config
    )
    return ConceptPlan(options, ref, hparams, settings, found, config, folder)


def sheets_of(found: SubjectSet, *, routes: bool, several: bool) -> Iterator[Sheet]:
    """Yield everything that is drawn.

    Of a method that routes, what is about no subject is drawn once, with all concepts loaded; of another one once a
    subject, with that one loaded.
    """
    for subject in found.subjects:
        concept = subject.concept
        loaded = None if routes else (subject,)
        for test, templates in (
            ("reliability", found.reliability),
            ("generality", found.generality_of(subject)),
        ):
            prompts = tuple(
                template.replace("{}", concept.token) for template in templates
            )
            plain = tuple(in_plain_words(prompt, [concept]) for prompt in prompts)
            about = ((subject,), loaded)
            yield Sheet(
                test,
                f"{subject.name}.{test}",
                _base(plain, concept),
                prompts,
                plain,
                *about,
            )
            if test == "reliability":
                yield Sheet(
                    "class",
                    f"{subject.name}.class",
                    _base(plain, concept),
                    plain,
                    plain,
                    *about,
                )
        if not routes:
            name = f"{subject.name}.other"
            yield Sheet(
                "other",
                name,
                "other",
                found.locality,
                found.locality,
                (subject,),
                loaded,
            )
    if routes:
        yield Sheet("other", "other", "other", found.locality, found.locality)
    if several:
        ring = [*found.subjects, *found.subjects[: len(found.subjects) > 2]]
        for both in pairwise(ring):
            concepts = [subject.concept for subject in both]
            prompt = found.pair.replace("{}", concepts[0].token, 1).replace(
                "{}", concepts[1].token, 1
            )
            name = "+".join(subject.name for subject in both)
            plain = (in_plain_words(prompt, concepts),)
            yield Sheet(
                "pair",
                name,
                _base(plain, *concepts),
                (prompt,),
                plain,
                both,
                None if routes else both,
            )


def _base(plain: Sequence[str], *concepts: Concept) -> str:
    """Return a folder for what the base model draws to plain prompts: the same for the same prompts."""
    kinds = "+".join(re.sub(r"\W+", "-", concept.superclass) for concept in concepts)
    return f"{kinds}-{sha256_json(list(plain))[:6]}"
