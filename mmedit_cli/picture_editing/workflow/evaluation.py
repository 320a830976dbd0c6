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
from mmedit_cli.knowledge.evaluation.report import (
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
from mmedit_cli.picture_editing.methods.shared.loading import LoadOptions
from mmedit_cli.picture_editing.workflow.editing import (
    EditOptions,
    load_editor,
    own_networks,
)
from mmedit_cli.picture_editing.workflow.training import DATA
from mmedit_cli.pictures import png
from mmedit_cli.records import Run
from mmedit_cli.storage import write_atomic

if TYPE_CHECKING:
    from mmedit_cli.drawing.evaluation.picture_scores import ClipEncoder, DinoEncoder
    from mmedit_cli.picture_editing.evaluation.judge import Judge

FOLDER = "eval-image-editor"  # below the records
# better is: less, or more; the first of them are of the pixels alone
SCORES = {
    "L1": "less",
    "L2": "less",
    "SSIM": "more",
    "kept": "less",
    "CLIP-I": "more",
    "CLIP-T": "more",
}
SCORES |= {"DINO": "more", "direction": "more", "LPIPS": "less", "reached": "more"}
_LOOKS = (
    "clip",
    "dino",
    "lpips",
    "judge",
)  # what takes scores, by the name of a model, folder or file
_KEYS: dict[str, type] = {
    "steps": int, "text_guidance": float, "image_guidance": float, "resolution": int, **dict.fromkeys(_LOOKS, str),
}  # fmt: skip
JUDGE, NOBODY = (
    "mini-blip2",
    "none",
)  # who is asked whether an edit was made where pairs say what to ask
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
class Encoders:
    """What scores are taken with beside the pixels; None leaves those scores out."""

    clip: ClipEncoder | None = None
    dino: DinoEncoder | None = None
    lpips: Lpips | None = None
    judge: Judge | None = None


def read_settings(overrides: Sequence[str]) -> tuple[EditSettings, dict[str, str]]:
    """Return (settings, names of what takes scores) of KEY=VALUE texts; raise HparamsError with all that is wrong."""
    found = read_values(overrides, _KEYS)
    looks = {name: found.pop(name, "") for name in _LOOKS}
    return EditSettings(**found), looks


def evaluate(options: ImageEvalOptions, out: Output | None = None) -> dict[str, Any]:
    """Evaluate an image editor and return the report; a finished run is only read, an interrupted one goes on.

    Raises a UserError for bad input, before anything is written.
    """
    out = out or Output()
    settings, looks = read_settings(options.overrides)
    options = replace(options, editor=options.editor.replace("_", "-"))
    registry.image_editors.get(options.editor)
    name, pairs = open_pairs(
        DATA if options.data == "emojikb" else options.data, limit=options.limit
    )
    asked = EditOptions(
        options.editor,
        options.model,
        options.load,
        settings,
        records=options.records,
        checkpoint=options.checkpoint,
    )
    networks = own_networks(asked)
    editor = load_editor(asked, out)
    looks["judge"] = looks["judge"] or (
        JUDGE if any(pair.question for pair in pairs) else NOBODY
    )
    encoders = load_encoders(looks, str(editor.device))
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
        "encoders": looks,
        "seed": options.seed,
        "versions": runtime.versions(),
    }
    folder = Run.locate(
        options.records, (FOLDER, options.editor, editor.model, name), config
    )
    if (
        report := Run.done_before(folder, force=options.force, say=out.note)
    ) is not None:
        return report
    with Run.open(
        folder, config, runtime.environment(editor.device), force=options.force
    ) as run:
        if report := Run.done_before(folder, force=False, say=out.note):
            return report  # of an equal command that ended meanwhile
        with out.progress({"pairs": len(pairs)}) as tick:
            _score_all(
                editor,
                encoders,
                pairs,
                run,
                replace(asked, batch_size=options.batch_size),
                options.seed,
                tick,
            )
        lines = run.read("cases")
        report = {
            "format": 1,
            **config,
            "networks": None if networks is None else networks.facts(),
            "environment": run.environment,
            "scores": summary(lines),
            "by_kind": {
                kind: summary([x for x in lines if x["kind"] == kind])
                for kind in _kinds(lines)
            },
            "cost": {
                "seconds_per_edit": round(fmean(line["seconds"] for line in lines), 4)
            },
            "gallery": str(
                _draw(pairs, folder, f"{options.editor} ({editor.model}) on {name}")
            ),
            "run": str(folder),
        }
        run.finish(report)
    return report


def load_encoders(looks: Mapping[str, str], device: str) -> Encoders:
    """Return what takes scores, by names (see `_LOOKS`; empty: none); raise ModelError if one is not usable."""
    clip, dino, lpips, judge = (looks.get(name, "") for name in _LOOKS)
    found = Encoders()
    if clip or dino:
        found = Encoders(*load_clip_and_dino(clip, dino, device))
    if lpips:
        found = replace(found, lpips=Lpips.load(Path(lpips)))
    if judge not in ("", NOBODY):
        from mmedit_cli.knowledge.models.shared.loading import load_backbone
        from mmedit_cli.picture_editing.evaluation.judge import Judge

        found = replace(found, judge=Judge(load_backbone(judge, device=device)))
    return found


