"""What a model can do that no edit is about: the perplexity of a text, and facts about the world.

`data/real/README.md` says where both are from. A model that was not touched gets the same figures twice, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.reading import read_text
from mmedit_cli.registry import share_dir
from mmedit_cli.types import Query

WINDOW = 256  # tokens of the text that are read at a time, and fewer by a model that reads no more
ANSWER = 6  # tokens of an answer at most
TOKENS = 2048  # of the text
_GROUP = 64  # facts of one pass


@dataclass(frozen=True)
class Probe:
    """A text, how many tokens of it are read, and facts with their true answers."""

    text: str
    facts: tuple[Query, ...]
    tokens: int = TOKENS

    @classmethod
    def shipped(cls, *, tuning: bool = False, tokens: int = TOKENS) -> Probe:
        """Return the probe that comes along; with `tuning` the other half of its text, and other facts.

        Raises DataError where its files are not there.
        """
        folder = share_dir("data") / "real"
        text = read_text(folder / "alice.txt")
        middle = text.index("\n\n", len(text) // 2)
        half = text[middle:] if tuning else text[:middle]
        name = "world-tuning.jsonl" if tuning else "world.jsonl"
        cases = load_cases(folder / name)
        facts = [case.request for case in cases]
        return cls(
            half,
            tuple(facts),
            tokens,
        )

    def described(self) -> dict[str, Any]:
        """Return what the figures depend on, as plain values."""
        facts = [(fact.prompt, fact.target) for fact in self.facts]
        return {"text": self.text, "tokens": self.tokens, "facts": facts}


@dataclass(frozen=True)
class Ability:
    """The perplexity of the text, and which of the facts are answered right."""

    perplexity: float
    right: tuple[bool, ...]


def measure_ability(backbone: VisionLanguageModel, probe: Probe) -> Ability:
    """Read the text and ask the facts; answers are greedy, and right if they begin with the true one."""
    right: list[bool] = []
    for start in range(0, len(probe.facts), _GROUP):
        group = probe.facts[start : start + _GROUP]
        answers = backbone.generate(group, max_new_tokens=ANSWER)
        for query, answer in zip(group, answers, strict=True):
            right.append(answer_match(answer, query.target) == 1)
    return Ability(perplexity(backbone, probe), tuple(right))


def compared(before: Ability, after: Ability) -> dict[str, Any]:
    """Return what a report says: perplexities, and how many of the facts known before are answered right after."""
    known = [now for was, now in zip(before.right, after.right, strict=True) if was]
    return {
        "perplexity": {"before": before.perplexity, "after": after.perplexity},
        "world": {"n": len(known), "kept": sum(known)},
    }


@torch.no_grad()
def perplexity(backbone: VisionLanguageModel, probe: Probe) -> float:
    """Return the perplexity of the text, NaN if no token is read.

    What an editor puts in front of a window is read, but not counted.
    """
    total, count = 0.0, 0
    for query in _windows(backbone, probe):
        own = len(_ids(backbone, query.prompt))
        batch = backbone.batch([query], with_answer=False)
        ids = batch.input_ids[0, -own:]
        logits = backbone.logits(batch)[0, -own:-1]
        each = F.cross_entropy(
            logits.float(),
            ids[1:],
            reduction="sum",
        )
        total += float(each)
        count += own - 1
    return math.exp(total / count) if count else math.nan


def _windows(backbone: VisionLanguageModel, probe: Probe) -> Iterator[Query]:
    """Yield the text in windows that the model can read."""
    size = min(WINDOW, backbone.max_length // 2)
    ids = _ids(backbone, probe.text)[: probe.tokens]
    for start in range(0, len(ids), size):
        window = ids[start : start + size]
        text = backbone.tokenizer.decode(window, skip_special_tokens=True)
        if text.strip():
            yield Query(text)


def _ids(backbone: VisionLanguageModel, text: str) -> Sequence[int]:
    ids: Sequence[int] = backbone.tokenizer(text)["input_ids"]
    return ids
