"""`mmedit eval` for image editors: make the edits of a set, compare each with its goal, and report.

Beside each score stands that of giving the picture back as it is: what an editor must beat to have done anything.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmedit_cli import gallery, registry, runtime
from mmedit_cli.drawing.evaluation import picture_scores
from mmedit_cli.drawing.evaluation.encoders import load_clip_and_dino
from mmedit_cli.hparams import read_values
from mmedit_cli.knowledge.evaluation.intervals import (
    mean_with_interval,
    score_with_interval,
)
from mmedit_cli.output import Output
from mmedit_cli.picture_editing.data.base import EditPair, fingerprint
from mmedit_cli.picture_editing.data.opening import open_pairs
from mmedit_cli.picture_editing.evaluation.lpips import SMALLEST, Lpips
from mmedit_cli.picture_editing.methods.base import (
    EditedPicture,
    EditJob,
    EditSettings,
    ImageEditor,
)
from mmedit_cli.picture_editing.workflow.editing import (
    PictureEditOptions,
    load_editor,
    own_networks,
)
from mmedit_cli.picture_editing.workflow.training import DATA
from mmedit_cli.pictures import png
from mmedit_cli.records import Run
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.storage import write_atomic

if TYPE_CHECKING:
    from mmedit_cli.drawing.evaluation.picture_scores import ClipEncoder, DinoEncoder
    from mmedit_cli.output import Tick
    from mmedit_cli.picture_editing.evaluation.judge import Judge

FOLDER = "eval-image-editor"  # below the records
# Whether less or more is better; the first four need the pixels alone.
SCORES = {
    "L1": "less",
    "L2": "less",
    "SSIM": "more",
    "kept": "less",
    "CLIP-I": "more",
    "CLIP-T": "more",
    "DINO": "more",
    "direction": "more",
    "LPIPS": "less",
    "reached": "more",
}
_SCORERS = ("clip", "dino", "lpips", "judge")  # by the name of a model, folder or file
_KEYS: dict[str, type] = {
    "steps": int,
    "text_guidance": float,
    "image_guidance": float,
    "resolution": int,
    **dict.fromkeys(_SCORERS, str),
}
JUDGE = "mini-blip2"  # asked about the results of pairs with a question
NOBODY = "none"
_SHOWN = 8  # pairs of each kind in the gallery


@dataclass(frozen=True)
class ImageEvalOptions:
    """What to evaluate; the defaults are those of `mmedit eval`. `overrides` are KEY=VALUE texts."""

    editor: str
    model: str | None = None
    load: LoadOptions = field(default_factory=LoadOptions)
    data: str = DATA
    overrides: Sequence[str] = ()
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    records: Path = Path("records")
    force: bool = False
    checkpoint: str | None = None


@dataclass(frozen=True)
class PictureScorers:
    """The models that give scores beside those of the pixels; None leaves their scores out."""

    clip: ClipEncoder | None = None
    dino: DinoEncoder | None = None
    lpips: Lpips | None = None
    judge: Judge | None = None


def read_settings(overrides: Sequence[str]) -> tuple[EditSettings, dict[str, str]]:
    """Return (settings, names of scoring models) of KEY=VALUE texts; raise HparamsError with all that is wrong."""
    values = read_values(overrides, _KEYS)
    names = {}
    for scorer in _SCORERS:
        names[scorer] = values.pop(scorer, "")
    return EditSettings(**values), names


def evaluate(options: ImageEvalOptions, out: Output | None = None) -> dict[str, Any]:
    """Evaluate an image editor and return the report; a finished run is only read, an interrupted one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    talk = out or Output()
    settings, scorer_names = read_settings(options.overrides)
    options = replace(options, editor=options.editor.replace("_", "-"))
    registry.image_editors.get(options.editor)
    data = DATA if options.data == "emojikb" else options.data
    name, pairs = open_pairs(data, limit=options.limit)
    edit_options = PictureEditOptions(
        options.editor,
        options.model,
        options.load,
        settings,
        batch_size=options.batch_size,
        records=options.records,
        checkpoint=options.checkpoint,
    )
    networks = own_networks(edit_options)
    editor = load_editor(edit_options, talk)
    if not scorer_names["judge"]:
        has_questions = any(pair.question for pair in pairs)
        scorer_names["judge"] = JUDGE if has_questions else NOBODY
    scorers = load_scorers(scorer_names, str(editor.device))
    config = {
        "command": "eval",
        "editor": options.editor,
        "model": {"name": editor.model, "fingerprint": editor.fingerprint},
        "dtype": options.load.dtype,
        "data": {"name": name, "cases": len(pairs), "fingerprint": fingerprint(pairs)},
        "settings": {
            **asdict(settings.over(editor.defaults)),
            "resolution": settings.resolution or editor.resolution,
        },
        "encoders": scorer_names,
        "seed": options.seed,
        "versions": runtime.versions(),
    }
    folder = Run.locate(
        options.records, (FOLDER, options.editor, editor.model, name), config
    )
    facts = {"networks": None if networks is None else networks.facts()}

    def run_evaluation() -> dict[str, Any]:
        environment = runtime.environment(editor.device)
        with Run.open(folder, config, environment, force=options.force) as run:
            # An equal command may have ended meanwhile.
            report = Run.done_before(folder, force=False, say=talk.note)
            if report:
                return report
            scoring = _PictureScoring(
                editor,
                scorers,
                run,
                edit_options,
                options.seed,
            )
            with talk.progress({"pairs": len(pairs)}) as tick:
                scoring.score_all(pairs, tick)
            title = f"{options.editor} ({editor.model}) on {name}"
            page = _write_gallery(pairs, folder, title)
            report = _report(run, {**config, **facts}, page)
            run.finish(report)
        return report

    return Run.report_once(
        folder,
        run_evaluation,
        force=options.force,
        say=talk.note,
    )


