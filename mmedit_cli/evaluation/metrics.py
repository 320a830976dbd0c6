"""Scores as pure functions; the name of a protocol goes with every number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

_ARTICLES = frozenset({"a", "an", "the"})
_UP_TO_TWENTY = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBERS = {str(value): word for value, word in enumerate(_UP_TO_TWENTY)}


# -- free generation (protocols ar, ar_em, ar_f1) ---------------------------------------------------------------


def normalize(text: str) -> list[str]:
    """Return the words that count: lower case, no punctuation, no articles, numbers up to twenty as words."""
    words = re.findall(r"\w+(?:'\w+)?", text.lower().replace("_", " "))
    return [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]


def answer_match(prediction: str, target: str) -> float:
    """Return 1 if the prediction equals the target or goes on after it with whole words, both normalised; else 0."""
    said, wanted = normalize(prediction), normalize(target)
    if not wanted:  # a target of articles or signs alone has no words to compare
        return exact_match(prediction, target)
    return float(said[: len(wanted)] == wanted)


def same_answer(before: str, after: str) -> float:
    """Return 1 if two generations are the same once normalised (without any words: literally the same)."""
    words = normalize(before), normalize(after)
    return float(words[0] == words[1]) if any(words) else float(before.strip() == after.strip())


def exact_match(prediction: str, target: str) -> float:
    """Return 1 if the two texts are equal but for white space at the ends."""
    return float(prediction.strip() == target.strip())


def token_f1(prediction: str, target: str) -> float:
    """Return the harmonic mean of precision and recall over normalised words (two empty texts: 1)."""
    said, wanted = normalize(prediction), normalize(target)
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


# -- teacher forcing (protocols tf_liveedit, tf_easyedit, tf_em) ------------------------------------------------


def agreement(predicted: Sequence[int], expected: Sequence[int]) -> tuple[int, int]:
    """Return (equal positions, positions) of two arg-max sequences of the same length."""
    return sum(p == e for p, e in zip(predicted, expected, strict=True)), len(expected)


def topk_agreement(base: Tensor, edited: Tensor) -> tuple[int, int]:
    """Return (equal entries, entries) of two ordered top-k lists (L0, k) and (L1, k), tails aligned if L0 != L1.

    Order counts: one swap of two near ties costs two entries (EasyEdit, `topk_token_match`).
    """
    length = min(len(base), len(edited))
    equal = base[-length:] == edited[-length:]
    return int(equal.sum()), equal.numel()


def topk_ids(logits: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest logits at each position, in order: (..., V) -> (..., min(k, V))."""
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices
