"""Measure what mini-smol knows of EmojiKB and which wordings it understands: a table and scores.json.

    mmedit download mini-smol
    python scripts/score_mini_smol.py                       # everything, into data/models/mini-smol
    python scripts/score_mini_smol.py --model FOLDER --sample 50 --pictures 2

Answers are greedy and free; right is an answer that begins with the target. A wording is asked of pictures whose
question the model answers right in a wording of its training, so a picture it does not know is not held against it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from mini_vlm_data import DATA, TYPES, EmojiKB, load_emojikb, number
from mini_vlm_open import all_wordings
from score_mini_vlm import (
    Item,
    answer,
    figures,
    items,
    measure_and_print,
    sampled,
    stages_table,
)

from mmedit_cli import runtime
from mmedit_cli.catalog import PARTS, parts_folder
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.loading import load_backbone
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.storage import write_atomic, write_json

NAME = "mini-smol"
TARGETS = {"name": 0.85}
UNDERSTOOD = 0.97
LATER = Path(__file__).with_name("later_wordings.json")  # that no training read


def pictures(kb: EmojiKB, kind: str, count: int) -> list[Item]:
    """Return questions of a type about trained pictures, in the first wordings; which ones is told by a hash."""
    found = [item for item in items(kb) if item.figures[0] == kind]
    found.sort(key=lambda item: number("wording of", kind, item.picture))
    return found[:count]


def in_wordings(
    known: Sequence[Item], wordings: Sequence[str], count: int
) -> list[Item]:
    """Return each wording asked of `count` of the questions that are known, one after another."""
    asked = []
    for place, wording in enumerate(wordings):
        for turn in range(count):
            item = known[(place * count + turn) % len(known)]
            query = replace(item.query, prompt=wording)
            asked.append(replace(item, query=query, figures=(wording,)))
    return asked


def understanding(
    model: VisionLanguageModel,
    kb: EmojiKB,
    wordings: dict[str, list[str]],
    count: int,
    batch_size: int,
) -> dict[str, Any]:
    """Return how many questions in new wordings are answered right, by type, and the wordings that are not."""
    found: dict[str, Any] = {}
    for kind in TYPES:
        asked = pictures(kb, kind, 4 * count * 5)
        answers = answer(model, asked, batch_size)
        known = [
            item
            for item, text in zip(asked, answers, strict=True)
            if answer_match(text, item.query.target)
        ]
        questions = in_wordings(known, wordings[kind], count)
        texts = answer(model, questions, batch_size)
        right = defaultdict(list)
        for item, text in zip(questions, texts, strict=True):
            right[item.query.prompt].append(answer_match(text, item.query.target))
        shares = {wording: sum(r) / len(r) for wording, r in right.items()}
        found[kind] = {
            "value": round(sum(shares.values()) / len(shares), 4),
            "n": len(questions),
            "missed": sorted(w for w, share in shares.items() if share < 0.5),
        }
    total = [found[kind]["value"] for kind in TYPES]
    return {"value": round(sum(total) / len(total), 4), "types": found}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return all scores, written to scores.json of --out."""
    started = time.monotonic()
    model = load_backbone(args.model, device=args.device, dtype=args.dtype)
    kb = load_emojikb(None, args.held_out[0], args.held_out[1])
    asked = sampled(list(items(kb)), args.sample)
    found = figures(asked, answer(model, asked, args.batch_size), TARGETS)
    trained = all_wordings(kb.templates, "train")
    wordings = json.loads((DATA / "wordings.json").read_text("utf-8"))
    sides = {
        "of training": {kind: trained[kind]["image"] for kind in TYPES},
        "of evaluation": {kind: wordings[kind]["eval"] for kind in TYPES},
    }
    if LATER.exists():
        sides["written later"] = json.loads(LATER.read_text("utf-8"))
    words = {
        side: understanding(model, kb, asked_in, args.pictures, args.batch_size)
        for side, asked_in in sides.items()
    }
    scores = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "protocol": "greedy free generation, answer_match",
        "sample": args.sample,
        "pictures": args.pictures,
        "dtype": args.dtype,
        "figures": found,
        "wordings": words,
        "seconds": round(time.monotonic() - started, 1),
        "versions": runtime.versions(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "scores.json", scores, indent=1)
    if (args.out / PARTS).is_file():
        write_atomic(args.out / "README.md", card(scores, args.out))
    return scores


def table(scores: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    rows = ["| figure | right | target | questions |", "|---|---:|---:|---:|"]
    for name, figure in scores["figures"].items():
        target = "" if figure["target"] is None else f"{figure['target']:.0%}"
        rows.append(f"| {name} | {figure['value']:.1%} | {target} | {figure['n']:,} |")
    for side, found in scores["wordings"].items():
        count = sum(figure["n"] for figure in found["types"].values())
        rows.append(
            f"| wordings {side} | {found['value']:.1%} | {UNDERSTOOD:.0%} | {count:,} |"
        )
        for kind, figure in found["types"].items():
            rows.append(
                f"| wordings {side}: {kind} | {figure['value']:.1%} | | {figure['n']:,} |"
            )
    return "\n".join(rows)


def card(scores: dict[str, Any], folder: Path) -> str:
    """Return the text of the model card beside the parts in a folder."""
    training = json.loads((folder / "training.json").read_text("utf-8"))
    machine = training["machine"]
    size = (folder / PARTS).stat().st_size
    options = "".join(
        f" --{name} {scores[name]}"
        for name in ("sample", "pictures", "dtype")
        if scores[name] is not None
    )
    template = Path(__file__).with_name("mini_smol_card.md").read_text("utf-8")
    return Template(template).substitute(
        megabytes=f"{size / 1e6:.1f}",
        rank=training["rank"],
        parameters=f"{training['parameters'] / 1e6:.2f} million",
        options=options,
        figures=table(scores),
        stages=stages_table(training),
        machine=f"{machine['platform']}, {machine['device_name']}, {machine['threads']} threads",
        note=training.get("note", ""),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--out", type=Path, default=parts_folder(NAME))
    parser.add_argument("--sample", type=int, default=None, metavar="N")
    parser.add_argument(
        "--pictures", type=int, default=5, help="pictures a wording is asked of"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        nargs=2,
        default=(60, 150),
        help="concepts and drawings, as in the recipe",
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    return measure_and_print(args.threads, lambda: measure(args), table)


if __name__ == "__main__":
    sys.exit(main())
