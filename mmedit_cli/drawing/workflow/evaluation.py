"""`mmedit eval` for personalizers: learn every subject of a set, draw it and everything else, compare, and report.

Pictures lie in the run folder as `pictures/SIDE/SHEET/PROMPT-SEED.png`. A side is the base model, whose prompts are in
plain words, or the model with the concepts. Both draw a sheet in the same batches: pictures that a concept does not
change are the same bit for bit. Pictures that exist already are not drawn again.
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
from mmedit_cli.drawing.workflow.missing_pictures import Wanted, draw_missing
from mmedit_cli.drawing.workflow.plan import (
    ConceptPlan,
    Sheet,
    plan_evaluation,
    sheets_of,
)
from mmedit_cli.drawing.workflow.resolving import DrawingEvalOptions
from mmedit_cli.errors import ModelError, UserError
from mmedit_cli.output import Output
from mmedit_cli.pictures import Picture, load_picture, png
from mmedit_cli.reading import read_json_object
from mmedit_cli.records import Run
from mmedit_cli.shapes import told
from mmedit_cli.storage import sweep_tree, write_atomic

if TYPE_CHECKING:
    from mmedit_cli.drawing.evaluation.concepts import (
        PictureEncoder,
        Scores,
        ScoringModels,
    )
    from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion

BASE, PHOTOS = "base", "photos"
# names of files that this program writes into the folders of a run
_WRITTEN = re.compile(r".+\.(png|safetensors|html)|index\.json|\.lock")
_SHOWN = 10  # rows of a subject's sheet; the page has all
_LEARNED_KEYS = (
    "token",
    "superclass",
    "bytes",
    "steps",
    "loss_first",
    "loss_last",
    "covariance",
    "seconds",
)


def evaluate(options: DrawingEvalOptions, out: Output | None = None) -> dict[str, Any]:
    """Evaluate a personalizer and return the report; a finished run is only read, an interrupted one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    talk = out or Output()
    plan = plan_evaluation(options)
    return Run.report_once(
        plan.folder,
        lambda: run_evaluation(plan, talk),
        force=options.force,
        say=talk.note,
    )


def run_evaluation(plan: ConceptPlan, out: Output) -> dict[str, Any]:
    """Load the models, learn, draw and score, and write the report."""
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    options = plan.options
    models = load_scoring_models(plan)
    out.note(told(plan.options.editor, plan.config["variant"]))
    out.note(loading(plan.ref.name))
    model = load_stable_diffusion(
        plan.ref,
        device=options.device,
        dtype=training_dtype(options.device, options.dtype),
    )
    environment = runtime.environment(model.device)
    with Run.open(
        plan.folder,
        plan.config,
        environment,
        force=options.force,
    ) as run:
        # An equal command may have ended while the model was loaded here.
        report = Run.done_before(plan.folder, force=False, say=out.note)
        if report:
            return report
        if options.force:
            for name in ("pictures", "concepts", "gallery"):
                sweep_tree(run.folder / name, _WRITTEN)
        return _ConceptEvaluation(plan, run, model, out).run(models)


def load_scoring_models(plan: ConceptPlan) -> ScoringModels:
    """Load the models that look at pictures; raise ModelError if one cannot be used, UserError if there is none."""
    from mmedit_cli.drawing.evaluation.concepts import ScoringModels
    from mmedit_cli.drawing.evaluation.encoders import load_clip_and_dino
    from mmedit_cli.drawing.evaluation.picture_scores import TokenEncoder
    from mmedit_cli.knowledge.models.shared.loading import load_backbone

    settings = plan.settings
    device = str(runtime.resolve_device(plan.options.device))
    clip_name = "" if settings.clip == "none" else settings.clip
    dino_name = "" if settings.dino == "none" else settings.dino
    clip, dino = load_clip_and_dino(clip_name, dino_name, device)
    encoders: dict[str, PictureEncoder] = {}
    if clip is not None:
        encoders["CLIP"] = clip
    if dino is not None:
        encoders["DINO"] = dino
    namer = None
    unknown = frozenset[str]()
    if settings.encoder != "none":
        namer = load_backbone(settings.encoder, device=device)
        encoders[namer.name] = TokenEncoder(namer)
        unknown = _subjects_without_a_name(plan)
    if not encoders:
        raise UserError(
            "nothing looks at the pictures: no encoder",
            "--set eval.encoder=mini-blip2, or eval.clip=...",
        )
    return ScoringModels(encoders, plan.found.pictures(), clip, namer, unknown)


