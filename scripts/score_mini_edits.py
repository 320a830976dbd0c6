"""Measure what a small image editor makes of EmojiKB's edit pairs, and write its model card.

    python scripts/score_mini_edits.py runs/mini-ip2p/mini-ip2p --editor instruct-pix2pix --limit 1500

Writes scores.json, a contact sheet (samples.webp) and the model card into the folder. The evaluation is that of
`mmedit eval`: it lies in the records folder, and continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image
from score_mini_vlm import measure_and_print, stages_table

from mmedit_cli.gallery import Row, contact_sheet
from mmedit_cli.output import Output
from mmedit_cli.picture_editing.data.emojikb_edits import AMBIGUOUS
from mmedit_cli.picture_editing.data.opening import open_pairs
from mmedit_cli.picture_editing.workflow.evaluation import ImageEvalOptions, evaluate
from mmedit_cli.storage import write_atomic

DATA = "emojikb-edits:eval"
TARGETS = {"background": 80, "style": 80}  # % reached
SHOWN = 3  # pairs of a kind on the sheet
ABOUT = {
    "instruct-pix2pix": "An InstructPix2Pix (AutoencoderKL, CLIP text encoder, UNet2DConditionModel of 8 channels) "
    "small enough to lie in a repository: $parameters parameters, float16, $megabytes MB.",
    "mgie": "What a training of MGIE (Fu et al. 2024) adds to `$model` and `$diffusion`, which lie beside it: visual "
    "tokens, edit head, and LoRA of the language model; $parameters parameters, float16, $megabytes MB. The language "
    "model sees the picture, spells the instruction out, and guides the denoiser.",
}
NOTES = {
    "instruct-pix2pix": "No pretrained weights, no distillation.",
    "mgie": "The edit head was drawn to what the text encoder of `$diffusion` says of the plain instruction (`align`, "
    "in units of its variance); the denoiser was not run and is as it was.",
}
COMMANDS = {
    "instruct-pix2pix": "python scripts/train_mini_ip2p.py scripts/mini_ip2p.yaml --out FOLDER",
    "mgie": "mmedit train-editor mgie --model $model --data emojikb-edits",
}


def table(scores: dict[str, Any]) -> str:
    """Return the scores of each kind of edit as a Markdown table; those whose meaning needs the picture are marked."""
    rows = [
        "| kind | pairs | reached, % | target | L1 | as it was | SSIM | as it was |",
        "|---|" + "---:|" * 7,
    ]
    for kind, found in {"all": scores["scores"], **scores["by_kind"]}.items():
        made = "" if "reached" not in found else f"{found['reached']['mean']:.1f}"
        pixels = [100 * found["L1"]["mean"], 100 * found["L1"]["unchanged"]]
        likeness = [found["SSIM"]["mean"], found["SSIM"]["unchanged"]]
        name = f"{kind} *" if kind in AMBIGUOUS else kind
        rows.append(
            f"| {name} | {found['L1']['n']:,} | {made} | {TARGETS.get(kind, '')} | {pixels[0]:.1f} | {pixels[1]:.1f} "
            f"| {likeness[0]:.2f} | {likeness[1]:.2f} |"
        )
    return "\n".join([*rows, "", "\\* its meaning needs the picture"])


def sheet(report: dict[str, Any], path: Path) -> None:
    """Draw the first pairs of each kind beside each other: before, edited, wanted."""
    drawn, gallery = Path(report["run"]) / "pictures", Path(report["gallery"]).parent
    rows: list[Row] = []
    _, pairs = open_pairs(DATA, limit=report["data"]["cases"])
    for kind in report["by_kind"]:
        some = [pair for pair in pairs if pair.kind == kind][:SHOWN]
        groups = [
            ("before", [gallery / f"{pair.uid}-before.png" for pair in some]),
            ("edited", [drawn / f"{pair.uid}.png" for pair in some]),
            ("wanted", [gallery / f"{pair.uid}-wanted.png" for pair in some]),
        ]
        rows.append(("; ".join(pair.instruction for pair in some), groups))
    with tempfile.TemporaryDirectory() as temporary:
        drawing = Path(temporary) / "sheet.png"
        contact_sheet(rows, drawing)
        with Image.open(drawing) as image:
            image.convert("RGB").save(
                path, quality=55, method=6
            )  # a PNG would be ten times as large


def card(folder: Path, editor: str, scores: dict[str, Any], limit: int | None) -> str:
    """Return the text of the model card."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    machine, settings = training["machine"], scores["settings"]
    facts = {
        "model": training.get("model", ""),
        "diffusion": training.get("diffusion", ""),
        "parameters": f"{training['parameters'] / 1e6:.2f} million",
        "megabytes": f"{sum(file.stat().st_size for file in folder.rglob('*.safetensors')) / 1e6:.1f}",
    }
    pairs = f"{training['trained_pairs']:,} pairs of `emojikb-edits:train`"
    where = (
        f"{machine['platform']}, {machine['device_name']}, {machine['threads']} threads"
    )
    if "stages" in training:
        told = (
            f"{stages_table(training)}\n\n{pairs}, starting from `{training['start']}`."
        )
    else:
        told = f"{training['steps']:,} steps of {training['batch_size']} in {training['seconds'] / 60:.0f} minutes; "
        told += f"{pairs}.\n\n{_curve(training['curve'])}"
    return Template(
        Path(__file__).with_name("mini_edits_card.md").read_text(encoding="utf-8")
    ).substitute(
        name=scores["model"],
        editor=editor,
        about=Template(ABOUT[editor]).substitute(facts),
        limit=limit or scores["n"],
        n=f"{scores['n']:,}",
        settings=f"{settings['steps']} steps, guidance {settings['text_guidance']:g} by the text and "
        f"{settings['image_guidance']:g} by the picture",
        judge=scores["judge"],
        figures=table(scores),
        command=Template(COMMANDS[editor]).substitute(facts),
        training=told,
        note=Template(NOTES[editor]).substitute(facts),
        machine=where,
    )


