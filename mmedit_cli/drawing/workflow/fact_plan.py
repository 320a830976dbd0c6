"""The plan of an evaluation of a concept editor: facts, settings, sheets of prompts. No model is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, find_model
from mmedit_cli.drawing.data.emojikb_facts import NAME
from mmedit_cli.drawing.data.facts import DrawnFact, DrawnProbe, FactSet
from mmedit_cli.drawing.data.opening_facts import open_facts
from mmedit_cli.drawing.workflow.plan import KINDS, DrawingSettings
from mmedit_cli.errors import UserError
from mmedit_cli.hparams import load_hparams, read_values, to_dict
from mmedit_cli.records import Run
from mmedit_cli.shapes import pick_variant, shape_of

FOLDER = "eval-facts"  # below the records
BASE, ALONE, TOGETHER = "before", "alone", "together"
WAYS = (BASE, ALONE, TOGETHER)  # as they are drawn and printed
NOBODY = "none"
_UNUSED = ("eval.dino",)  # of the settings of other drawings
SETTINGS = {key: kind for key, kind in KINDS.items() if key not in _UNUSED}


@dataclass(frozen=True)
class FactEvalOptions(runtime.LoadOptions):
    """What to evaluate; the defaults are those of `mmedit eval`. `overrides` are KEY=VALUE texts.

    Those that begin with `eval.` say how pictures are drawn and judged, the others are hyper-parameters. `seed` is the
    first of the seeds that pictures are drawn with.
    """

    editor: str
    model: str
    data: str = NAME
    root: Path | None = None
    hparams: Path | None = None
    overrides: Sequence[str] = ()
    limit: int | None = None
    seed: int = 0
    records: Path = Path("records")
    force: bool = False


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

    options: FactEvalOptions
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


def plan_facts(options: FactEvalOptions) -> FactPlan:
    """Resolve names, hyper-parameters and facts; raise a UserError if anything cannot be used. Loads no model."""
    from mmedit_cli.drawing.models.loading import check_draws

    options = replace(options, editor=options.editor.replace("_", "-"))
    cls = registry.concept_editors.get(options.editor)
    ref = find_model(options.model, revision=options.revision)
    check_draws(ref)
    for_settings = [text for text in options.overrides if text.startswith("eval.")]
    for_method = [text for text in options.overrides if text not in for_settings]
    file = options.hparams or registry.hparams_file(options.editor)
    variant = pick_variant(file, shape_of(ref), ref.name)
    hparams = load_hparams(file, cls.Hparams, variant=variant, overrides=for_method)
    data = NAME if options.data == "emojikb" else options.data
    found = open_facts(
        data,
        root=options.root,
        model=ref.folder,
        limit=options.limit,
    )
    settings = _settings(found, for_settings)
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
            "cases": len(found.facts),
            "fingerprint": found.fingerprint(),
        },
        "settings": asdict(settings),
        "seed": options.seed,
        "versions": runtime.versions(),
    }
    folder = Run.locate(
        options.records, (FOLDER, options.editor, ref.name, found.name), config
    )
    return FactPlan(options, ref, hparams, settings, found, config, folder)


def _settings(found: FactSet, overrides: Sequence[str]) -> DrawingSettings:
    """Return how pictures are drawn and who judges them: one model; raise UserError if there is none.

    It is the encoder, a model that answers, where the data have questions and no CLIP is named.
    """
    values: dict[str, Any] = {"seeds": 1, "dino": NOBODY}
    if found.guidance is not None:
        values["guidance"] = found.guidance
    for key, value in read_values(overrides, SETTINGS).items():
        values[key.removeprefix("eval.")] = value
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
