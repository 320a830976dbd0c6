"""Train mini-sd, a Stable Diffusion of 64x64 pixels, on EmojiKB: autoencoder, then text encoder and UNet.

    python scripts/train_mini_sd.py scripts/mini_sd.yaml --out runs/mini-sd               # again: continues
    python scripts/train_mini_sd.py scripts/mini_sd.yaml --out runs/mini-sd --minutes 30  # stops in time
    python scripts/train_mini_sd.py scripts/mini_sd.yaml --out /tmp/quick --quick         # a minute

`OUT/<stage>.safetensors` holds what a stage is continued from, `OUT/log.jsonl` its curve, and `OUT/mini-sd/` the model
as it is shipped, in float16, for StableDiffusionPipeline.from_pretrained. Continued or not, the result is the same to
the last bit on a CPU with as many threads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from mini_runs import Stop, run, run_parser, train_stages, training_record
from mini_sd_data import load_drawn
from mini_sd_model import Recipe, export
from mini_sd_training import Trainee

GUIDANCE = 2.0  # names are drawn best with it: score_mini_sd.py


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    stages: tuple[str, ...],
    stop: Stop,
) -> bool:
    """Train the stages one after another and write the model folder; return whether all came to their end."""
    out.mkdir(parents=True, exist_ok=True)
    trainee = Trainee(recipe, load_drawn(**recipe.data), device)
    return train_stages(
        trainee,
        out,
        stages,
        stop,
        lambda: export(trainee.pipeline(), out / recipe.name, _records(trainee, out)),
    )


def _records(trainee: Trainee, out: Path) -> dict[str, Any]:
    """Return what the model folder tells about its training: what it was taught, what held out, and how it went."""
    drawn, parts = trainee.drawn, (trainee.vae, trainee.text_encoder, trainee.unet)
    return {
        "settings.json": {"guidance": GUIDANCE},
        "concepts.json": {
            "taught": [c["id"] for c in drawn.concepts],
            "held_out": {c["id"]: c["name"] for c in drawn.held_out},
        },
        "training.json": {
            "name": trainee.recipe.name,
            "data": trainee.recipe.data,
            "trained_pictures": len(drawn.drawings),
            "parameters": sum(p.numel() for part in parts for p in part.parameters()),
            **training_record(trainee, out),
        },
    }


def main(argv: list[str] | None = None) -> int:
    return run(run_parser(__doc__, Recipe.STAGES).parse_args(argv), Recipe, train)


if __name__ == "__main__":
    sys.exit(main())
