"""How long a ledger takes to open, and an edit to be added, with none and with many edits in it.

    python scripts/bench/ledger.py --edits 10000

LiveEdit on mini-blip2. The edits are those of EmojiKB's training side, made anew on other backgrounds until there are
enough. Two ledgers: one with a shard for 32 edits, as `mmedit edit --requests` makes it, one with a shard for each.
Opening is `open_edits` behind a loaded library: the model, the networks and all experts. Adding is everything
up to the line that is safe on disk, the median of 20. TMPDIR says on which disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.ledger.edited_model import (
    EditOptions,
    LedgerModel,
    begin_edits,
    open_edits,
)
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.types import Query

MODEL = "mini-blip2"


def requests(count: int) -> Iterator[Query]:
    """Yield so many requests, no two with the same picture, question and background."""
    cases = load_cases("emojikb:train")
    for turn in range(-(-count // len(cases))):
        for case in cases[: count - turn * len(cases)]:
            yield replace(case.request, background=f"#{turn:02x}{turn:02x}{turn:02x}")


def opening(folder: Path) -> float:
    """Return the seconds until a ledger answers."""
    start = time.perf_counter()
    with open_edits(folder):
        return time.perf_counter() - start


def adding(edited: LedgerModel, extra: list[Query]) -> float:
    """Return the median seconds of making and keeping one edit."""
    seconds = []
    for request in extra:
        before = edited.seconds
        edited.edit([request])
        seconds.append(edited.seconds - before)
    return statistics.median(seconds)


def fill(edited: LedgerModel, facts: list[Query], size: int) -> None:
    """Make the edits 32 at a time and keep them `size` at a time, without asking for the answers before."""
    ledger, editor = edited.ledger, edited.editor
    for at in range(0, len(facts), 32):
        kept = [ledger.keep_picture(request) for request in facts[at : at + 32]]
        start = len(editor.requests)
        editor.edit(kept)
        rows = editor.tensors(start)
        for first in range(0, len(kept), size):
            part = slice(first, first + size)
            some = {name: tensor[part] for name, tensor in rows.items()}
            blank = [""] * len(kept[part])
            ledger.add(kept[part], some, before=blank, names=blank)


def main() -> None:
    """Build both ledgers in a temporary folder and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[32, 1], help="edits a shard"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    many = list(requests(arguments.edits + 20))
    facts, extra = many[: arguments.edits], many[arguments.edits :]
    options = EditOptions("liveedit", ModelOptions(MODEL, device="cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        for size in arguments.shards:
            folder = Path(temporary) / str(size)
            with begin_edits(folder, options) as edited:
                none = adding(edited, extra)
                edited.undo([edit.id for edit in edited.ledger.active])
                start = time.perf_counter()
                fill(edited, facts, size)
                built = time.perf_counter() - start
                full = adding(edited, extra)
            files = [path.stat().st_size for path in (folder / "shards").iterdir()]
            print(
                f"{len(facts):,} edits in {built:.0f} s: {len(files):,} shards, {sum(files) / 2**20:.0f} MiB"
            )
            print(
                f"  adding one edit: {1000 * none:.1f} ms at 0, {1000 * full:.1f} ms at {len(facts):,}"
            )
            print(f"  opening: {opening(folder):.2f} s, again {opening(folder):.2f} s")


if __name__ == "__main__":
    main()