def _subjects_without_a_name(plan: ConceptPlan) -> frozenset[str]:
    """Return the subjects that the encoder was not trained on, by the list in its folder."""
    encoder = plan.settings.encoder
    folder = bundled().get(encoder, Path(encoder))
    file = folder / "holdout.json"
    if not file.is_file():
        return frozenset()
    content = read_json_object(file, error=ModelError)
    held_out = set(content.array("concepts", str, []))
    subjects = plan.found.subjects
    return frozenset(s.name for s in subjects if s.key in held_out)


class _ConceptEvaluation:
    """A run in its folder: subjects are learned, sheets drawn and scored, each once."""

    def __init__(
        self, plan: ConceptPlan, run: Run, model: StableDiffusion, out: Output
    ) -> None:
        self.plan = plan
        self.record = run
        self.model = model
        self.out = out
        sheets = sheets_of(plan.found, routes=plan.routes, several=plan.several)
        self.sheets = list(sheets)
        self.seeds = range(plan.settings.seeds)
        self.learned = {line["subject"] for line in run.read("learned")}
        self.routing: dict[str, Counter[str]] = {}
        self.learner = personalizer_for(
            model,
            registry.personalizers.get(plan.options.editor),
            plan.hparams,
            plan.options.seed,
            None,
            out,
        )

    def totals(self, bases: Sequence[Sheet]) -> dict[str, int]:
        """Return the totals of the progress bars."""
        sides = self.plan.sides
        prompts = sum(len(sheet.prompts) for sheet in bases)
        prompts += len(sides) * sum(len(sheet.prompts) for sheet in self.sheets)
        return {
            "steps": self.learner.steps * len(self.plan.found.subjects),
            "pictures": prompts * len(self.seeds),
            "scores": (len(sides) + 2) * len(self.sheets),
        }

    def run(self, models: ScoringModels) -> dict[str, Any]:
        run = self.record
        by_base = {}
        for sheet in self.sheets:
            in_plain_words = replace(sheet, name=sheet.base, prompts=sheet.plain)
            by_base[sheet.base] = in_plain_words
        bases = list(by_base.values())
        with self.out.progress(self.totals(bases)) as self.tick:
            for sheet in bases:
                self.draw(BASE, sheet)
            for group in self.groups():
                self.learn_and_draw(group)
            self.score(models)
        lines = run.read("cases")
        report = self.report(lines, models)
        self.show()
        run.finish(report)
        return report

    def groups(self) -> list[list[Sheet]]:
        """Return the sheets that are drawn with the same concepts loaded."""
        by_loaded: dict[Any, list[Sheet]] = {}
        for sheet in self.sheets:
            group = by_loaded.setdefault(sheet.loaded, [])
            group.append(sheet)
        return list(by_loaded.values())

    # -- learning and drawing -----------------------------------------------------------------------------------

    def learn_and_draw(self, group: Sequence[Sheet]) -> None:
        """Draw sheets on every side, with their concepts learned and loaded."""
        subjects = group[0].loaded or self.plan.found.subjects
        tokens = [subject.concept.token for subject in subjects]
        folder = None
        for side in self.plan.sides:
            if side != "routed" and all(self.is_drawn(side, sheet) for sheet in group):
                for sheet in group:
                    self.draw(side, sheet)  # only counts them as drawn
                continue
            folder = folder or self.learn(subjects)
            overrides = ("router=always",) if side == "always-on" else ()
            loaded = folder.load(self.model, tokens=tokens, overrides=overrides)
            with loaded as personalizer:
                if side == "routed":
                    self.ask_the_router(personalizer, group)
                for sheet in group:
                    self.draw(side, sheet, personalizer)
        if not self.plan.several:
            # Each subject is a copy of all weights: too much to keep.
            sweep_tree(self.concepts(subjects[0]), _WRITTEN)

    def concepts(self, subject: Subject) -> Path:
        """Return the folder that a subject is learned into."""
        home = self.record.folder / "concepts"
        return home if self.plan.several else home / subject.name

    def learn(self, subjects: Sequence[Subject]) -> ConceptFolder:
        """Learn the subjects that are not learned yet and return their folder."""
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
                    self.record_learned(subject, folder.entry(token))
        return folder

    def record_learned(self, subject: Subject, entry: dict[str, Any]) -> None:
        """Write how a subject was learned into the run."""
        line = {"subject": subject.name}
        for key in _LEARNED_KEYS:
            if key in entry:
                line[key] = entry[key]
        self.record.append("learned", [line])
        self.learned.add(subject.name)

    def step(self, count: int) -> None:
        """Count steps of learning."""
        self.tick("steps", count)

    def ask_the_router(self, personalizer: Any, group: Sequence[Sheet]) -> None:
        """Count the prompts that the router sends to the subjects they name, to others, and to none."""
        for sheet in group:
            wanted = self.named_tokens(sheet)
            for tokens in personalizer.route(sheet.prompts):
                if not tokens:
                    outcome = "none"
                elif set(tokens) == set(wanted):
                    outcome = "right"
                else:
                    outcome = "other"
                counts = self.routing.setdefault(sheet.test, Counter())
                counts[outcome] += 1

    @staticmethod
    def names(sheet: Sheet) -> bool:
        """Whether the prompts of a sheet name its subjects."""
        return sheet.test not in ("class", "other")

    def named_tokens(self, sheet: Sheet) -> list[str]:
        """Return the tokens that the prompts of a sheet name."""
        if not self.names(sheet):
            return []
        return [subject.concept.token for subject in sheet.subjects]

    def files(self, side: str, sheet: Sheet) -> list[list[Path]]:
        """Return the pictures of a sheet: (P prompts, S seeds)."""
        name = sheet.base if side == BASE else sheet.name
        home = self.record.folder / "pictures" / side / name
        rows = []
        for i, _ in enumerate(sheet.prompts):
            files = []
            for seed in self.seeds:
                files.append(home / f"{i:02d}-{seed}.png")
            rows.append(files)
        return rows

    def is_drawn(self, side: str, sheet: Sheet) -> bool:
        """Whether all pictures of a sheet are there."""
        return all(path.is_file() for row in self.files(side, sheet) for path in row)

    def draw(self, side: str, sheet: Sheet, personalizer: Any = None) -> None:
        """Draw a sheet in batches that depend on the sheet alone; a finished batch is not drawn again."""
        wanted = []
        for prompt, row in zip(sheet.prompts, self.files(side, sheet), strict=True):
            for seed, path in zip(self.seeds, row, strict=True):
                wanted.append((prompt, seed, path))

        def assign(batch: Sequence[Wanted]) -> None:
            if side == "oracle":
                tokens = self.named_tokens(sheet)
                blocks = {prompt: tokens for prompt, _, _ in batch}
                personalizer.assign_blocks(blocks)

        draw_missing(self.model, self.plan.settings, wanted, self.tick, assign)

    # -- looking ------------------------------------------------------------------------------------------------

    def score(self, models: ScoringModels) -> None:
        """Score the sheets that are not scored yet."""
        known = {(line["side"], line["sheet"]) for line in self.record.read("cases")}
        for side in (*self.plan.sides, BASE, PHOTOS):
            for sheet in self.sheets:
                if (side, sheet.name) not in known:
                    self.record_scores(side, sheet, models)
                self.tick("scores", 1)

    def record_scores(self, side: str, sheet: Sheet, models: ScoringModels) -> None:
        """Write the scores of a sheet on a side into the run, if there are any."""
        scores = self.scores(side, sheet, models)
        if not scores:
            return
        line = {
            "side": side,
            "sheet": sheet.name,
            "test": sheet.test,
            "subject": "+".join(subject.name for subject in sheet.subjects),
            "pictures": sheet.base if side == BASE else sheet.name,
            "prompts": list(sheet.plain if side == BASE else sheet.prompts),
            "scores": scores,
        }
        self.record.append("cases", [line])

    def scores(self, side: str, sheet: Sheet, models: ScoringModels) -> Scores:
        """Return the scores of a sheet on a side by name.

        The base model is the lower bound of what a concept can gain, and shows what its own pictures have in common;
        the photos are the upper bound.
        """
        from mmedit_cli.drawing.evaluation import concepts

        if side == PHOTOS:
            if sheet.test != "reliability":
                return {}
            return concepts.score_photos(sheet.subjects[0].concept.images, models)
        single = sheet.subjects[0] if len(sheet.subjects) == 1 else None
        drawn = concepts.DrawnTest(
            files=self.files(side, sheet),
            base=self.files(BASE, sheet),
            plain=sheet.plain,
            subjects=[subject.name for subject in sheet.subjects],
            photos=single.concept.images if single else (),
            answer=single.answer if single else "",
        )
        if sheet.test == "pair":
            return concepts.score_pairs(drawn, models)
        if self.names(sheet):
            return concepts.score_subject(drawn, models)
        scores = concepts.score_locality(drawn, models)
        if side == BASE:
            # Compared with itself, only its different pictures say something.
            return {
                name: values
                for name, values in scores.items()
                if name.endswith("all pairs")
            }
        return scores

    def report(
        self, lines: Sequence[dict[str, Any]], models: ScoringModels
    ) -> dict[str, Any]:
        """Return the report: means by side, test and score, the same by subject, routing, and cost."""
        from mmedit_cli.drawing.evaluation.concepts import summary

        learned = self.record.read("learned")
        seconds = [line.pop("seconds") for line in learned]
        folder = self.record.folder
        return {
            "format": 1,
            **self.plan.config,
            "environment": self.record.environment,
            "sides": summary(lines),
            "subjects": [_means(line) for line in lines],
            "routing": {test: _shares(n) for test, n in self.routing.items()},
            "nameless": sorted(models.unknown),
            "concepts": learned,
            "cost": {
                "seconds_per_subject": round(fmean(seconds), 3),
                "peak_memory": runtime.peak_memory(self.model.device),
            },
            "gallery": str(folder / "gallery" / "index.html"),
            "run": str(folder),
        }

    # -- showing ------------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Write a sheet of each subject, and a page of all of them."""
        home = self.record.folder / "gallery"
        (home / "photos").mkdir(parents=True, exist_ok=True)
        sections: list[tuple[str, list[gallery.Row]]] = []
        for subject in self.plan.found.subjects:
            photos = self.thumbnails(subject, home / "photos")
            about = [sheet for sheet in self.sheets if sheet.subjects == (subject,)]
            rows: list[gallery.Row] = [
                (subject.concept.superclass, [("photos", photos)])
            ]
            rows += self.rows(about)
            gallery.contact_sheet(rows[:_SHOWN], home / f"{subject.name}.png")
            sections.append((subject.name, rows))
        pairs = self.rows(sheet for sheet in self.sheets if sheet.test == "pair")
        if pairs:
            sections.append(("two in one prompt", pairs))
        others = self.rows(sheet for sheet in self.sheets if not sheet.subjects)
        if others:
            sections.append(("other things", others))
        title = f"{self.plan.options.editor} on {self.plan.ref.name}"
        gallery.page(title, sections, home / "index.html")

    @staticmethod
    def thumbnails(subject: Subject, folder: Path) -> list[Path]:
        """Write small copies of the photos of a subject and return their files."""
        files = []
        for i, path in enumerate(subject.concept.images):
            photo = load_picture(Picture(path))
            photo.thumbnail((gallery.THUMB, gallery.THUMB))
            file = folder / f"{subject.name}-{i}.png"
            write_atomic(file, png(photo))
            files.append(file)
        return files

    def rows(self, sheets: Iterable[Sheet]) -> list[gallery.Row]:
        """Return a row for each prompt of some sheets: the pictures of the base model, then those of each side."""
        rows: list[gallery.Row] = []
        for sheet in sheets:
            by_side = {s: self.files(s, sheet) for s in (BASE, *self.plan.sides)}
            for i, prompt in enumerate(sheet.prompts):
                cells = [(side, files[i]) for side, files in by_side.items()]
                rows.append((prompt, cells))
        return rows


def _means(line: dict[str, Any]) -> dict[str, Any]:
    """Return the mean of each score of a line."""
    scores = {name: fmean(values) for name, values in line["scores"].items()}
    return {
        "subject": line["subject"],
        "side": line["side"],
        "test": line["test"],
        "scores": scores,
    }


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = counts.total()
    return {outcome: count / total for outcome, count in counts.items()}
