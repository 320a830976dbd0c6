"""Teach ten counterfactual facts to a real language model with each editor, and measure what became of it.

    mmedit download smollm2-135m
    python scripts/real_facts.py                                    # all editors of facts in text: the table
    python scripts/real_facts.py ft --facts tuning --set steps=10   # one editor on the facts to tune with

Every editor teaches the facts one after another to the same untouched model, and then everything is asked: the ten
facts, a paraphrase of each, eight questions about other things, facts about the world that the untouched model knows,
and the perplexity of a text in the public domain. Answers are greedy; right is an answer that begins with the target.
Kept is an answer that is the same as before up to its first comma or full stop, for a language model goes on and on
(in brackets: all of it), and a fact about the world that is still answered right.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli import Query, load_backbone, load_editor
from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.ability import (
    Ability,
    Probe,
    compared,
    measure_ability,
)
from mmedit_cli.knowledge.evaluation.metrics import answer_match, same_answer
from mmedit_cli.registry import share_dir

MODEL = "smollm2-135m"
EDITORS = (
    "ft",
    "lora",
    "t-patcher",
    "multi-melo",
    "grace",
    "ultraedit",
    "memit",
    "alphaedit",
    "wise",
    "m-ore",
    "ike",
)  # of those that teach facts in text and need no training
DATA = share_dir("data") / "real"
ANSWER = 8  # tokens of an answer at most
HEAD = (
    "| editor | facts | paraphrases | others kept (word for word) "
    "| world facts kept | perplexity | seconds an edit |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Sides:
    """What is taught and asked, and what the untouched model can do."""

    facts: Sequence[Query]
    reworded: Sequence[Query]
    others: Sequence[Query]
    probe: Probe
    able: Ability

    @classmethod
    def of(cls, side: str, model: Any) -> Sides:
        """Read the side "facts" or "tuning", and measure the untouched model."""
        cases = load_cases(DATA / f"{side}.jsonl")
        probe = Probe.shipped(tuning=side == "tuning")
        return cls(
            [case.request for case in cases],
            [query for case in cases for query in case.generality["text"]],
            [query for case in cases for query in case.locality.get("text", ())],
            probe,
            measure_ability(model, probe),
        )


def answers(model: Any, queries: Sequence[Query]) -> list[str]:
    """Return the greedy answers."""
    return model.generate(queries, max_new_tokens=ANSWER)


def measure(
    name: str, model: Any, sides: Sides, overrides: Sequence[str]
) -> dict[str, Any]:
    """Teach all facts with one editor, ask everything, and take the edits back."""
    others = answers(model, sides.others)
    editor = load_editor(name, model, overrides=overrides)
    start = time.perf_counter()
    for fact in sides.facts:
        editor.edit([fact])
    seconds = (time.perf_counter() - start) / len(sides.facts)
    row: dict[str, Any] = {"editor": name, "seconds": seconds}
    row["facts"] = right(model, sides.facts)
    row["paraphrases"] = right(model, sides.reworded)
    after = answers(model, sides.others)
    row["others"] = kept([begun(a) for a in others], [begun(a) for a in after])
    row["others_word_for_word"] = kept(others, after)
    able = measure_ability(model, sides.probe)
    row |= compared(sides.able, able)
    editor.undo()
    assert answers(model, sides.others) == others, "undone"
    return row


def right(model: Any, queries: Sequence[Query]) -> list[int]:
    """Return how many answers begin with their targets, and of how many."""
    said = answers(model, queries)
    found = [answer_match(a, q.target) for a, q in zip(said, queries, strict=True)]
    return [int(sum(found)), len(found)]


def kept(before: Sequence[str], after: Sequence[str]) -> list[int]:
    """Return how many answers are the same, and of how many."""
    same = [same_answer(*pair) for pair in zip(before, after, strict=True)]
    return [int(sum(same)), len(same)]


def begun(answer: str) -> str:
    """Return an answer up to its first sign that is followed by a blank."""
    return re.split(r"[.,;:](?=\s|$)", answer)[0]


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [f"`{row['editor']}`"]
    for what in ("facts", "paraphrases", "others"):
        count, of = row[what]
        cells.append(f"{count} of {of}")
    cells[-1] += f" ({row['others_word_for_word'][0]})"
    cells.append(f"{row['world']['kept']} of {row['world']['n']}")
    cells.append(f"{row['perplexity']['after']:.2f}")
    cells.append(f"{row['seconds']:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, and write the rows as JSON lines if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("editors", nargs="*", default=EDITORS)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--facts", choices=("facts", "tuning"), default="facts")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, help="JSON lines")
    options = parser.parse_args()
    model = load_backbone(options.model, device="cpu", dtype="float32")
    sides = Sides.of(options.facts, model)
    print(
        f"untouched: perplexity {sides.able.perplexity:.2f}", HEAD, sep="\n", flush=True
    )
    for name in options.editors:
        row = measure(name, model, sides, options.overrides)
        print(line(row), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
