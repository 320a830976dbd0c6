"""Write the trained networks of an editor as they come along with mmedit: in eight bits.

    python scripts/pack_networks.py records/train-editor/liveedit/mini-blip2/emojikb/0123456789ab \\
        data/editors/liveedit/mini-blip2.safetensors

Measure what is written, not what was trained: `mmedit eval liveedit` takes the new file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmedit_cli.eight_bits import to_eight_bits
from mmedit_cli.errors import UserError
from mmedit_cli.model_folder import CHECKPOINT
from mmedit_cli.storage import read_tensors, write_tensors


def pack(run: Path, out: Path) -> int:
    """Write the networks of a run in eight bits; return the size of the file in bytes."""
    tensors, metadata = read_tensors(run / CHECKPOINT)
    write_tensors(out, to_eight_bits(tensors), metadata)
    return out.stat().st_size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a training")
    parser.add_argument("out", type=Path, help="data/editors/EDITOR/MODEL.safetensors")
    args = parser.parse_args(argv)
    try:
        print(f"{args.out}: {pack(args.run, args.out):,} bytes")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