def _curve(lines: list[dict[str, Any]]) -> str:
    """Return the losses on held-out pairs as a Markdown table, a few steps of them."""
    names = [name for name, value in lines[-1]["held_out"].items() if value]
    rows = [f"| step | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
    for line in [*lines[:: max(1, len(lines) // 5)], lines[-1]]:
        values = " | ".join(f"{line['held_out'][name]:.3f}" for name in names)
        rows.append(f"| {line['step']:,} | {values} |")
    return "\n".join(["Losses on held-out pairs:", "", *rows, ""])


def score(
    folder: Path, editor: str, *, limit: int | None, records: Path, batch_size: int = 16
) -> dict[str, Any]:
    """Measure a model folder, write scores.json, samples.webp and README.md into it, and return the scores."""
    asked = ImageEvalOptions(
        editor,
        str(folder),
        data=DATA,
        limit=limit,
        records=records,
        batch_size=batch_size,
    )
    report = evaluate(asked, Output())
    scores = {
        "model": folder.name,
        "protocol": f"mmedit eval {editor} --model {folder.name} --data {DATA} --limit {report['data']['cases']}",
        "judge": report["encoders"]["judge"],
        "settings": report["settings"],
        "n": report["data"]["cases"],
        "scores": report["scores"],
        "by_kind": report["by_kind"],
        "seconds_per_edit": report["cost"]["seconds_per_edit"],
        "versions": report["versions"],
    }
    write_atomic(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
    sheet(report, folder / "samples.webp")
    write_atomic(folder / "README.md", card(folder, editor, scores, limit))
    return scores


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the model folder")
    parser.add_argument("--editor", choices=tuple(ABOUT), default="instruct-pix2pix")
    parser.add_argument(
        "--limit",
        type=int,
        default=None,
        metavar="N",
        help="measure N pairs, chosen by hash",
    )
    parser.add_argument("--records", type=Path, default=Path("records"))
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    return measure_and_print(
        args.threads,
        lambda: score(args.model, args.editor, limit=args.limit, records=args.records),
        table,
    )


if __name__ == "__main__":
    sys.exit(main())
