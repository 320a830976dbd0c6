"""The plan of an evaluation of a concept editor: facts, settings, sheets of prompts. No model is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmedit_cli import registry
from mmedit_cli.catalog import ModelRef
from mmedit_cli.drawing.data.emojikb_facts import NAME
from mmedit_cli.drawing.data.facts import DrawnFact, DrawnProbe, FactSet
from mmedit_cli.drawing.data.opening_facts import open_facts
from mmedit_cli.drawing.workflow.plan import KINDS, DrawingSettings
from mmedit_cli.drawing.workflow.resolving import (
    DrawingEvalOptions,
    named_settings,
    resolve,
)
from mmedit_cli.errors import UserError

FOLDER = "eval-facts"  # below the records
BASE, ALONE, TOGETHER = "before", "alone", "together"
WAYS = (BASE, ALONE, TOGETHER)  # as they are drawn and printed
NOBODY = "none"
_UNUSED = ("eval.dino",)  # of the settings of other drawings
SETTINGS = {key: kind for key, kind in KINDS.items() if key not in _UNUSED}


@dataclass(frozen=True)
class FactSheet:
    """Prompts that are drawn in one way, each once; `facts` are the edits that are in the model, `name` its folder."""

    way: str
    name: str
    prompts: tuple[str, ...]
    facts: tuple[DrawnFact, ...] = ()

    def place(self, prompt: str, seed: int) -> str:
        """Return where the picture of a prompt lies, below the folder of pictures."""
        number = self.prompts.index(prompt)
        return f"{self.way}/{self.name}/{number:03d}-{seed}.png"


@dataclass(frozen=True)
class FactPlan:
    """Everything resolved before a model is loaded: what will run, and where it will be recorded."""

    options: DrawingEvalOptions
    ref: ModelRef
    hparams: Any
    settings: DrawingSettings
    found: FactSet
    config: dict[str, Any]
    folder: Path

    @property
    def seeds(self) -> range:
        """The seeds that every prompt is drawn with."""
        first = self.options.seed
        return range(first, first + self.settings.seeds)

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        prompts = sum(len(sheet.prompts) for sheet in sheets_of(self.found))
        return {
            **self.config,
            "pictures": prompts * self.settings.seeds,
            "run": str(self.folder),
        }


def plan_facts(options: DrawingEvalOptions) -> FactPlan:
    """Resolve names, hyper-parameters and facts; raise a UserError if anything cannot be used. Loads no model."""
    resolved = resolve(options, registry.concept_editors)
    data = NAME if options.data == "emojikb" else options.data
    found = open_facts(
        data,
        root=options.root,
        model=resolved.ref.folder,
        limit=options.limit,
    )
    settings = _settings(found, resolved.settings)
    cases = len(found.facts)
    return resolved.planned(
        FactPlan,
        FOLDER,
        found,
        cases,
        settings,
    )


def _settings(found: FactSet, overrides: Sequence[str]) -> DrawingSettings:
    """Return how pictures are drawn and who judges them: one model; raise UserError if there is none.

    It is the encoder, a model that answers, where the data have questions and no CLIP is named.
    """
    values: dict[str, Any] = {"seeds": 1, "dino": NOBODY}
    if found.guidance is not None:
        values["guidance"] = found.guidance
    values |= named_settings(overrides, SETTINGS)
    names_clip = values.get("clip", NOBODY) != NOBODY
    asks = found.asks and not names_clip and values.get("encoder") != NOBODY
    if asks:
        values["clip"] = NOBODY
    settings = DrawingSettings(**values).resolved(emoji=asks)
    if not asks:
        settings = replace(settings, encoder=NOBODY)
    if settings.clip == NOBODY and settings.encoder == NOBODY:
        raise UserError(
            f"--data {found.name}: nothing looks at the pictures",
            "--set eval.clip=openai/clip-vit-base-patch32, once it is in the hub's cache, or a folder with a CLIP",
        )
    return settings


def sheets_of(found: FactSet) -> Iterator[FactSheet]:
    """Yield every sheet: of the untouched model, of each fact alone, and of each with all of its kind at once."""
    yield base_sheet(found)
    for fact in found.facts:
        yield FactSheet(ALONE, fact.name, prompts_of(fact.probes), (fact,))
    for kind in found.kinds:
        together = tuple(fact for fact in found.facts if fact.kind == kind)
        for fact in together:
            yield FactSheet(TOGETHER, fact.name, prompts_of(fact.probes), together)


def base_sheet(found: FactSet) -> FactSheet:
    """Return the sheet of the untouched model: all prompts, and those that probes need."""
    prompts: dict[str, None] = {}
    for probe in found.probes():
        prompts |= dict.fromkeys((probe.prompt, probe.needed))
    return FactSheet(BASE, "all", tuple(prompts))


def prompts_of(probes: Sequence[DrawnProbe]) -> tuple[str, ...]:
    """Return the prompts of some probes, each once."""
    return tuple(dict.fromkeys(probe.prompt for probe in probes))
