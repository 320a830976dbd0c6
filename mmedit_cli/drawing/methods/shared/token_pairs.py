"""Which token of a prompt is to act as which token of another: the positions that a closed form pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from mmedit_cli.errors import DataError

Pairing = Literal["last", "tail", "all", "aligned", "subsequence"]
Positions = list[tuple[int, int]]


@dataclass(frozen=True)
class Spelled:
    """A prompt as `ids` with start, end and padding; `length` counts them up to the end, which counts too."""

    text: str
    ids: tuple[int, ...]
    length: int

    @property
    def last(self) -> int:
        """The position of the last token of the text itself; that of the start where there is none."""
        return max(self.length - 2, 0)


def last(source: Spelled, target: Spelled) -> Positions:
    """Pair the last tokens of the texts (UCE)."""
    return [(source.last, target.last)]


def tail(source: Spelled, target: Spelled) -> Positions:
    """Pair the last tokens of the texts, and what follows them: the end and the padding, which speak of them too."""
    return _onwards(source, source.last, target.last)


def every(source: Spelled, target: Spelled) -> Positions:
    """Pair equal positions (RECE)."""
    return [(i, i) for i in range(len(source.ids))]


def aligned(source: Spelled, target: Spelled) -> Positions:
    """Pair what both texts say; other tokens of the source go to what stands in their place, counted from the end.

    Where nothing stands in their place they go to the token that follows.
    """
    ours = source.ids[: source.length]
    theirs = target.ids[: target.length]
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    pairs = []
    for _, start, stop, first, behind in matcher.get_opcodes():
        lowest = first if first < behind else behind
        for i in range(start, stop):
            from_the_end = behind - (stop - i)
            if first == behind:
                from_the_end = behind
            pairs.append((i, max(lowest, from_the_end)))
    return pairs + _onwards(source, source.length, target.length)


def subsequence(source: Spelled, target: Spelled) -> Positions:
    """Pair as TIME's code does; raise DataError unless the target has all words of the source, in their order."""
    pairs = []
    j = 0
    for i in range(source.length):
        while j < target.length and target.ids[j] != source.ids[i]:
            j += 1
        if j == target.length:
            raise DataError(
                f"{target.text!r}: not all words of {source.text!r} in their order, as pairing=subsequence needs",
                "the default, pairing=aligned, takes any two prompts",
            )
        pairs.append((i, j))
        j += 1
    return pairs + _onwards(source, source.length, j)


def _onwards(source: Spelled, i: int, j: int) -> Positions:
    """Pair all positions from i and j on, the target's last one for what has no other."""
    end = len(source.ids)
    return [(i + k, min(j + k, end - 1)) for k in range(end - i)]


PAIRINGS: dict[str, Callable[[Spelled, Spelled], Positions]] = {
    "last": last,
    "tail": tail,
    "all": every,
    "aligned": aligned,
    "subsequence": subsequence,
}


def same_article(ids: Sequence[int], a: int | None, an: int | None) -> tuple[int, ...]:
    """Return ids with `a` in the place of `an`, so that "an apple" and "a red apple" have an article in common."""
    if a is None or an is None:
        return tuple(ids)
    return tuple(a if i == an else i for i in ids)
