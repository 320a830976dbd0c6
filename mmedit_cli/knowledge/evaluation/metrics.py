"""Scores as pure functions; the name of a protocol goes with every number."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache

from torch import Tensor

_ARTICLES = frozenset({"a", "an", "the"})
_UP_TO_TWENTY = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty
"""
_NUMBERS = {str(value): word for value, word in enumerate(_UP_TO_TWENTY.split())}


# Scripts that are written without spaces: their words are compared character by character.
_UNSPACED = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # CJK
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
)


# -- free generation (protocols ar, ar_em, ar_f1) ---------------------------------------------------------------


def normalize(text: str) -> list[str]:
    """Return the words that count: without case, punctuation and articles, numbers up to twenty as words.

    A word keeps its vowel signs and accents, a number its sign and its decimals, and "C++" its pluses. Scripts without
    spaces (Chinese, Japanese, Thai, ...) give one word a character.
    """
    return list(_words(text))


@lru_cache(maxsize=1 << 16)  # the same answers are compared at every milestone
def _words(text: str) -> tuple[str, ...]:
    plain = text.casefold() if text.isascii() else _unified(text)
    plain = plain.replace("_", " ")
    pattern = _ascii_words() if plain.isascii() else _all_words()
    words = []
    for found in pattern.findall(plain):
        word = _without_thousands(found)
        if word not in _ARTICLES:
            words.append(_NUMBERS.get(word, word))
    return tuple(words)


def _unified(text: str) -> str:
    """Return a text such that what reads the same is the same: NFC, no case, usual apostrophe, minus and width."""
    usual = {}
    for character in set(text):
        if unicodedata.east_asian_width(character) in "FH":  # full or half width
            usual[ord(character)] = unicodedata.normalize("NFKC", character)
    usual_width = text.translate(usual)
    composed = unicodedata.normalize("NFC", usual_width)
    folded = unicodedata.normalize("NFC", composed.casefold())
    return folded.replace("\u2019", "'").replace("\u2212", "-")


@cache
def _ascii_words() -> re.Pattern[str]:
    return re.compile(_word_of(r"\w", r"\w"), re.ASCII)


@cache
def _all_words() -> re.Pattern[str]:
    marks = ""
    for character in map(chr, range(0x300, 0x1F000)):
        if unicodedata.category(character).startswith("M"):
            marks += character
    letter = rf"[^\W{_UNSPACED}]"
    inner = rf"(?:{letter}|[{marks}\u200c\u200d])"  # the joiners stand inside words of Hindi and Persian
    character = rf"(?=\w)[{_UNSPACED}][{marks}]*"
    return re.compile(rf"{_word_of(letter, inner)}|{character}")


def _word_of(letter: str, inner: str) -> str:
    """Return the pattern of a word that begins with `letter` and goes on with `inner`."""
    part = rf"{letter}{inner}*"
    between = r"(?:'|(?<=\d)[.,](?=\d))"  # don't, 3.5, 1,000
    sign = r"(?:(?<!\w)-(?=\d))?"  # -5, but not the hyphen of 1990-1995
    pluses = r"(?:[+#]+(?!\w))?"  # C++ and C#, but not 2+2
    return rf"{sign}{part}(?:{between}{part})*{pluses}"


def _without_thousands(word: str) -> str:
    """Return 1,000 as 1000."""
    if "," not in word:
        return word
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", word)


def answer_match(prediction: str, target: str) -> float:
    """Return 1 if the prediction equals the target or goes on after it with whole words, both normalised; else 0."""
    said = normalize(prediction)
    wanted = normalize(target)
    if not wanted:  # a target of articles or signs alone has no words to compare
        return exact_match(prediction, target)
    return float(said[: len(wanted)] == wanted)


def same_answer(before: str, after: str) -> float:
    """Return 1 if two generations are the same once normalised (without any words: literally the same)."""
    was = normalize(before)
    said = normalize(after)
    if not was and not said:
        return exact_match(before, after)
    return float(was == said)


def exact_match(prediction: str, target: str) -> float:
    """Return 1 if the two texts are equal but for white space at the ends."""
    said = unicodedata.normalize("NFC", prediction.strip())
    wanted = unicodedata.normalize("NFC", target.strip())
    return float(said == wanted)


def token_f1(prediction: str, target: str) -> float:
    """Return the harmonic mean of precision and recall over normalised words (two empty texts: 1)."""
    said = normalize(prediction)
    wanted = normalize(target)
    if not said or not wanted:
        return float(said == wanted)
    shared = Counter(said) & Counter(wanted)
    # equals 2 * precision * recall / (precision + recall)
    length = len(said) + len(wanted)
    return 2 * shared.total() / length


# -- teacher forcing (protocols tf_liveedit, tf_easyedit, tf_em) ------------------------------------------------


def agreement(predicted: Sequence[int], expected: Sequence[int]) -> tuple[int, int]:
    """Return (equal positions, positions) of two arg-max sequences of the same length."""
    equal = 0
    for said, wanted in zip(predicted, expected, strict=True):
        equal += said == wanted
    return equal, len(expected)


def topk_agreement(base: Tensor, edited: Tensor) -> tuple[int, int]:
    """Return (equal entries, entries) of two ordered top-k lists (L0, k) and (L1, k), tails aligned if L0 != L1.

    Order counts: one swap of two near ties costs two entries (EasyEdit, `topk_token_match`).
    """
    length = min(len(base), len(edited))
    base = base[-length:]
    edited = edited[-length:]
    equal = base == edited
    return int(equal.sum()), equal.numel()


def topk_ids(logits: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest logits at each position, in order: (..., V) -> (..., min(k, V))."""
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices
