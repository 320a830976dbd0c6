"""Two runs on the same cases: how much their scores differ, how surely, and what could have been seen.

Shapes: cases are clusters of cases that are not independent (`intervals.py`); G clusters, n cases.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from mmedit_cli.knowledge.evaluation.intervals import mean_with_interval

_EXACT = 12  # clusters; with more of them signs are drawn
_FLIPS = 9_999
_BLOCK = 1_000
_ROUNDING = 1e-12
_POWER = 0.8
_LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """What a second run scores more than a first one on the same cases, from -1 to 1.

    p: of the test that neither is better. smallest: the difference that the test would have found in 4 of 5 such
    comparisons. Both are None where nothing differs, or where there is one cluster.
    """

    first: float
    second: float
    n: int
    clusters: int
    ci95: Sequence[float] | None
    p: float | None
    smallest: float | None

    @property
    def mean(self) -> float:
        """The difference of the means."""
        return self.second - self.first


def difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    clusters: Mapping[str, Hashable],
) -> Difference:
    """Compare the scores (0 to 1) of the cases that both runs have; the cluster of each case is given.

    The interval is the bootstrap of whole clusters, the test `sign_flip_test` of their totals.
    """
    shared = [case for case in first if case in second]
    ours = [first[case] for case in shared]
    theirs = [second[case] for case in shared]
    groups = [clusters[case] for case in shared]
    changes = []
    totals = dict.fromkeys(groups, 0.0)
    for mine, their, group in zip(ours, theirs, groups, strict=True):
        change = their - mine
        changes.append(change)
        totals[group] += change
    bootstrap = mean_with_interval(changes, groups)
    interval = bootstrap["ci95"]
    of_concepts = list(totals.values())
    p = sign_flip_test(of_concepts)
    smallest = _smallest(changes, groups, totals)
    return Difference(
        first=statistics.fmean(ours),
        second=statistics.fmean(theirs),
        n=len(shared),
        clusters=len(totals),
        ci95=interval,
        p=p,
        smallest=smallest,
    )


def sign_flip_test(totals: Sequence[float]) -> float | None:
    """Return the two-sided p of the hypothesis that each total could as well have the other sign; None without any.

    Totals that are 0 say nothing and are left out. Where all others are of one size the p is exact, the sign test:
    McNemar's, if each cluster is a case that is right or wrong (McNemar 1947). With at most 12 of them all signs are
    tried; else 9,999 are drawn, seed 0, and p = (1 + those at least as far from 0) / 10,000 (Fisher 1935; Phipson and
    Smyth 2010).
    """
    moved = [total for total in totals if abs(total) > _ROUNDING]
    if len(totals) < 2 or not moved:
        return None
    sizes = [abs(total) for total in moved]
    if max(sizes) - min(sizes) < _ROUNDING:
        above = sum(total > 0 for total in moved)
        return _sign_test(above, len(moved))
    observed = abs(math.fsum(moved)) - _ROUNDING
    if len(moved) > _EXACT:
        return (1 + _as_far_by_chance(sizes, observed)) / (1 + _FLIPS)
    as_far = 0
    for signs in product((-1, 1), repeat=len(moved)):
        signed = map(operator.mul, signs, sizes)
        as_far += abs(math.fsum(signed)) >= observed
    everything = 1 << len(moved)
    return as_far / everything


def _sign_test(above: int, n: int) -> float:
    """Return the two-sided p of so many of n signs being positive, if both are as likely."""
    fewer = min(above, n - above)
    ways = 0
    for count in range(fewer + 1):
        ways += math.comb(n, count)
    return min(1.0, 2.0 * ways / 2.0**n)


def _as_far_by_chance(sizes: Sequence[float], observed: float) -> int:
    """Return how many of the drawn signs lead at least as far from 0."""
    import numpy as np

    source = np.random.default_rng(0)
    values = np.asarray(sizes)
    width = len(sizes)
    count = 0
    for start in range(0, _FLIPS, _BLOCK):
        left = _FLIPS - start
        drawn = min(_BLOCK, left)
        positive = source.integers(0, 2, (drawn, width))
        signs = 2 * positive - 1
        totals = signs @ values
        distances = np.abs(totals)
        as_far = distances >= observed
        count += int(as_far.sum())
    return count


def _smallest(
    changes: Sequence[float],
    groups: Sequence[Hashable],
    totals: Mapping[Hashable, float],
) -> float | None:
    """Return the smallest difference that is found with a power of 0.8 at the level 0.05: (z_.975 + z_.8) * SE.

    The standard error is clustered, as that of `effective_size`.
    """
    count = len(totals)
    if count < 2:
        return None
    mean = statistics.fmean(changes)
    above = dict.fromkeys(totals, 0.0)
    for group, change in zip(groups, changes, strict=True):
        above[group] += change - mean
    squared = [total * total for total in above.values()]
    squares = math.fsum(squared)
    variance = count / (count - 1) * squares / len(changes) ** 2
    inverse = statistics.NormalDist().inv_cdf
    away = inverse(1 - _LEVEL / 2) + inverse(_POWER)
    found = away * math.sqrt(variance)
    return found or None


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Return the p of several tests, each raised for there being several (Holm 1979); None stays None."""
    asked = []
    for place, p in enumerate(ps):
        if p is not None:
            asked.append((p, place))
    raised: list[float | None] = list(ps)
    tests = len(asked)
    least = 0.0
    for p, place in sorted(asked):
        several = tests * p
        least = max(least, several)
        raised[place] = min(1.0, least)
        tests -= 1
    return raised
