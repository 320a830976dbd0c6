"""What 10,000 edits cost: seconds an edit, memory, and seconds a question before and after.

    python scripts/bench/many_edits.py ultraedit --turn 100
    python scripts/bench/many_edits.py grace --turn 100 --text

The edits are those of EmojiKB's training side, made anew on other backgrounds until there are enough; with `--text`
they are facts without a picture, about things with a number, which are faster. Asked are the newest of the edits,
and as many questions of the same kind that no edit is about: processor time, the median of five passes. Memory is the
most that the process had, less what it had before the first edit.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmedit_cli import load_backbone, load_editor
from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.types import Query

MODEL = "mini-blip2"
ASKED = 64  # questions of one kind
PASSES = 5


def pictures(count: int) -> Iterator[Query]:
    """Yield so many requests, no two with the same picture, question and background."""
    cases = load_cases("emojikb:train")
    for turn in range(-(-count // len(cases))):
        for case in cases[: count - turn * len(cases)]:
            yield replace(case.request, background=f"#{turn:02x}{turn:02x}{turn:02x}")


def facts(count: int) -> Iterator[Query]:
    """Yield so many requests without a picture: numbered things, with the answers of the training side in turn."""
    answers = sorted({case.request.target for case in load_cases("emojikb:train")})
    for number in range(count):
        target = answers[number % len(answers)]
        yield Query(f"Which category does the thing {number} belong to?", target)


def peak() -> float:
    """Return the most memory that the process had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def asking(model: Any, questions: Sequence[Query]) -> float:
    """Return the milliseconds of the processor that a question takes: the median of some passes."""
    seconds = []
    for _ in range(PASSES):
        start = time.process_time()
        with torch.no_grad():
            model.logits(model.batch(questions))
        seconds.append(time.process_time() - start)
    return 1000 * statistics.median(seconds) / len(questions)


def right(model: Any, questions: Sequence[Query]) -> float:
    """Return the share of answer tokens that are the likeliest, in %."""
    batch = model.batch(questions)
    with torch.no_grad():
        likeliest = model.logits(batch)[batch.predicting].argmax(-1)
    return 100 * float((likeliest == batch.answers).float().mean())


def main() -> None:
    """Make the edits in turns and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("editor", choices=("ultraedit", "grace"))
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--turn", type=int, default=100, help="edits of one operation")
    parser.add_argument("--text", action="store_true", help="facts without a picture")
    parser.add_argument("--report", type=int, default=1000)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_backbone(MODEL, device="cpu", dtype="float32")
    editor = load_editor(arguments.editor, model, overrides=arguments.overrides)
    made = facts if arguments.text else pictures
    requests = list(made(arguments.edits + ASKED))
    requests, others = requests[:-ASKED], requests[-ASKED:]
    first = requests[: min(ASKED, arguments.report)]
    print(
        f"before: {asking(model, first):.2f} ms a question, {asking(model, others):.2f} another"
    )
    before = peak()
    spent = 0.0
    for start in range(0, len(requests), arguments.turn):
        begun = time.process_time()
        editor.edit(requests[start : start + arguments.turn])
        spent += time.process_time() - begun
        count = min(start + arguments.turn, len(requests))
        if count % arguments.report and count < len(requests):
            continue
        newest = requests[max(0, count - ASKED) : count]
        print(
            f"{count:,}: {spent / count:.3f} CPU s an edit, {peak() - before:.0f} MiB more, "
            f"{asking(model, newest):.2f} ms a question, {asking(model, others):.2f} another; "
            f"right: first {right(model, first):.1f} %, newest {right(model, newest):.1f} %",
            flush=True,
        )
    tensors = editor.tensors().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    print(f"state: {size / 2**20:.1f} MiB, {size / len(requests):.0f} bytes an edit")


if __name__ == "__main__":
    main()
