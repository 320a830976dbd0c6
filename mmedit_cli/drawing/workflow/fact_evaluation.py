"""`mmedit eval` for concept editors: every fact is edited alone and with all of its kind, drawn, judged and reported.

Pictures lie in the run folder as `pictures/WAY/SHEET/PROMPT-SEED.png`; those that exist already are not drawn again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from mmedit_cli import gallery, registry, runtime
from mmedit_cli.catalog import loading
from mmedit_cli.drawing.data.facts import DrawnFact, DrawnProbe
from mmedit_cli.drawing.workflow.fact_plan import (
    ALONE,
    BASE,
    NOBODY,
    TOGETHER,
    WAYS,
    FactPlan,
    FactSheet,
    base_sheet,
    plan_facts,
    sheets_of,
)
from mmedit_cli.drawing.workflow.missing_pictures import draw_missing
from mmedit_cli.drawing.workflow.resolving import DrawingEvalOptions
from mmedit_cli.output import Output
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.records import Run
from mmedit_cli.shapes import told
from mmedit_cli.storage import sweep_tree

if TYPE_CHECKING:
    from mmedit_cli.drawing.evaluation.facts import FactJudge, Judgement
    from mmedit_cli.drawing.methods.shared.concept_editor import ConceptEditor
    from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion
    from mmedit_cli.types import ConceptChange

_WRITTEN = re.compile(r".+\.(png|html)")  # names of files in the folders of a run
_ROWS, _ACROSS = (
    10,
    6,
)  # of the sheet of a kind, the pictures of a way; the page has all
Line = dict[str, Any]


def evaluate_facts(
    options: DrawingEvalOptions, out: Output | None = None
) -> dict[str, Any]:
    """Evaluate a concept editor and return the report; a finished run is only read, an interrupted one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    talk = out or Output()
    plan = plan_facts(options)
    return Run.report_once(
        plan.folder,
        lambda: run_facts(plan, talk),
        force=options.force,
        say=talk.note,
    )


def run_facts(plan: FactPlan, out: Output) -> dict[str, Any]:
    """Load the models, edit, draw and judge, and write the report."""
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    options = plan.options
    judge = _load_judge(plan)
    out.note(told(options.editor, plan.config["variant"]))
    out.note(loading(plan.ref.name))
    model = load_stable_diffusion(plan.ref, device=options.device, dtype=options.dtype)
    environment = runtime.environment(model.device)
    with Run.open(
        plan.folder,
        plan.config,
        environment,
        force=options.force,
    ) as run:
        # an equal command may have ended while the model was loaded here
        report = Run.done_before(plan.folder, force=False, say=out.note)
        if report:
            return report
        if options.force:
            for name in ("pictures", "gallery"):
                sweep_tree(run.folder / name, _WRITTEN)
        return _FactEvaluation(plan, run, model, out).run(judge)


def _load_judge(plan: FactPlan) -> FactJudge:
    """Load the model that looks at pictures; raise ModelError if it cannot be used."""
    from mmedit_cli.drawing.evaluation.encoders import load_clip_and_dino
    from mmedit_cli.drawing.evaluation.facts import AnsweringJudge, ComparingJudge
    from mmedit_cli.knowledge.models.shared.loading import load_backbone

    settings = plan.settings
    device = str(runtime.resolve_device(plan.options.device))
    if settings.encoder != NOBODY:
        return AnsweringJudge(load_backbone(settings.encoder, device=device))
    clip, _ = load_clip_and_dino(settings.clip, "", device)
    assert clip is not None
    return ComparingJudge(clip)


