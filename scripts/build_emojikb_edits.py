"""Count the edit pairs that EmojiKB makes, write the manifest, and, if asked, the pictures themselves.

    python scripts/build_emojikb_edits.py                                   # data/emojikb-edits/manifest.json
    python scripts/build_emojikb_edits.py --export pairs --split train --limit 1000   # pictures, as InstructPix2Pix
    python scripts/build_emojikb_edits.py --sheet sheet.png                 # a look at one pair of each kind

The pairs are composed from data/emojikb when they are used (`--data emojikb-edits`): the manifest holds their number
and a digest for each side, so that a change of either is seen, and the edits that change nothing, such as to mirror
what is symmetrical: these are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageStat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmedit_cli.picture_editing.data import emojikb_edits  # noqa: E402
from mmedit_cli.picture_editing.data.base import EditPair, fingerprint  # noqa: E402
from mmedit_cli.pictures import png  # noqa: E402
from mmedit_cli.storage import write_atomic  # noqa: E402

MANIFEST = ROOT / "data" / "emojikb-edits" / "manifest.json"
LEAST = 2.0  # mean difference of 255: below it nobody sees an edit


def manifest() -> dict[str, Any]:
    """Return what the manifest says: pairs by kind, and a digest, of each side."""
    sides: dict[str, Any] = {}
    void: list[str] = []
    for split in emojikb_edits.SPLITS:
        every = emojikb_edits.every_pair(split)
        left_out = {pair.uid for pair in every if change(pair) < LEAST}
        pairs = [pair for pair in every if pair.uid not in left_out]
        void += sorted(left_out)
        kinds = dict(sorted(Counter(pair.kind for pair in pairs).items()))
        sides[split] = {
            "pairs": len(pairs),
            "fingerprint": fingerprint(pairs),
            "kinds": kinds,
        }
    about = {
        "name": "emojikb-edits",
        "made_from": "data/emojikb",
        "side": emojikb_edits.SIZE,
    }
    return {**about, "splits": sides, "without_effect": void}


def change(pair: EditPair) -> float:
    """Return the mean difference between the two pictures of a pair, 0 .. 255."""
    return fmean(
        ImageStat.Stat(ImageChops.difference(pair.source(), pair.target())).mean
    )


def export(pairs: list[EditPair], folder: Path) -> None:
    """Write pairs as InstructPix2Pix does: ID/prompt.json, ID/0_0.png, ID/0_1.png."""
    for pair in pairs:
        place = folder / pair.uid
        place.mkdir(parents=True, exist_ok=True)
        told = {
            "edit": pair.instruction,
            "input": pair.caption,
            "output": pair.target_caption,
            "expressive": pair.expressive,
        }
        write_atomic(place / "0_0.png", png(pair.source()))
        write_atomic(place / "0_1.png", png(pair.target()))
        write_atomic(place / "prompt.json", json.dumps(told, ensure_ascii=False))


def sheet(pairs: list[EditPair]) -> Image.Image:
    """Return a picture with the first pair of each kind."""
    firsts = list({pair.kind: pair for pair in reversed(pairs)}.values())
    firsts.sort(key=lambda pair: pair.kind)
    height, width = emojikb_edits.SIZE + 26, 460
    paper = Image.new("RGB", (2 * width, height * ((len(firsts) + 1) // 2)), "white")
    pen = ImageDraw.Draw(paper)
    for i, pair in enumerate(firsts):
        left, top = (i % 2) * width, (i // 2) * height
        paper.paste(pair.source(), (left + 4, top + 4))
        paper.paste(pair.target(), (left + 76, top + 4))
        for j, line in enumerate((pair.kind, pair.instruction, pair.expressive)):
            pen.text((left + 148, top + 8 + 20 * j), line[:60], "black")
    return paper


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write the pictures there"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="draw one pair of each kind"
    )
    parser.add_argument("--split", choices=emojikb_edits.SPLITS, default="eval")
    parser.add_argument(
        "--limit", type=int, default=None, help="the first so many pairs"
    )
    args = parser.parse_args(argv)
    if args.sheet is not None:
        write_atomic(args.sheet, png(sheet(emojikb_edits.pairs(args.split))))
    if args.export is not None:
        export(emojikb_edits.pairs(args.split)[: args.limit], args.export)
    if args.sheet is None and args.export is None:
        MANIFEST.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(MANIFEST, json.dumps(manifest(), indent=1) + "\n")
        told = json.loads(MANIFEST.read_text(encoding="utf-8"))
        for split, side in told["splits"].items():
            print(
                f"{split}: {side['pairs']:,} pairs, {len(side['kinds'])} kinds, {side['fingerprint']}"
            )
        print(f"{len(told['without_effect']):,} edits that change nothing are left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