def _report(run: Run, head: Mapping[str, Any], page: Path) -> dict[str, Any]:
    lines = run.read("cases")
    seconds = fmean(line["seconds"] for line in lines)
    return {
        "format": 1,
        **head,
        "environment": run.environment,
        "scores": summary(lines),
        "by_kind": _summary_by_kind(lines),
        "cost": {"seconds_per_edit": round(seconds, 4)},
        "gallery": str(page),
        "run": str(run.folder),
    }


def load_scorers(names: Mapping[str, str], device: str) -> PictureScorers:
    """Return the scoring models for names (see `_SCORERS`; empty: none); raise ModelError if one is not usable."""
    clip, dino, lpips, judge = (names.get(scorer, "") for scorer in _SCORERS)
    found = PictureScorers()
    if clip or dino:
        found = PictureScorers(*load_clip_and_dino(clip, dino, device))
    if lpips:
        found = replace(found, lpips=Lpips.load(Path(lpips)))
    if judge not in ("", NOBODY):
        from mmedit_cli.knowledge.models.shared.loading import load_backbone
        from mmedit_cli.picture_editing.evaluation.judge import Judge

        model = load_backbone(judge, device=device)
        found = replace(found, judge=Judge(model))
    return found


@dataclass(frozen=True)
class _PictureScoring:
    """Edits and scores pairs; the edited pictures stay in the run folder."""

    editor: ImageEditor
    scorers: PictureScorers
    run: Run
    options: PictureEditOptions
    seed: int

    def score_all(self, pairs: Sequence[EditPair], tick: Tick) -> None:
        """Score the pairs that are not scored yet."""
        known = {line["uid"] for line in self.run.read("cases")}
        left = [pair for pair in pairs if pair.uid not in known]
        tick("pairs", len(known))
        (self.run.folder / "pictures").mkdir(exist_ok=True)
        size = self.options.batch_size
        for start in range(0, len(left), size):
            batch = left[start : start + size]
            self.run.append("cases", self.score_batch(batch))
            tick("pairs", len(batch))

    def score_batch(self, pairs: Sequence[EditPair]) -> list[dict[str, Any]]:
        """Edit some pairs, write the pictures, and return their lines."""
        began = time.monotonic()
        sources = [pair.source() for pair in pairs]
        jobs = []
        for source, pair in zip(sources, pairs, strict=True):
            jobs.append(EditJob(source, pair.instruction, self.seed))
        results = self.editor.edit(
            jobs,
            self.options.settings,
            batch_size=self.options.batch_size,
        )
        seconds = (time.monotonic() - began) / len(pairs)
        lines = []
        for pair, source, result in zip(pairs, sources, results, strict=True):
            write_atomic(_file(self.run.folder, pair), png(result.picture))
            line = _line(pair, source, result, self.scorers)
            line["seconds"] = round(seconds, 4)
            lines.append(line)
        if self.scorers.judge is not None:
            edited = [result.picture for result in results]
            reached = self.scorers.judge.reached(edited, pairs)
            _add_reached(lines, "scores", reached)
            reached = self.scorers.judge.reached(sources, pairs)
            _add_reached(lines, "unchanged", reached)
        return lines


def _add_reached(
    lines: Sequence[dict[str, Any]], key: str, values: Sequence[float | None]
) -> None:
    for line, value in zip(lines, values, strict=True):
        if value is not None:
            line[key]["reached"] = value


