"""`mmedit eval` for personalizers: learn every subject of a set, draw it and everything else, compare, and report.

Pictures lie in the run folder as `pictures/SIDE/SHEET/PROMPT-SEED.png`. A side is the base model, which is told plain
words, or the model with the concepts; both draw a sheet in the same batches, so that what a concept leaves alone is
the same bit for bit. What lies there is not done again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mmedit_cli import gallery, registry, runtime
from mmedit_cli.catalog import bundled, loading
from mmedit_cli.drawing.data.base import Subject
from mmedit_cli.drawing.workflow.concepts import (
    ConceptFolder,
    learn_into,
    personalizer_for,
    training_dtype,
)
from mmedit_cli.drawing.workflow.plan import (
    ConceptEvalOptions,
    ConceptPlan,
    Sheet,
    plan_evaluation,
    sheets_of,
)
from mmedit_cli.errors import ModelError, UserError
from mmedit_cli.output import Output
from mmedit_cli.pictures import Picture, load_picture, png
from mmedit_cli.reading import read_json_object
from mmedit_cli.records import Run
from mmedit_cli.shapes import told
from mmedit_cli.storage import sweep_tree, write_atomic

if TYPE_CHECKING:
    from mmedit_cli.drawing.evaluation.concepts import Eyes, Scores
    from mmedit_cli.drawing.methods.base import Personalizer
    from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion

BASE, PHOTOS = "base", "photos"
_WRITTEN = re.compile(
    r".+\.(png|safetensors|html)|index\.json|\.lock"
)  # names of files in its folders
_SHOWN = 10  # rows of a subject's sheet; the page has all
_KEPT = (
    "token",
    "superclass",
    "bytes",
    "steps",
    "loss_first",
    "loss_last",
    "covariance",
    "seconds",
)


def evaluate(options: ConceptEvalOptions, out: Output | None = None) -> dict[str, Any]:
    """Evaluate a personalizer and return the report; a finished run is only read, an interrupted one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    out = out or Output()
    plan = plan_evaluation(options)
    if (
        report := Run.done_before(plan.folder, force=options.force, say=out.note)
    ) is not None:
        return report
    eyes = load_eyes(plan)
    out.note(told(plan.options.editor, plan.config["variant"]))
    out.note(loading(plan.ref.name))
    model = load_stable_diffusion(
        plan.ref,
        device=options.device,
        dtype=training_dtype(options.device, options.dtype),
    )
    with Run.open(
        plan.folder, plan.config, runtime.environment(model.device), force=options.force
    ) as run:
        if report := Run.done_before(plan.folder, force=False, say=out.note):
            return (
                report  # of an equal command that ended while the model was loaded here
            )
        if options.force:
            for name in ("pictures", "concepts", "gallery"):
                sweep_tree(run.folder / name, _WRITTEN)
        return _Evaluation(plan, run, model, out).run(eyes)


def load_eyes(plan: ConceptPlan) -> Eyes:
    """Load what looks at the pictures; raise ModelError if one cannot be used, UserError if nothing looks."""
    from mmedit_cli.drawing.evaluation.concepts import Eyes
    from mmedit_cli.drawing.evaluation.encoders import load_clip_and_dino
    from mmedit_cli.drawing.evaluation.picture_scores import TokenEncoder
    from mmedit_cli.knowledge.models.shared.loading import load_backbone

    settings = plan.settings
    device = str(runtime.resolve_device(plan.options.device))
    clip, dino = (
        "" if name == "none" else name for name in (settings.clip, settings.dino)
    )
    both, eye = load_clip_and_dino(clip, dino, device)
    encoders: dict[str, Any] = {"CLIP": both, "DINO": eye}
    namer, unknown = None, frozenset[str]()
    if settings.encoder != "none":
        namer = load_backbone(settings.encoder, device=device)
        encoders[namer.name] = TokenEncoder(namer)
        held = bundled().get(settings.encoder, Path(settings.encoder)) / "holdout.json"
        if held.is_file():
            never = set(
                read_json_object(held, error=ModelError).array("concepts", str, [])
            )
            unknown = frozenset(s.name for s in plan.found.subjects if s.key in never)
    encoders = {
        name: encoder for name, encoder in encoders.items() if encoder is not None
    }
    if not encoders:
        raise UserError(
            "nothing looks at the pictures: no encoder",
            "--set eval.encoder=mini-blip2, or eval.clip=...",
        )
    return Eyes(encoders, plan.found.pictures(), both, namer, unknown)