class _FactEvaluation:
    """A run in its folder: facts are edited, sheets drawn and judged, each once."""

    def __init__(
        self, plan: FactPlan, run: Run, model: StableDiffusion, out: Output
    ) -> None:
        self.plan = plan
        self.record = run
        self.model = model
        self.out = out
        self.sheets = list(sheets_of(plan.found))
        self.base = base_sheet(plan.found)
        self.pictures = run.folder / "pictures"
        # a run that was killed while it drew has the lines of its edits already
        self.edited = {(line["way"], line["facts"][0]) for line in run.read("edits")}

    def run(self, judge: FactJudge) -> dict[str, Any]:
        seeds = len(self.plan.seeds)
        totals = {
            "pictures": seeds * sum(len(sheet.prompts) for sheet in self.sheets),
            "judged": len(WAYS) * len(self.plan.found.facts),
        }
        with self.out.progress(totals) as self.tick:
            # sheets that follow each other and are drawn with the same edits
            for _, group in groupby(self.sheets, key=_edits_of):
                self.draw_group(list(group))
            self.judge_all(judge)
        report = self.report(judge)
        self.show()
        self.record.finish(report)
        return report

    # -- editing and drawing ------------------------------------------------------------------------------------

    def draw_group(self, sheets: Sequence[FactSheet]) -> None:
        """Draw sheets with their edits, which are the same, in the model."""
        way = sheets[0].way
        facts = sheets[0].facts
        if not facts or all(self.is_drawn(sheet) for sheet in sheets):
            for sheet in sheets:
                self.draw(sheet)  # what is drawn is only counted
            return
        changes = [fact.change for fact in facts]
        with self.editor() as editor:
            began = time.perf_counter()
            editor.edit(changes)
            seconds = time.perf_counter() - began
            line: Line = {
                "way": way,
                "kind": facts[0].kind,
                "facts": [fact.name for fact in facts],
                "seconds": seconds,
            }
            if (way, facts[0].name) not in self.edited:
                if way == TOGETHER:
                    line |= self.take_back(editor, changes)
                self.record.append("edits", [line])
            for sheet in sheets:
                self.draw(sheet)

    @contextmanager
    def editor(self) -> Iterator[ConceptEditor]:
        """Return a new editor, which leaves the model as it was."""
        cls = registry.concept_editors.get(self.plan.options.editor)
        with cls(self.model, self.plan.hparams) as editor:
            yield editor

    def take_back(
        self, editor: ConceptEditor, changes: Sequence[ConceptChange]
    ) -> Line:
        """Undo the middle one of all edits and redo it; return whether the weights are those of never having made it.

        The editor is left with all its edits.
        """
        middle = (len(changes) + 1) // 2
        whole = editor.changed_weights()
        editor.undo([middle])
        without = editor.changed_weights()
        editor.redo([middle])
        back = _same(editor.changed_weights(), whole)
        others = [change for i, change in enumerate(changes, 1) if i != middle]
        editor.close()
        editor.edit(others)
        exact = _same(editor.changed_weights(), without)
        editor.close()
        editor.edit(changes)
        return {"undone": middle, "undo_exact": exact, "redo_exact": back}

    def files(self, sheet: FactSheet, prompt: str) -> list[Path]:
        """Return the pictures of a prompt, one for each seed."""
        return [self.pictures / sheet.place(prompt, seed) for seed in self.plan.seeds]

    def is_drawn(self, sheet: FactSheet) -> bool:
        """Whether all pictures of a sheet are there."""
        wanted = [
            path for prompt in sheet.prompts for path in self.files(sheet, prompt)
        ]
        return all(path.is_file() for path in wanted)

    def draw(self, sheet: FactSheet) -> None:
        """Draw a sheet in batches that depend on the sheet alone; a finished batch is not drawn again."""
        wanted = []
        for prompt in sheet.prompts:
            paths = self.files(sheet, prompt)
            for seed, path in zip(self.plan.seeds, paths, strict=True):
                wanted.append((prompt, seed, path))
        draw_missing(self.model, self.plan.settings, wanted, self.tick)

    # -- judging ------------------------------------------------------------------------------------------------

    def judge_all(self, judge: FactJudge) -> None:
        """Judge the facts that are not judged yet, in every way."""
        known = {(line["way"], line["fact"]) for line in self.record.read("cases")}
        sheets = {(sheet.way, sheet.name): sheet for sheet in self.sheets}
        for fact in self.plan.found.facts:
            reads_right = None
            for way in WAYS:
                if (way, fact.name) not in known:
                    if reads_right is None:
                        reads_right = self.reads_right(fact, judge)
                    sheet = sheets.get((way, fact.name), self.base)
                    line = self.judged(fact, sheet, reads_right, judge)
                    self.record.append("cases", [line])
                self.tick("judged", 1)

    def reads_right(self, fact: DrawnFact, judge: FactJudge) -> list[bool]:
        """Return for each probe and seed whether the untouched model draws what the probe builds on."""
        files, probes = self.asked(fact, self.base, needed=True)
        return [found.shows for found in judge.judge(files, probes)]

    def asked(
        self, fact: DrawnFact, sheet: FactSheet, *, needed: bool = False
    ) -> tuple[list[Path], list[DrawnProbe]]:
        """Return the pictures of all probes of a fact, or those that they need, and the probe of each."""
        files = []
        probes = []
        for probe in fact.probes:
            prompt = probe.needed if needed else probe.prompt
            for path in self.files(sheet, prompt):
                files.append(path)
                probes.append(probe)
        return files, probes

    def judged(
        self,
        fact: DrawnFact,
        sheet: FactSheet,
        reads_right: Sequence[bool],
        judge: FactJudge,
    ) -> Line:
        """Return the line of a fact: what was drawn for each probe and seed, and what the judge says of it."""
        from mmedit_cli.drawing.evaluation.facts import collapsed

        files, probes = self.asked(fact, sheet)
        judgements = judge.judge(files, probes)
        seeds = list(self.plan.seeds) * len(fact.probes)
        lines = []
        rows = zip(files, probes, judgements, reads_right, seeds, strict=True)
        for file, probe, judgement, known, seed in rows:
            picture = load_picture(Picture(file))
            line = _judgement_line(probe, judgement)
            line |= {
                "known": known,
                "seed": seed,
                "picture": file.relative_to(self.pictures).as_posix(),
                "collapsed": collapsed(picture),
            }
            lines.append(line)
        change = fact.change
        return {
            "way": sheet.way,
            "fact": fact.name,
            "kind": fact.kind,
            "source": change.source,
            "targets": list(change.targets),
            "probes": lines,
        }

    # -- reporting ----------------------------------------------------------------------------------------------

    def report(self, judge: FactJudge) -> dict[str, Any]:
        """Return the report: shares by way, kind and column, what collapsed, what undo did, and seconds."""
        from mmedit_cli.drawing.evaluation.facts import collapses, faint, summary

        cases = self.record.read("cases")
        edits = self.record.read("edits")
        folder = self.record.folder
        kinds = self.plan.found.kinds
        counts = {
            kind: sum(fact.kind == kind for fact in self.plan.found.facts)
            for kind in kinds
        }
        return {
            "format": 1,
            **self.plan.config,
            "environment": self.record.environment,
            "judge": judge.name,
            "kinds": counts,
            "ways": summary(cases),
            "collapsed": collapses(cases),
            "faint": faint(cases, self.contrasts(cases), BASE),
            "undo": [_undo_of(line) for line in edits if line["way"] == TOGETHER],
            "cost": {
                "seconds_per_edit": _seconds(edits, ALONE),
                "seconds_together": _seconds(edits, TOGETHER),
                "peak_memory": runtime.peak_memory(self.model.device),
            },
            "gallery": str(folder / "gallery" / "index.html"),
            "run": str(folder),
        }

    def contrasts(self, cases: Sequence[Line]) -> dict[str, float]:
        """Return the contrast of every picture that was judged, by its name."""
        from mmedit_cli.drawing.evaluation.facts import contrast

        found = {}
        for line in cases:
            for probe in line["probes"]:
                name = probe["picture"]
                if name not in found:
                    picture = load_picture(Picture(self.pictures / name))
                    found[name] = contrast(picture)
        return found

    def show(self) -> None:
        """Write a sheet of each kind of fact, and a page of all of them."""
        home = self.record.folder / "gallery"
        home.mkdir(parents=True, exist_ok=True)
        sheets = {(sheet.way, sheet.name): sheet for sheet in self.sheets}
        sections: list[tuple[str, list[gallery.Row]]] = []
        for kind in self.plan.found.kinds:
            rows: list[gallery.Row] = []
            for fact in self.plan.found.facts:
                if fact.kind == kind:
                    of_ways = [sheets.get((way, fact.name), self.base) for way in WAYS]
                    rows.append(self.row(fact, of_ways))
            name = re.sub(r"\W+", "-", kind)
            gallery.contact_sheet(_few(rows), home / f"{name}.png")
            sections.append((kind, rows))
        title = f"{self.plan.options.editor} on {self.plan.ref.name}"
        gallery.page(title, sections, home / "index.html")

    def row(self, fact: DrawnFact, sheets: Sequence[FactSheet]) -> gallery.Row:
        """Return the pictures of a fact, each once, by the way of the sheet."""
        cells = []
        for sheet in sheets:
            files, _ = self.asked(fact, sheet)
            once = dict.fromkeys(files)
            cells.append((sheet.way, list(once)))
        return described(fact), cells