def _score_all(
    editor: ImageEditor,
    encoders: Encoders,
    pairs: Sequence[EditPair],
    run: Run,
    options: EditOptions,
    seed: int,
    tick: Any,
) -> None:
    """Edit and score what is not scored yet; the edited pictures stay in the run folder."""
    known = {line["uid"] for line in run.read("cases")}
    left = [pair for pair in pairs if pair.uid not in known]
    tick("pairs", len(known))
    (run.folder / "pictures").mkdir(exist_ok=True)
    for start in range(0, len(left), options.batch_size):
        part = left[start : start + options.batch_size]
        began = time.monotonic()
        sources = [pair.source() for pair in part]
        jobs = [
            EditJob(source, pair.instruction, seed)
            for source, pair in zip(sources, part, strict=True)
        ]
        results = editor.edit(jobs, options.settings, batch_size=options.batch_size)
        seconds = (time.monotonic() - began) / len(part)
        lines = []
        for pair, source, result in zip(part, sources, results, strict=True):
            write_atomic(_file(run.folder, pair), png(result.picture))
            lines.append(
                _line(pair, source, result, encoders) | {"seconds": round(seconds, 4)}
            )
        if encoders.judge is not None:
            for title, pictures in (
                ("scores", [result.picture for result in results]),
                ("unchanged", sources),
            ):
                for line, value in zip(
                    lines, encoders.judge.reached(pictures, part), strict=True
                ):
                    line[title] |= {} if value is None else {"reached": value}
        run.append("cases", lines)
        tick("pairs", len(part))


def _file(folder: Path, pair: EditPair) -> Path:
    """Return where the edited picture of a pair is kept."""
    return folder / "pictures" / f"{re.sub(r'[^A-Za-z0-9._-]+', '--', pair.uid)}.png"


def _draw(pairs: Sequence[EditPair], folder: Path, title: str) -> Path:
    """Draw the first pairs of each kind, before, after and wanted; return the page that shows them."""
    home, sections = folder / "gallery", []
    home.mkdir(exist_ok=True)
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        rows: list[gallery.Row] = []
        for pair in [pair for pair in pairs if pair.kind == kind][:_SHOWN]:
            files = {
                name: home / f"{_file(folder, pair).stem}-{name}.png"
                for name in ("before", "wanted")
            }
            for name, load in (("before", pair.source), ("wanted", pair.target)):
                picture = load()
                picture.thumbnail((gallery.THUMB, gallery.THUMB))
                write_atomic(files[name], png(picture))
            shown = {
                "before": files["before"],
                "edited": _file(folder, pair),
                "wanted": files["wanted"],
            }
            rows.append(
                (pair.instruction, [(name, [file]) for name, file in shown.items()])
            )
        sections.append((kind or "edits", rows))
    gallery.contact_sheet(
        [row for _, rows in sections for row in rows[:2]], home / "sheet.png"
    )
    gallery.page(title, sections, home / "index.html")
    return home / "index.html"


def _line(
    pair: EditPair, source: Image.Image, result: EditedPicture, encoders: Encoders
) -> dict[str, Any]:
    goal = pair.target()
    return {
        "uid": pair.uid,
        "kind": pair.kind,
        "instruction": pair.instruction,
        "expressive": result.expressive,
        "expressive_source": result.source,
        "warnings": list(result.warnings),
        "scores": score(result.picture, source, goal, pair, encoders),
        "unchanged": score(source, source, goal, pair, encoders),
    }


def score(
    output: Image.Image,
    source: Image.Image,
    goal: Image.Image,
    pair: EditPair,
    encoders: Encoders,
) -> dict[str, float]:
    """Return the scores of an output by name; those that have no value for this pair are left out."""
    o, g, v = (
        picture_scores.pixels(output, goal),
        picture_scores.pixels(goal),
        picture_scores.pixels(source, goal),
    )
    found: dict[str, float | None] = {
        "L1": picture_scores.l1(o, g), "L2": picture_scores.l2(o, g), "kept": picture_scores.preserved(o, v, g),
        "SSIM": picture_scores.ssim(o, g) if min(goal.size) >= picture_scores.SMALLEST else None,
    }  # fmt: skip
    if encoders.clip is not None:
        eo, eg, ev = encoders.clip.pictures([output, goal, source])
        found["CLIP-I"] = picture_scores.similarity(eo, eg)
        if pair.target_caption:
            before, after = encoders.clip.texts(
                [pair.caption or pair.target_caption, pair.target_caption]
            )
            found["CLIP-T"] = picture_scores.similarity(eo, after)
            found["direction"] = (
                picture_scores.direction(ev, eo, before, after)
                if pair.caption
                else None
            )
    if encoders.dino is not None:
        found["DINO"] = picture_scores.similarity(
            *encoders.dino.pictures([output, goal])
        )
    if encoders.lpips is not None and min(goal.size) >= SMALLEST:
        found["LPIPS"] = float(encoders.lpips(o[None], g[None]))
    return {name: value for name, value in found.items() if value is not None}


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by score, mean, n and interval, and the mean of giving the picture back as it is."""
    found = {}
    for name in SCORES:
        values = [line["scores"][name] for line in lines if name in line["scores"]]
        floor = [line["unchanged"][name] for line in lines if name in line["unchanged"]]
        if values:
            summarise = score_with_interval if name == "reached" else mean_with_interval
            found[name] = {
                **summarise(values),
                "unchanged": fmean(floor) if floor else None,
            }
    return found


def _kinds(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({line["kind"] for line in lines if line["kind"]})
