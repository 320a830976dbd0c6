"""Train mini-ip2p, an InstructPix2Pix of 64x64 pixels, on EmojiKB's edit pairs; it starts from mini-sd.

    python scripts/train_mini_ip2p.py scripts/mini_ip2p.yaml --out runs/mini-ip2p               # again: continues
    python scripts/train_mini_ip2p.py scripts/mini_ip2p.yaml --out runs/mini-ip2p --minutes 30  # stops in time
    python scripts/train_mini_ip2p.py scripts/mini_ip2p.yaml --out /tmp/quick --quick           # half a minute

`OUT/edits.safetensors` holds what a run is continued from, `OUT/log.jsonl` its curve, and `OUT/mini-ip2p/` the model
as it is shipped, in float16, for StableDiffusionInstructPix2PixPipeline.from_pretrained. Continued or not, the result
is the same to the last bit on a CPU with as many threads.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mini_ip2p_training import Recipe, Trainee
from mini_runs import Stop, run, run_parser, train_stages, training_record
from mini_sd_data import MODELS
from mini_sd_model import export


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    stages: tuple[str, ...],
    stop: Stop,
    start: Path,
) -> bool:
    """Train the denoiser and write the model folder; return whether it came to its end."""
    out.mkdir(parents=True, exist_ok=True)
    trainee = Trainee(recipe, start, device)
    trainee.prepare(out)
    return train_stages(
        trainee,
        out,
        stages,
        stop,
        lambda: export(trainee.pipeline(), out / recipe.name, _records(trainee, out)),
    )


def _records(trainee: Trainee, out: Path) -> dict[str, Any]:
    """Return what the model folder tells about its training: from what, on what, and how it went."""
    parts = (trainee.vae, trainee.text_encoder, trainee.unet)
    return {
        "training.json": {
            "name": trainee.recipe.name,
            "start": trainee.start,
            "data": trainee.recipe.data,
            "trained_pairs": len(trainee.pairs),
            "parameters": sum(p.numel() for part in parts for p in part.parameters()),
            **training_record(trainee, out),
        }
    }


def main(argv: list[str] | None = None) -> int:
    parser = run_parser(__doc__, Recipe.STAGES)
    parser.add_argument(
        "--start",
        type=Path,
        default=MODELS / "mini-sd",
        help="folder of the text-to-image model",
    )
    args = parser.parse_args(argv)
    return run(args, Recipe, partial(train, start=args.start))


if __name__ == "__main__":
    sys.exit(main())
