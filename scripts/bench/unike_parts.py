"""What each part of UniKE does on a small model: scores without it, and how far it moves what it works on.

    python scripts/bench/unike_parts.py --edits 40
    python scripts/bench/unike_parts.py --edits 10 --data emojikb:eval --with mode=reference

Edits are made one after another and everything is asked after all of them. `attention moved` is the mean length of
what the external memory changes in the output of attention, as a share of that output, where a question is about an
edit. All rows have the layers that the networks were trained for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedit_cli import registry
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.evaluation.answers import ask
from mmedit_cli.knowledge.evaluation.protocol import distinct_queries, score_case
from mmedit_cli.knowledge.methods.unike import memory
from mmedit_cli.knowledge.methods.unike.editor import Unike
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.trained_networks import find_networks
from mmedit_cli.types import EditCase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare_editors import FIGURES, table

SCORE = "tf_liveedit"
ROWS: tuple[tuple[str, ...], ...] = (
    (),
    ("external=false",),
    ("collaboration=false",),
    ("external=false", "collaboration=false"),
    ("beta=2",),
    ("beta=-2",),
    ("intrinsic=false",),
    ("intrinsic=false", "share=0.8"),
    ("intrinsic=false", "collaboration=false", "share=0.8"),
    ("intrinsic=false", "collaboration=false", "share=0.8", "top_k=1"),
    ("neurons=1",),
    ("neurons=1", "external=false", "collaboration=false"),
)


@contextmanager
def watched() -> Iterator[list[float]]:
    """Inside the block, note how far the external memory moves the output of attention each time."""
    moved: list[float] = []
    blend = memory.blend

    def noting(output: Tensor, known: Tensor, share: Tensor) -> Tensor:
        turned = blend(output, known, share)
        with torch.no_grad():
            change = (turned - output).norm(dim=-1).mean()
            length = output.norm(dim=-1).mean()
            moved.append(float(change / length))
        return turned

    memory.blend = noting
    try:
        yield moved
    finally:
        memory.blend = blend


def measured(
    backbone: VisionLanguageModel, cases: Sequence[EditCase], overrides: Sequence[str]
) -> dict[str, str]:
    """Return a row: the scores in % after all edits, and how far attention was moved."""
    hparams = load_hparams(
        registry.hparams_file("unike"),
        Unike.Hparams,
        variant=backbone.name,
        overrides=overrides,
    )
    editor = Unike(backbone, hparams)
    found = find_networks("unike", backbone.name, Path("records"))
    editor.load_networks(found.path)
    queries = distinct_queries(cases)
    layer = editor.first_layer
    settings: dict[str, Any] = {"top": {}, "max_new_tokens": 0, "batch_size": 32}
    base = ask(backbone, queries, layer=layer, **settings)
    for case in cases:
        editor.edit([case.request])
    affected = list(compress(queries, editor.affects(queries)))
    with watched() as moved:
        after = {**base, **ask(backbone, affected, layer=layer, **settings)}
    editor.undo()
    lines = [score_case(case, base, after, (SCORE,))["scores"][SCORE] for case in cases]
    row = {"changed": ", ".join(overrides) or "nothing"}
    for name, columns in FIGURES.items():
        values = [
            line[column] for line in lines for column in columns if column in line
        ]
        row[name] = f"{100 * statistics.fmean(values):.1f}" if values else ""
    row["attention moved"] = f"{statistics.fmean(moved):.2f}" if moved else "0"
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-blip2")
    parser.add_argument("--data", default="emojikb:val")
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument(
        "--every", type=int, default=3, help="take each so-many-th case"
    )
    parser.add_argument(
        "--with", dest="always", action="append", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument("--rows", type=int, default=len(ROWS), help="the first so many")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    backbone = load_backbone(args.model, device="cpu")
    cases = read_data(args.data).cases[:: args.every][: args.edits]
    known = load_hparams(
        registry.hparams_file("unike"), Unike.Hparams, variant=backbone.name
    )
    first = Unike(backbone, known).first_layer
    queries = distinct_queries(cases)
    activations = backbone.cached_activations(first, queries, group=32, budget=1 << 30)
    with activations:
        rows = [
            measured(backbone, cases, (*args.always, *row)) for row in ROWS[: args.rows]
        ]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
