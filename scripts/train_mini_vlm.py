"""Train a mini vision-language model on EmojiKB, stage after stage: tower, then decoder, then both together.

    python scripts/train_mini_vlm.py scripts/mini_blip2.yaml --out runs/mini-blip2             # again: continues
    python scripts/train_mini_vlm.py scripts/mini_blip2.yaml --out runs/mini-blip2 --minutes 30  # stops in time
    python scripts/train_mini_vlm.py scripts/mini_blip2.yaml --out /tmp/quick --quick            # a minute

`OUT/<stage>.safetensors` holds what a stage is continued from, `OUT/log.jsonl` its curve, and `OUT/<name>/` the model
as it is shipped, in float16. Continued or not, the result is the same to the last bit on a CPU with as many threads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from mini_runs import Stop, run, run_parser, train_stages, training_record
from mini_vlm_data import load_emojikb
from mini_vlm_model import STAGES, Recipe, export
from mini_vlm_training import Trainee, adopt_tower

from mmedit_cli.errors import UserError


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    stages: tuple[str, ...],
    stop: Stop,
    tower_from: Path | None = None,
    start_from: Path | None = None,
    teacher: Path | None = None,
) -> bool:
    """Train the stages one after another and write the model folder; return whether all came to their end.

    A run that begins starts with `tower_from`, the tower.safetensors or the model folder of a BLIP-2, from its tower,
    and with `start_from`, a model folder, from that model, whose tokenizer it keeps. `teacher`, a file of
    mini_vlm_teacher.py, teaches the tower.
    """
    if teacher is None and any(recipe.stages[name].teach for name in stages):
        raise UserError(
            "this recipe's tower has a teacher",
            "--teacher takes the file that scripts/mini_vlm_teacher.py writes",
        )
    out.mkdir(parents=True, exist_ok=True)
    kb = load_emojikb(**recipe.world)
    trainee = Trainee(recipe, kb, device, start_from, teacher)
    begun = any((out / f"{stage}.safetensors").exists() for stage in STAGES)
    if tower_from is not None and not begun:
        adopt_tower(trainee, tower_from, out)
    elif start_from is not None and kb.open and not begun:
        trainee.prime()
    return train_stages(
        trainee,
        out,
        stages,
        stop,
        lambda: export(
            trainee.adapter, out / recipe.name, _records(trainee, out, start_from)
        ),
    )


def _records(trainee: Trainee, out: Path, start: Path | None) -> dict[str, Any]:
    """Return what the model folder tells about its training: what was held out, how it went, and what came before."""
    holdout = trainee.kb.holdout
    return {
        "holdout.json": {
            "concepts": list(holdout.concepts),
            "artists": holdout.artists,
        },
        "training.json": {
            "name": trainee.recipe.name,
            "concepts": len(trainee.kb.concepts),
            "trained_pictures": len(trainee.pictures.usable),
            **_world(trainee),
            "parameters": sum(p.numel() for p in trainee.model.parameters()),
            **training_record(trainee, out),
            **_before(start),
        },
    }


def _before(start: Path | None) -> dict[str, Any]:
    """Return how the model that was started from had been trained."""
    if start is None:
        return {}
    record = json.loads((start / "training.json").read_text(encoding="utf-8"))
    kept = ("stages", "machine", "versions", "started_from")
    return {"started_from": {key: record[key] for key in kept if key in record}}


def _world(trainee: Trainee) -> dict[str, Any]:
    """Return whose drawings and which wordings an open training uses, for `mmedit doctor emojikb`."""
    if not trainee.kb.open:
        return {}
    drawn = [trainee.kb.drawings[place] for place in trainee.pictures.usable.tolist()]
    return {
        "artists": sorted({artist for _, artist in drawn}),
        "wordings": {
            kind: forms["image"] for kind, forms in trainee.kb.templates.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = run_parser(__doc__, STAGES)
    parser.add_argument(
        "--tower-from",
        type=Path,
        help="start from the tower of mini-blip2: a run's tower.safetensors, or the model folder",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        help="start from this model folder; to be given each time the run is continued",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        help="teach the tower what this file of mini_vlm_teacher.py holds",
    )
    args = parser.parse_args(argv)
    return run(
        args,
        Recipe,
        train,
        tower_from=args.tower_from,
        start_from=args.start_from,
        teacher=args.teacher,
    )


if __name__ == "__main__":
    sys.exit(main())
