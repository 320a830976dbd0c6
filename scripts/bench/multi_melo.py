"""What multi-melo costs: a question with many edits over one to the base model, in one run; memory; undo.

    python scripts/bench/multi_melo.py [--edits 10000] [--questions 256] [--repeat 5]

One thread, mini-blip2, distinct questions about the pictures of EmojiKB in batches of 32. The bank is filled with
blocks that were drawn, not trained, and the index with keys of real questions and noise: neither changes the cost.
Rows, in CPU time:
  none     nobody is sent to a block: the price of routing alone
  all      every question is sent to one, and to its own
  fresh    as `none`, but no question was ever read alone before (its key is not kept yet)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mmedit_cli import load_backbone, load_editor
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.methods.multi_melo.editor import MultiMelo
from mmedit_cli.knowledge.methods.multi_melo.index import Keys, unit
from mmedit_cli.knowledge.methods.shared.lora_blocks import fresh_blocks
from mmedit_cli.output import Output
from mmedit_cli.runtime import generator, versions
from mmedit_cli.types import Query

BATCH, BLOCKS = (
    32,
    256,
)  # questions a batch; blocks that are drawn, the edits share them
EVAL = "emojikb:train"


def fill(editor: MultiMelo, keys: Keys, edits: int) -> float:
    """Add edits with the keys given and, beyond them, keys of no question; return the seconds the index took."""
    source = generator(0)
    more = {
        n: unit(torch.randn(edits - len(keys), p.shape[1], generator=source))
        for n, p in keys.parts.items()
    }
    keys = Keys.join(
        [keys, Keys(more, torch.ones(edits - len(keys), dtype=torch.bool))]
    )
    blocks = fresh_blocks(editor._bank.shapes, editor.hparams.rank, list(range(BLOCKS)))
    for b in blocks.b.values():
        b.normal_(std=1e-3, generator=source)
    requests = [Query("?", f"answer {i}") for i in range(edits)]
    began = time.perf_counter()
    editor._add(blocks, [i % BLOCKS for i in range(edits)], keys, requests, [0] * edits)
    return time.perf_counter() - began


def seconds(run: Callable[[], None]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    """Measure and print one row a question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = Output()
    backbone = load_backbone("mini-blip2", device="cpu")
    requests = [case.request for case in read_data(EVAL, limit=options.questions).cases]
    queries = [
        replace(query, prompt=f"{i % 1000}. {query.prompt}")
        for i, query in enumerate(requests)
    ]
    batches = [
        backbone.batch(queries[i : i + BATCH]) for i in range(0, len(queries), BATCH)
    ]

    def ask() -> None:
        with torch.no_grad():
            for batch in batches:
                backbone.logits(batch)

    editors = {name: load_editor("multi-melo", backbone) for name in ("none", "all")}
    keys = Keys.join([editors["all"]._keys_of(batch.queries) for batch in batches])
    ratios: dict[str, list[float]] = {"none": [], "all": [], "fresh": []}
    for _ in range(options.repeat):
        for name in ratios:
            editor = editors["all" if name == "all" else "none"]
            base = seconds(ask)
            index = fill(editor, keys if name == "all" else keys[:0], options.edits)
            if name != "fresh":
                ask()  # questions that are read alone are kept
            else:
                editor._keys._questions.clear()
            ratios[name].append(seconds(ask) / base)
            sent = sum(
                row is not None and row >= 0 for row in editor._rows(queries).values()
            )
            assert sent == (len(queries) if name == "all" else 0), (
                f"{sent} of {len(queries)} were sent to a block"
            )
            editor._reset()
    asked = f"{len(queries)} questions in batches of {BATCH}"
    out.line(
        f"mini-blip2, {options.edits:,} edits, {asked}, torch {versions()['torch']}"
    )
    for name, values in ratios.items():
        middle = sorted(values)[len(values) // 2]
        out.line(
            f"{name:6s} {middle:.2f} times the base model ({min(values):.2f} to {max(values):.2f})"
        )
    editor = editors["all"]
    block = sum(
        t[0].numel()
        for t in fresh_blocks(
            editor._bank.shapes, editor.hparams.rank, [0]
        ).parameters()
    )
    key = sum(part.shape[1] for part in keys.parts.values())
    out.line(
        f"an edit takes {4 * block:,} bytes of block and {4 * key + 14:,} of key, label and radius"
    )
    out.line(
        f"the index of {options.edits:,} edits is built in {index:.2f} s, which is what undoing one costs"
    )
    published = fresh_blocks({str(i): (2560, 2560) for i in range(16)}, 8, [0])
    n = sum(tensor.numel() for tensor in published.parameters())
    out.line(
        f"a block of the published shape (16 layers of 2560 x 2560, rank 8) has {n:,} parameters"
    )


if __name__ == "__main__":
    main()
