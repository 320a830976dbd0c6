"""Make a model folder of what a training of mgie left: weights in half precision, and how they came about.

python scripts/pack_mini_mgie.py records/train-image-editor/mgie/.../0123456789ab runs/mini-mgie
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mini_training import replacing_folder

from mmedit_cli.errors import UserError
from mmedit_cli.model_folder import CHECKPOINT
from mmedit_cli.records import Run
from mmedit_cli.storage import read_tensors, write_tensors


def pack(run: Path, folder: Path, settings: dict[str, float]) -> None:
    """Write the folder; raise UserError if the training is not finished."""
    report = Run.finished(run)
    if report is None:
        raise UserError(
            f"{run}: not a finished training",
            "mmedit train-editor mgie goes on with it",
        )
    tensors, metadata = read_tensors(run / CHECKPOINT)
    about, hparams = report["environment"], report["hparams"]
    training = {
        "name": folder.name,
        "model": report["model"]["name"],
        "diffusion": hparams["diffusion"],
        "parameters": report["trained_parameters"],
        "trained_pairs": report["data"]["cases"],
        "steps": report["steps"],
        "batch_size": hparams["training"]["batch_size"],
        "seconds": report["cost"]["seconds"],
        "curve": report["curve"],
        "hparams": hparams,
        "machine": {
            key: about[key]
            for key in ("platform", "device", "device_name", "threads", "commit")
        },
        "versions": report["versions"],
    }
    with replacing_folder(
        folder, {"training.json": training, "settings.json": settings}
    ) as fresh:
        write_tensors(
            fresh / CHECKPOINT,
            {name: tensor.half() for name, tensor in tensors.items()},
            metadata,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of the training")
    parser.add_argument(
        "folder",
        type=Path,
        help="the model folder to write; one that is there is replaced",
    )
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={},
        help='e.g. {"steps": 20, "text_guidance": 3.0}',
    )
    args = parser.parse_args(argv)
    try:
        pack(args.run, args.folder, args.settings)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
