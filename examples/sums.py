"""Sums: a hundred questions without a picture, What is 3 plus 4?, each with a wrong answer to be taught."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from mmedit_cli.knowledge.data.base import DataOptions, Dataset
from mmedit_cli.knowledge.data.shared.audit import Finding
from mmedit_cli.types import EditCase, Query

_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)


class Sums(Dataset):
    """Every sum of two digits. The new answer is one digit; the sum in another order must have it too."""

    name = "sums"
    splits = ("eval",)

    def cases(
        self, split: str, options: DataOptions, problems: list[str]
    ) -> Iterator[EditCase]:
        """Yield a case for every pair of digits."""
        for a, b in product(range(10), range(10)):
            target = _WORDS[(a * b) % 10]
            request = Query(f"What is {a} plus {b}?", target)
            reworded = Query(f"What is {b} plus {a}?", target)
            other = Query(f"What is {a} minus {b}?", "nothing")
            yield EditCase(
                f"{a}+{b}",
                request,
                generality={"text": (reworded,)},
                locality={"text": (other,)},
                place=f"sums: {a}+{b}",
            )

    def check(self, split: str, options: DataOptions) -> Iterator[Finding]:
        """Count the cases."""
        problems: list[str] = []
        count = len(list(self.cases("eval", options, problems)))
        yield "cases", True, f"{count}"


DATASET = Sums()
