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

from mmedit_cli import registry, runtime
from mmedit_cli.errors import ModelError, UserError
from mmedit_cli.evaluation import images
from mmedit_cli.evaluation.report import mean_with_interval
from mmedit_cli.hparams import read_values
from mmedit_cli.image_editors._loading import LoadOptions
from mmedit_cli.image_editors.base import Edited, ImageEditor, Job, Settings
from mmedit_cli.image_edits import EditOptions, load_editor
from mmedit_cli.image_pairs.base import EditPair, fingerprint, open_pairs
from mmedit_cli.image_training_runs import DATA
from mmedit_cli.output import Output
from mmedit_cli.pictures import png
from mmedit_cli.records import Run, write_atomic

if TYPE_CHECKING:
    from mmedit_cli.evaluation.images import ClipEncoder, DinoEncoder

FOLDER = "eval-image-editor"  # below the records
# better is: less, or more; the first of them are of the pixels alone
SCORES = {"L1": "less", "L2": "less", "SSIM": "more", "kept": "less", "CLIP-I": "more", "CLIP-T": "more"}
SCORES |= {"DINO": "more", "direction": "more"}
_KEYS: dict[str, type] = {
    "steps": int, "text_guidance": float, "image_guidance": float, "resolution": int, "clip": str, "dino": str,
}  # fmt: skip


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


@dataclass(frozen=True)
class Encoders:
    """What scores are taken with beside the pixels; None leaves those scores out."""

    clip: ClipEncoder | None = None
    dino: DinoEncoder | None = None


def read_settings(overrides: Sequence[str]) -> tuple[Settings, str, str]:
    """Return (settings, CLIP model, DINO model) of KEY=VALUE texts; raise HparamsError with all that is wrong."""
    found = read_values(overrides, _KEYS)
    clip, dino = found.pop("clip", ""), found.pop("dino", "")
    return Settings(**found), clip, dino


def evaluate(
    options: ImageEvalOptions, out: Output | None = None, strange: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """Evaluate an image editor and return the report; a finished run is only read, an interrupted one goes on.

    `strange` are options of the command that mean nothing here, and whether they were given. Raises a UserError for
    bad input, before anything is written.
    """
    out = out or Output()
    if wrong := [option for option, given in (strange or {}).items() if given]:
        raise UserError(f"{', '.join(wrong)}: means nothing to an image editor", "its settings: --set steps=30")
    settings, clip, dino = read_settings(options.overrides)
    options = replace(options, editor=options.editor.replace("_", "-"))
    registry.image_editors.get(options.editor)
    name, pairs = open_pairs(DATA if options.data == "emojikb" else options.data, limit=options.limit)
    asked = EditOptions(options.editor, options.model, options.load, settings, records=options.records)
    editor = load_editor(asked, out)
    encoders = load_encoders(clip, dino, str(editor.device))
    config = {
        "command": "eval",
        "editor": options.editor,
        "model": {"name": editor.model, "fingerprint": editor.fingerprint},
        "dtype": options.load.dtype,
        "data": {"name": name, "cases": len(pairs), "fingerprint": fingerprint(pairs)},
        "settings": {**asdict(settings.over(editor.defaults)), "resolution": settings.resolution or editor.resolution},
        "encoders": {"clip": clip, "dino": dino},
        "seed": options.seed,
        "versions": runtime.versions(),
    }
    folder = Run.locate(options.records, (FOLDER, options.editor, editor.model, name), config)
    if (report := Run.done_before(folder, force=options.force, say=out.note)) is not None:
        return report
    with Run.open(folder, config, runtime.environment(editor.device), force=options.force) as run:
        with out.progress({"pairs": len(pairs)}) as tick:
            _score_all(editor, encoders, pairs, run, replace(asked, batch_size=options.batch_size), options.seed, tick)
        lines = run.read("cases")
        report = {
            "format": 1,
            **config,
            "environment": run.environment,
            "scores": summary(lines),
            "by_kind": {kind: summary([x for x in lines if x["kind"] == kind]) for kind in _kinds(lines)},
            "cost": {"seconds_per_edit": round(fmean(line["seconds"] for line in lines), 4)},
            "run": str(folder),
        }
        run.finish(report)
    return report


def load_encoders(clip: str, dino: str, device: str) -> Encoders:
    """Return the encoders of that name (a folder or hub id; empty: none); raise ModelError if one is not usable."""
    if not clip and not dino:
        return Encoders()
    from transformers import AutoModel, AutoProcessor

    from mmedit_cli.evaluation.images import ClipEncoder, DinoEncoder

    try:
        eye = AutoModel.from_pretrained(dino).to(device) if dino else None
        both = AutoModel.from_pretrained(clip).to(device) if clip else None
        processor = AutoProcessor.from_pretrained(clip) if clip else None
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise ModelError(f"clip={clip} dino={dino}: cannot be loaded: {reason}", "folders or hub ids") from error
    if both is not None and not hasattr(both, "get_text_features"):
        raise ModelError(f"clip={clip}: does not encode texts and pictures in one space", "name a CLIP")
    return Encoders(
        ClipEncoder(both, processor, clip) if both is not None else None,
        DinoEncoder(eye, dino) if eye is not None else None,
    )


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
        jobs = [Job(source, pair.instruction, seed) for source, pair in zip(sources, part, strict=True)]
        results = editor.edit(jobs, options.settings, batch_size=options.batch_size)
        seconds = (time.monotonic() - began) / len(part)
        lines = []
        for pair, source, result in zip(part, sources, results, strict=True):
            write_atomic(
                run.folder / "pictures" / f"{re.sub(r'[^A-Za-z0-9._-]+', '--', pair.uid)}.png", png(result.picture)
            )
            lines.append(_line(pair, source, result, encoders) | {"seconds": round(seconds, 4)})
        run.append("cases", lines)
        tick("pairs", len(part))


def _line(pair: EditPair, source: Image.Image, result: Edited, encoders: Encoders) -> dict[str, Any]:
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
    output: Image.Image, source: Image.Image, goal: Image.Image, pair: EditPair, encoders: Encoders
) -> dict[str, float]:
    """Return the scores of an output by name; those that have no value for this pair are left out."""
    o, g, v = images.pixels(output, goal), images.pixels(goal), images.pixels(source, goal)
    found: dict[str, float | None] = {
        "L1": images.l1(o, g), "L2": images.l2(o, g), "kept": images.preserved(o, v, g),
        "SSIM": images.ssim(o, g) if min(goal.size) >= images.SMALLEST else None,
    }  # fmt: skip
    if encoders.clip is not None:
        eo, eg, ev = encoders.clip.pictures([output, goal, source])
        found["CLIP-I"] = images.similarity(eo, eg)
        if pair.target_caption:
            before, after = encoders.clip.texts([pair.caption or pair.target_caption, pair.target_caption])
            found["CLIP-T"] = images.similarity(eo, after)
            found["direction"] = images.direction(ev, eo, before, after) if pair.caption else None
    if encoders.dino is not None:
        found["DINO"] = images.similarity(*encoders.dino.pictures([output, goal]))
    return {name: value for name, value in found.items() if value is not None}


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by score, mean, n and interval, and the mean of giving the picture back as it is."""
    found = {}
    for name in SCORES:
        values = [line["scores"][name] for line in lines if name in line["scores"]]
        floor = [line["unchanged"][name] for line in lines if name in line["unchanged"]]
        if values:
            found[name] = {**mean_with_interval(values), "unchanged": fmean(floor) if floor else None}
    return found


def _kinds(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({line["kind"] for line in lines if line["kind"]})
