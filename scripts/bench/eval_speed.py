"""What the evaluator costs beside a plain script that does the least: CPU time and counts, in one run.

    python scripts/bench/eval_speed.py [--edits 100 1000] [--model mini-blip2] [--repeats 3]

One thread. Teacher-forced LiveEdit evaluation of N sequential edits on EmojiKB, answers before and after. The floor
is written out below: each distinct picture encoded once, each distinct question and answer run to the edit layer once,
the upper layers in batches sorted by length, the head at answer positions only. It writes nothing down and cannot be
resumed; the evaluator can. Both sides run interleaved and must give the same answers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.protocol import Protocol, evaluate_edits
from mmedit_cli.knowledge.loading import load_backbone, load_editor
from mmedit_cli.knowledge.methods.liveedit.editor import LiveEdit
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.output import Output
from mmedit_cli.pictures import Picture
from mmedit_cli.records import Run
from mmedit_cli.runtime import quiet_libraries, versions
from mmedit_cli.types import EditCase, Query

BATCH = 32


@torch.no_grad()
def floor(
    editor: LiveEdit, cases: list[EditCase]
) -> dict[Query, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the arg-max answers before and after all edits; only what cannot be left out is computed."""
    backbone, layer = editor.backbone, editor.first_layer
    queries = backbone.by_length(
        q for case in cases for _, qs in case.columns() for q in qs
    )
    pictures = list(
        dict.fromkeys(
            Picture(q.image, q.background) for q in queries if q.image is not None
        )
    )
    tokens: dict[Picture, Tensor] = {}
    for part in parts(pictures):
        tokens.update(zip(part, backbone.image_features(part), strict=True))
    hidden: dict[Query, Tensor] = {}
    before: dict[Query, tuple[int, ...]] = {}
    after: dict[Query, tuple[int, ...]] = {}
    plain = backbone.image_features
    backbone.image_features = lambda wanted: [tokens[picture] for picture in wanted]  # type: ignore[method-assign]
    try:
        for part in parts(queries):
            batch = backbone.batch(part)
            prefix = backbone.prefix(batch, layer)
            hidden.update(
                zip(
                    part,
                    (
                        row[:n]
                        for row, n in zip(prefix.hidden, batch.lengths, strict=True)
                    ),
                    strict=True,
                )
            )
            before.update(zip(part, said(backbone, prefix), strict=True))
        for part in parts([case.request for case in cases]):
            batch = backbone.batch(part)
            prefix = backbone.prefix_of(
                pad_sequence([hidden[q] for q in part], batch_first=True), batch, layer
            )
            u, v = editor.networks.experts(prefix, backbone)
            vision, prompt = editor.networks.keys(
                prefix, backbone.mean_image_tokens(batch)
            )
            editor._add({"u": u, "v": v, "vision": vision, "prompt": prompt}, part)
        for part in parts([q for q in queries if q.image is not None]):
            batch = backbone.batch(part)
            prefix = backbone.prefix_of(
                pad_sequence([hidden[q] for q in part], batch_first=True), batch, layer
            )
            after.update(zip(part, said(backbone, prefix), strict=True))
    finally:
        backbone.image_features = plain  # type: ignore[method-assign]
        editor._reset()
    return {q: (before[q], after.get(q, before[q])) for q in queries}


def said(backbone: VisionLanguageModel, prefix: Any) -> list[tuple[int, ...]]:
    """Return the arg-max at the answer positions of each row."""
    at = prefix.batch.predicting
    best = backbone.resume(prefix, at).argmax(-1)
    return [tuple(row.tolist()) for row in best.split(at.sum(1).tolist())]


