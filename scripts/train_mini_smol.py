"""Train what joins SmolLM2 and the tower of mini-llava: image tokens as words, answers to questions, both.

    mmedit download smollm2-135m
    python scripts/train_mini_smol.py scripts/mini_smol.yaml --out runs/mini-smol             # again: continues
    python scripts/train_mini_smol.py scripts/mini_smol.yaml --out /tmp/quick --quick
    python scripts/train_mini_smol.py scripts/mini_smol.yaml --out runs/more --stage joint \
        --parts-from data/models/mini-smol/parts.safetensors                                   # trains on

`OUT/<stage>.safetensors` holds what a stage is continued from, `OUT/log.jsonl` its curve, and `OUT/mini-smol/` the
parts that the repository ships, of which `mmedit download mini-smol` makes the model.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mini_runs import Stop, run, run_parser, train_stages, training_record
from mini_smol_training import STAGES, Recipe, Trainee, parts, start_from
from mini_training import replacing_folder
from mini_vlm_data import load_emojikb
from mini_vlm_open import all_wordings
from safetensors.torch import save_file

from mmedit_cli.catalog import find_model
from mmedit_cli.storage import read_tensors


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    stages: tuple[str, ...],
    stop: Stop,
    parts_from: Path | None = None,
) -> bool:
    """Train the stages one after another and write the parts; return whether all came to their end.

    With `parts_from`, a file of parts, a run that begins starts from these.
    """
    out.mkdir(parents=True, exist_ok=True)
    kb = load_emojikb(**_data(recipe))
    templates = all_wordings(kb.templates, "train")
    kb = replace(kb, templates=templates, open=True)
    language, tower = find_model(recipe.language), find_model(recipe.tower)
    assert language.folder is not None
    assert tower.folder is not None
    trainee = Trainee(recipe, kb, device, language.folder, tower.folder)
    if parts_from is not None:
        tensors, _ = read_tensors(parts_from)
        start_from(trainee, tensors, parts_from)
    return train_stages(trainee, out, stages, stop, lambda: export(trainee, out))


def _data(recipe: Recipe) -> dict[str, Any]:
    return {
        "n": recipe.data["concepts"],
        "held_out_concepts": recipe.data["held_out_concepts"],
        "held_out_artists": recipe.data["held_out_artists"],
    }


def export(trainee: Trainee, out: Path) -> None:
    """Write the parts of the model, and what its training was like."""
    records = {"training.json": _record(trainee, out)}
    with replacing_folder(out / trainee.recipe.name, records) as fresh:
        save_file(parts(trainee), fresh / "parts.safetensors")


def _record(trainee: Trainee, out: Path) -> dict[str, Any]:
    kb = trainee.kb
    drawn = [kb.drawings[place] for place in trainee.pictures.usable.tolist()]
    trained = list(trainee.select("joint").values())
    return {
        "name": trainee.recipe.name,
        "concepts": len(kb.concepts),
        "trained_pictures": len(drawn),
        "artists": sorted({artist for _, artist in drawn}),
        "wordings": {kind: forms["image"] for kind, forms in kb.templates.items()},
        "rank": trainee.recipe.rank,
        "parameters": sum(p.numel() for p in trained),
        **training_record(trainee, out),
    }


def main(argv: list[str] | None = None) -> int:
    parser = run_parser(__doc__, STAGES)
    parser.add_argument(
        "--parts-from",
        type=Path,
        help="start from these parts, as data/models/mini-smol/parts.safetensors",
    )
    args = parser.parse_args(argv)
    return run(args, Recipe, train, parts_from=args.parts_from)


if __name__ == "__main__":
    sys.exit(main())
