"""Teach ten counterfactual facts to a real language model with each editor, and measure what became of it.

    mmedit download smollm2-135m
    python scripts/real_facts.py                                        # all editors of facts in text: the table
    python scripts/real_facts.py ft --facts tuning --tokens 0 --set steps=10   # one editor on the facts to tune with

Every editor teaches the facts one after another to the same untouched model, and then everything is asked: the ten
facts, a paraphrase of each, eight questions about other things, and the perplexity of a text in the public domain.
Answers are greedy; right is an answer that begins with the target, and kept is one that is the same as before.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmedit_cli import Query, load_backbone, load_editor
from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.metrics import answer_match, same_answer
from mmedit_cli.registry import share_dir

MODEL = "smollm2-135m"
EDITORS = (
    "ft",
    "lora",
    "t-patcher",
    "multi-melo",
    "ike",
)  # of those that need no training
DATA = share_dir("data") / "real"
ANSWER = 8  # tokens of an answer at most
WINDOW = 256  # tokens of the text that are read at a time
HEAD = (
    "| editor | facts | paraphrases | others kept | perplexity | seconds an edit |\n"
    "|---|---:|---:|---:|---:|---:|"
)


def windows(model: Any, tokens: int) -> Iterator[Query]:
    """Yield the text in windows, `tokens` tokens in all."""
    text = (DATA / "alice.txt").read_text(encoding="utf-8")
    ids = model.tokenizer(text)["input_ids"][:tokens]
    for start in range(0, len(ids), WINDOW):
        yield Query(model.tokenizer.decode(ids[start : start + WINDOW]))


@torch.no_grad()
def perplexity(model: Any, tokens: int) -> float:
    """Return the perplexity of the text; what an editor puts in front of a window is read, but not counted."""
    total, count = 0.0, 0
    for query in windows(model, tokens):
        own = len(model.tokenizer(query.prompt)["input_ids"])
        batch = model.batch([query], with_answer=False)
        ids = batch.input_ids[0, -own:]
        logits = model.logits(batch)[0, -own:-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:])) * (own - 1)
        count += own - 1
    return math.exp(total / count) if count else math.nan


def answers(model: Any, queries: Sequence[Query]) -> list[str]:
    """Return the greedy answers."""
    return model.generate(queries, max_new_tokens=ANSWER)


def measure(
    name: str, model: Any, cases: Sequence[Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Teach all facts with one editor, ask everything, and take the edits back."""
    facts = [case.request for case in cases]
    reworded = [query for case in cases for query in case.generality["text"]]
    others = [query for case in cases for query in case.locality.get("text", ())]
    before = answers(model, others)
    editor = load_editor(name, model, overrides=options.overrides)
    start = time.perf_counter()
    for fact in facts:
        editor.edit([fact])
    seconds = (time.perf_counter() - start) / len(facts)
    found = {"facts": facts, "paraphrases": reworded}
    row: dict[str, Any] = {"editor": name, "seconds": seconds}
    for what, queries in found.items():
        said = answers(model, queries)
        right = [answer_match(a, q.target) for a, q in zip(said, queries, strict=True)]
        row[what] = f"{sum(right):.0f} of {len(right)}"
    after = answers(model, others)
    kept = [same_answer(*pair) for pair in zip(before, after, strict=True)]
    row["others"] = f"{sum(kept):.0f} of {len(kept)}"
    row["perplexity"] = perplexity(model, options.tokens)
    editor.undo()
    assert answers(model, others) == before, "undone"
    return row


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    return (
        f"| `{row['editor']}` | {row['facts']} | {row['paraphrases']} | {row['others']} "
        f"| {row['perplexity']:.2f} | {row['seconds']:.1f} |"
    )


def main() -> None:
    """Print the table, and write the rows as JSON lines if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("editors", nargs="*", default=EDITORS)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--facts", choices=("facts", "tuning"), default="facts")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, help="JSON lines")
    options = parser.parse_args()
    model = load_backbone(options.model, device="cpu", dtype="float32")
    cases = load_cases(DATA / f"{options.facts}.jsonl")
    base = perplexity(model, options.tokens)
    print(f"untouched: perplexity {base:.2f}", HEAD, sep="\n", flush=True)
    for name in options.editors:
        row = measure(name, model, cases, options)
        print(line(row), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"untouched": base, **row}) + "\n")


if __name__ == "__main__":
    main()