def parts(items: list[Any]) -> Iterator[list[Any]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def evaluator(editor: LiveEdit, cases: list[EditCase]) -> list[dict[str, Any]]:
    """Run the evaluator on the same edits; return the lines of its cases."""
    protocol = Protocol(
        sequential=len(cases),
        protocols=("tf_liveedit",),
        batch_size=BATCH,
        edit_batch=BATCH,
    )
    with tempfile.TemporaryDirectory() as folder, Run.open(Path(folder), {}, {}) as run:
        evaluate_edits(editor, cases, run, protocol)
        return run.read("cases")


@contextmanager
def counting(backbone: VisionLanguageModel) -> Iterator[Counter[str]]:
    """Count pictures that are encoded, sequences run from the bottom, and positions the head sees."""
    counts: Counter[str] = Counter()
    encode, compute = backbone.image_features, backbone._compute_prefix
    head = backbone.anchors.module("head")

    def counted_encode(pictures: Any) -> Any:
        counts["pictures"] += len(pictures)
        return encode(pictures)

    def counted_prefix(batch: Any, layer: int) -> Any:
        counts["prefixes"] += len(batch.queries)
        return compute(batch, layer)

    backbone.image_features, backbone._compute_prefix = counted_encode, counted_prefix  # type: ignore[method-assign]
    handle = head.register_forward_hook(
        lambda _m, args, _o: counts.update(positions=args[0].shape[:-1].numel())
    )
    try:
        yield counts
    finally:
        handle.remove()
        backbone.image_features, backbone._compute_prefix = encode, compute  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--model", default="mini-blip2")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    backbone = load_backbone(options.model, device="cpu")
    editor = load_editor(
        "liveedit", backbone, overrides=["refine=0"]
    )  # what is measured is the asking
    assert isinstance(editor, LiveEdit)
    out, rows = Output(), []
    for n in options.edits:
        cases = load_cases("emojikb", limit=n)
        times: dict[str, list[float]] = {"floor": [], "evaluator": []}
        for _ in range(options.repeats):
            start = time.process_time()
            expected = floor(editor, cases)
            times["floor"].append(time.process_time() - start)
            with counting(backbone) as counts:
                start = time.process_time()
                lines = evaluator(editor, cases)
                times["evaluator"].append(time.process_time() - start)
        check(cases, expected, lines)
        queries = list(expected)
        distinct = {
            "pictures": len(
                {Picture(q.image, q.background) for q in queries if q.image}
            ),
            "prefixes": len(queries),
            "positions": sum(len(before) for before, _ in expected.values()),
        }
        least = {side: min(seconds) for side, seconds in times.items()}
        ratio = least["evaluator"] / least["floor"]
        rows.append(
            [
                str(n),
                f"{least['floor']:.1f}",
                f"{least['evaluator']:.1f}",
                f"{ratio:.2f}",
            ]
        )
        rows[-1] += [f"{counts[key]:,} of {distinct[key]:,}" for key in distinct]
    header = [
        "edits",
        "floor, CPU s",
        "evaluator, CPU s",
        "ratio",
        "pictures encoded",
        "prefixes",
        "head positions",
    ]
    out.table(header, rows)
    out.line(
        "head positions: the evaluator's, before and after, of those of all answers once"
    )
    out.line(
        ", ".join(
            f"{name} {version}"
            for name, version in versions().items()
            if name in ("python", "torch", "transformers")
        )
    )


def check(
    cases: list[EditCase], expected: dict[Query, Any], lines: list[dict[str, Any]]
) -> None:
    """Raise AssertionError where the two sides score a case differently."""
    by_case = {line["case"]: line["scores"]["tf_liveedit"] for line in lines}
    wrong = 0
    for case in cases:
        for column, queries in case.columns():
            if not column.startswith("locality"):
                continue
            points = []
            for query in queries:
                before, after = expected[query]
                points.append(
                    sum(x == y for x, y in zip(before, after, strict=True))
                    / len(before)
                )
            wrong += abs(by_case[case.uid][column] - sum(points) / len(points)) > 1e-9
    assert wrong <= len(cases) // 200, (
        f"{wrong} columns differ"
    )  # near ties may fall either way in other batches


if __name__ == "__main__":
    main()