def _file(folder: Path, pair: EditPair) -> Path:
    """Return the file of the edited picture of a pair."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "--", pair.uid)
    return folder / "pictures" / f"{stem}.png"


def _write_gallery(pairs: Sequence[EditPair], folder: Path, title: str) -> Path:
    """Write a page with the first pairs of each kind (before, edited, wanted), and a sheet; return the page."""
    home = folder / "gallery"
    home.mkdir(exist_ok=True)
    by_kind: dict[str, list[EditPair]] = {}
    for pair in pairs:
        by_kind.setdefault(pair.kind, []).append(pair)
    sections = []
    first_rows = []
    for kind, some in by_kind.items():
        rows = [_gallery_row(pair, folder) for pair in some[:_SHOWN]]
        sections.append((kind or "edits", rows))
        first_rows += rows[:2]
    gallery.contact_sheet(first_rows, home / "sheet.png")
    page = home / "index.html"
    gallery.page(title, sections, page)
    return page


def _gallery_row(pair: EditPair, folder: Path) -> gallery.Row:
    """Write small copies of the pictures of a pair, and return its row."""
    edited = _file(folder, pair)
    files = {}
    for name, load in (("before", pair.source), ("wanted", pair.target)):
        picture = load()
        picture.thumbnail((gallery.THUMB, gallery.THUMB))
        files[name] = folder / "gallery" / f"{edited.stem}-{name}.png"
        write_atomic(files[name], png(picture))
    cells = [
        ("before", [files["before"]]),
        ("edited", [edited]),
        ("wanted", [files["wanted"]]),
    ]
    return pair.instruction, cells


def _line(
    pair: EditPair,
    source: Image.Image,
    result: EditedPicture,
    scorers: PictureScorers,
) -> dict[str, Any]:
    goal = pair.target()
    return {
        "uid": pair.uid,
        "kind": pair.kind,
        "instruction": pair.instruction,
        "expressive": result.expressive,
        "expressive_source": result.source,
        "warnings": list(result.warnings),
        "scores": score(result.picture, source, goal, pair, scorers),
        "unchanged": score(source, source, goal, pair, scorers),
    }


def score(
    output: Image.Image,
    source: Image.Image,
    goal: Image.Image,
    pair: EditPair,
    scorers: PictureScorers,
) -> dict[str, float]:
    """Return the scores of an output by name; those without a value for this pair are left out."""
    o = picture_scores.pixels(output, goal)
    g = picture_scores.pixels(goal)
    v = picture_scores.pixels(source, goal)
    shortest = min(goal.size)
    scores: dict[str, float | None] = {
        "L1": picture_scores.l1(o, g),
        "L2": picture_scores.l2(o, g),
        "kept": picture_scores.preserved(o, v, g),
        "SSIM": None,
    }
    if shortest >= picture_scores.SMALLEST:
        scores["SSIM"] = picture_scores.ssim(o, g)
    if scorers.clip is not None:
        scores |= _clip_scores(scorers.clip, (output, goal, source), pair)
    if scorers.dino is not None:
        of_output, of_goal = scorers.dino.pictures([output, goal])
        scores["DINO"] = picture_scores.similarity(of_output, of_goal)
    if scorers.lpips is not None and shortest >= SMALLEST:
        scores["LPIPS"] = float(scorers.lpips(o[None], g[None]))
    return {name: value for name, value in scores.items() if value is not None}


def _clip_scores(
    clip: ClipEncoder, pictures: Sequence[Image.Image], pair: EditPair
) -> dict[str, float | None]:
    """Return the scores by CLIP of (output, goal, source)."""
    output, goal, source = clip.pictures(pictures)
    scores: dict[str, float | None] = {}
    scores["CLIP-I"] = picture_scores.similarity(output, goal)
    if not pair.target_caption:
        return scores
    captions = [pair.caption or pair.target_caption, pair.target_caption]
    before, after = clip.texts(captions)
    scores["CLIP-T"] = picture_scores.similarity(output, after)
    if pair.caption:
        scores["direction"] = picture_scores.direction(source, output, before, after)
    return scores


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by score, mean, n and interval, and the mean of the unchanged pictures."""
    found = {}
    for name in SCORES:
        values = _values(lines, "scores", name)
        if not values:
            continue
        summarise = score_with_interval if name == "reached" else mean_with_interval
        unchanged = _values(lines, "unchanged", name)
        found[name] = {
            **summarise(values),
            "unchanged": fmean(unchanged) if unchanged else None,
        }
    return found


def _values(lines: Sequence[Mapping[str, Any]], key: str, name: str) -> list[float]:
    return [line[key][name] for line in lines if name in line[key]]


def _summary_by_kind(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    kinds = sorted({line["kind"] for line in lines if line["kind"]})
    found = {}
    for kind in kinds:
        found[kind] = summary([line for line in lines if line["kind"] == kind])
    return found