def described(fact: DrawnFact) -> str:
    """Return an edit in words."""
    change = fact.change
    if not change.targets:
        return f"{change.source}: erased"
    targets = " | ".join(change.targets)
    return f"{change.source}: as {targets}"


def _few(rows: Sequence[gallery.Row]) -> list[gallery.Row]:
    """Return some rows with some of their pictures, for a sheet."""
    few: list[gallery.Row] = []
    for words, groups in rows[:_ROWS]:
        cells = []
        for name, files in groups:
            cells.append((name, files[:_ACROSS]))
        few.append((words, cells))
    return few


def _edits_of(sheet: FactSheet) -> tuple[str, tuple[str, ...]]:
    """Return what tells the edits of a sheet from those of others."""
    return sheet.way, tuple(fact.name for fact in sheet.facts)


def _judgement_line(probe: DrawnProbe, judgement: Judgement) -> Line:
    return {
        "column": probe.column,
        "prompt": probe.prompt,
        "answer": judgement.answer,
        "right": judgement.right(probe),
        "margin": judgement.margin,
    }


def _undo_of(line: Line) -> Line:
    keys = ("kind", "undone", "undo_exact", "redo_exact")
    return {"edits": len(line["facts"]), **{key: line[key] for key in keys}}


def _seconds(lines: Sequence[Line], way: str) -> dict[str, float]:
    """Return the mean seconds of an edit, or of all of a kind at once, by kind."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["way"] == way:
            kind = line["kind"]
            of_kind = found.setdefault(kind, [])
            of_kind.append(line["seconds"])
    means = {}
    for kind, of_kind in found.items():
        mean = fmean(of_kind)
        means[kind] = round(mean, 4)
    return means


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same bit for bit."""
    if one.keys() != other.keys():
        return False
    return all(torch.equal(one[path], other[path]) for path in one)