class _Evaluation:
    """A run in its folder: subjects are learned, sheets drawn and scored, each once."""

    def __init__(
        self, plan: ConceptPlan, run: Run, model: StableDiffusion, out: Output
    ) -> None:
        self.plan, self.record, self.model, self.out = plan, run, model, out
        self.sheets = list(
            sheets_of(plan.found, routes=plan.routes, several=plan.several)
        )
        self.seeds = range(plan.settings.seeds)
        self.learned = {line["subject"] for line in run.read("learned")}
        self.routing: dict[str, Counter[str]] = {}
        cls, options = registry.personalizers.get(plan.options.editor), plan.options
        self.learner = personalizer_for(
            model, cls, plan.hparams, options.seed, None, out
        )

    def run(self, eyes: Eyes) -> dict[str, Any]:
        plan, run = self.plan, self.record
        bases = list(
            {
                sheet.base: replace(sheet, name=sheet.base, prompts=sheet.plain)
                for sheet in self.sheets
            }.values()
        )
        todo = [(BASE, sheet) for sheet in bases] + [
            (side, sheet) for side in plan.sides for sheet in self.sheets
        ]
        totals = {"steps": self.learner.steps * len(plan.found.subjects),
                  "pictures": sum(len(sheet.prompts) for _, sheet in todo) * len(self.seeds),
                  "scores": (len(plan.sides) + 2) * len(self.sheets)}  # fmt: skip
        with self.out.progress(totals) as self.tick:
            for sheet in bases:
                self.draw(BASE, sheet)
            for group in self.groups():
                self.learn_and_draw(group)
            self.score(eyes)
        lines = run.read("cases")
        report = self.report(lines, eyes)
        self.show()
        run.finish(report)
        return report

    def groups(self) -> list[list[Sheet]]:
        """Return the sheets that are drawn with the same concepts loaded."""
        found: dict[Any, list[Sheet]] = {}
        for sheet in self.sheets:
            found.setdefault(sheet.loaded, []).append(sheet)
        return list(found.values())

    # -- learning and drawing -----------------------------------------------------------------------------------

    def learn_and_draw(self, group: Sequence[Sheet]) -> None:
        """Draw sheets on every side, with their concepts learned and loaded."""
        subjects = group[0].loaded or self.plan.found.subjects
        folder = None
        for side in self.plan.sides:
            if side != "routed" and all(self.is_drawn(side, sheet) for sheet in group):
                for sheet in group:
                    self.draw(side, sheet)  # counts, no more
                continue
            folder = folder or self.learn(subjects)
            overrides = ("router=always",) if side == "always-on" else ()
            tokens = [subject.concept.token for subject in subjects]
            with folder.load(
                self.model, tokens=tokens, overrides=overrides
            ) as personalizer:
                if side == "routed":
                    self.ask_the_router(personalizer, group)
                for sheet in group:
                    self.draw(side, sheet, personalizer)
        if not self.plan.several:  # a copy of all weights a subject is no thing to keep
            sweep_tree(self.concepts(subjects[0]), _WRITTEN)

    def concepts(self, subject: Subject) -> Path:
        """Return the folder a subject is learned into."""
        home = self.record.folder / "concepts"
        return home if self.plan.several else home / subject.name

    def learn(self, subjects: Sequence[Subject]) -> ConceptFolder:
        """Learn what is not learned yet and return the folder."""
        folder = ConceptFolder(self.concepts(subjects[0]))
        with folder.writing():
            for subject in subjects:
                token = subject.concept.token
                if token not in folder.tokens:
                    learn_into(
                        folder,
                        self.learner,
                        subject.concept,
                        self.plan.options.model,
                        self.step,
                    )
                    self.learner.remove(token)
                elif subject.name not in self.learned:
                    self.step(self.learner.steps)
                if subject.name not in self.learned:
                    entry = folder.entry(token)
                    self.record.append(
                        "learned",
                        [
                            {
                                "subject": subject.name,
                                **{k: entry[k] for k in _KEPT if k in entry},
                            }
                        ],
                    )
                    self.learned.add(subject.name)
        return folder

    def step(self, count: int) -> None:
        """Count steps of learning."""
        self.tick("steps", count)

    def ask_the_router(self, personalizer: Any, group: Sequence[Sheet]) -> None:
        """Note where the router sends the prompts of the sheets: to whom they name, to others, or to none."""
        for sheet in group:
            wanted = (
                {s.concept.token for s in sheet.subjects}
                if self.names(sheet)
                else set()
            )
            for sent in personalizer.route(sheet.prompts):
                said = (
                    "none" if not sent else "right" if set(sent) == wanted else "other"
                )
                self.routing.setdefault(sheet.test, Counter())[said] += 1

    @staticmethod
    def names(sheet: Sheet) -> bool:
        """Whether the prompts of a sheet name its subjects."""
        return sheet.test not in ("class", "other")

    def files(self, side: str, sheet: Sheet) -> list[list[Path]]:
        """Return the pictures of a sheet: (P prompts, S seeds)."""
        home = (
            self.record.folder
            / "pictures"
            / side
            / (sheet.base if side == BASE else sheet.name)
        )
        return [
            [home / f"{i:02d}-{seed}.png" for seed in self.seeds]
            for i in range(len(sheet.prompts))
        ]

    def is_drawn(self, side: str, sheet: Sheet) -> bool:
        """Whether all pictures of a sheet are there."""
        return all(path.is_file() for row in self.files(side, sheet) for path in row)

    def draw(
        self, side: str, sheet: Sheet, personalizer: Personalizer | None = None
    ) -> None:
        """Draw a sheet in batches that depend on the sheet alone; a batch that is there is not drawn again."""
        from mmedit_cli.drawing.models.stable_diffusion import Sampling

        settings = self.plan.settings
        sampling = Sampling(
            settings.steps,
            settings.guidance,
            settings.size,
            batch_size=settings.batch_size,
        )
        wanted = [
            (prompt, seed, path)
            for prompt, row in zip(sheet.prompts, self.files(side, sheet), strict=True)
            for seed, path in zip(self.seeds, row, strict=True)
        ]
        for start in range(0, len(wanted), settings.batch_size):
            prompts, seeds, paths = zip(
                *wanted[start : start + settings.batch_size], strict=True
            )
            if not all(path.is_file() for path in paths):
                if side == "oracle":
                    named = (
                        [s.concept.token for s in sheet.subjects]
                        if self.names(sheet)
                        else []
                    )
                    personalizer.assign_blocks(dict.fromkeys(prompts, named))  # type: ignore[union-attr]
                paths[0].parent.mkdir(parents=True, exist_ok=True)
                for path, picture in zip(
                    paths, self.model.generate(prompts, seeds, sampling), strict=True
                ):
                    write_atomic(path, png(picture))
            self.tick("pictures", len(paths))

    # -- looking ------------------------------------------------------------------------------------------------

    def score(self, eyes: Eyes) -> None:
        """Score what is not scored yet."""
        known = {(line["side"], line["sheet"]) for line in self.record.read("cases")}
        for side in (*self.plan.sides, BASE, PHOTOS):
            for sheet in self.sheets:
                if (side, sheet.name) not in known and (
                    scores := self.scores(side, sheet, eyes)
                ):
                    about = "+".join(subject.name for subject in sheet.subjects)
                    line = {
                        "side": side,
                        "sheet": sheet.name,
                        "test": sheet.test,
                        "subject": about,
                        "scores": scores,
                    }
                    self.record.append("cases", [line])
                self.tick("scores", 1)

    def scores(self, side: str, sheet: Sheet, eyes: Eyes) -> Scores:
        """Return the scores of a sheet on a side by name.

        The base model tells what there is to gain, and what its own pictures have in common; photos what they do.
        """
        from mmedit_cli.drawing.evaluation import concepts

        if side == PHOTOS:
            single = sheet.test == "reliability"
            return (
                concepts.of_photos(sheet.subjects[0].concept.images, eyes)
                if single
                else {}
            )
        subject = sheet.subjects[0] if len(sheet.subjects) == 1 else None
        drawn = concepts.Drawn(
            self.files(side, sheet), self.files(BASE, sheet), sheet.plain, [s.name for s in sheet.subjects],
            subject.concept.images if subject else (), subject.answer if subject else "",
        )  # fmt: skip
        if sheet.test == "pair":
            return concepts.togetherness(drawn, eyes)
        if self.names(sheet):
            return concepts.resemblance(drawn, eyes)
        found = concepts.constancy(drawn, eyes)
        return {
            name: v
            for name, v in found.items()
            if side != BASE or name.endswith("all pairs")
        }

    def report(self, lines: Sequence[dict[str, Any]], eyes: Eyes) -> dict[str, Any]:
        """Return the report: means by side, test and score, the same by subject, routing, and cost."""
        from mmedit_cli.drawing.evaluation.concepts import summary

        learned = self.record.read("learned")
        seconds = [line.pop("seconds") for line in learned]
        return {
            "format": 1,
            **self.plan.config,
            "environment": self.record.environment,
            "sides": summary(lines),
            "subjects": [
                {**{key: line[key] for key in ("subject", "side", "test")},
                 "scores": {name: fmean(values) for name, values in line["scores"].items()}} for line in lines
            ],
            "routing": {test: {said: n / found.total() for said, n in found.items()}
                        for test, found in self.routing.items()},
            "nameless": sorted(eyes.unknown),
            "concepts": learned,
            "cost": {"seconds_per_subject": round(fmean(seconds), 3),
                     "peak_memory": runtime.peak_memory(self.model.device)},
            "gallery": str(self.record.folder / "gallery" / "index.html"),
            "run": str(self.record.folder),
        }  # fmt: skip

    # -- showing ------------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Write a sheet of each subject, and a page of all of them."""
        home = self.record.folder / "gallery"
        (home / "photos").mkdir(parents=True, exist_ok=True)
        sections = []
        for subject in self.plan.found.subjects:
            photos = []
            for i, path in enumerate(subject.concept.images):
                photos.append(home / "photos" / f"{subject.name}-{i}.png")
                photo = load_picture(Picture(path))
                photo.thumbnail((gallery.THUMB, gallery.THUMB))
                write_atomic(photos[-1], png(photo))
            rows = self.rows(
                sheet for sheet in self.sheets if sheet.subjects == (subject,)
            )
            rows = [(subject.concept.superclass, [("photos", photos)]), *rows]
            gallery.contact_sheet(rows[:_SHOWN], home / f"{subject.name}.png")
            sections.append((subject.name, rows))
        pairs = self.rows(sheet for sheet in self.sheets if sheet.test == "pair")
        others = self.rows(sheet for sheet in self.sheets if not sheet.subjects)
        sections += [
            (title, rows)
            for title, rows in (("two in one prompt", pairs), ("other things", others))
            if rows
        ]
        gallery.page(
            f"{self.plan.options.editor} on {self.plan.ref.name}",
            sections,
            home / "index.html",
        )

    def rows(self, sheets: Iterable[Sheet]) -> list[gallery.Row]:
        """Return a row for each prompt of some sheets: the pictures of the base model, then those of each side."""
        return [
            (prompt, [(side, self.files(side, sheet)[i]) for side in (BASE, *self.plan.sides)])
            for sheet in sheets for i, prompt in enumerate(sheet.prompts)
        ]  # fmt: skip
