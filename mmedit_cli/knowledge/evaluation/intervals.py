"""Means of scores and their 95 % intervals, over cases or over clusters of cases that are not independent.

Two edits of one thing share its pictures and what the model knows of it: they say less than two edits of different
things. A cluster holds such cases. Where each case is a cluster of its own, every interval is the one over cases.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from typing import Any

_RESAMPLES = 1000
_BLOCK = 100

Clusters = Sequence[Hashable]  # the cluster of each value


def score_with_interval(
    values: Sequence[float], clusters: Clusters | None = None
) -> dict[str, Any]:
    """Return the mean, n, and the 95 % interval of scores from 0 to 1, one a case; None for both where there are none.

    Where each case is right or wrong it is the Wilson score interval of a proportion among as many cases as the scores
    are worth (`effective_size`); elsewhere the bootstrap of `mean_with_interval`. Scores that are all the same, or of
    one cluster, have no spread to resample: there it is Wilson's interval of their mean too, which is wide enough
    because no scores from 0 to 1 vary more than those that are 0 or 1.
    """
    if not values:
        return {"mean": None, "n": 0, "ci95": None}
    of_each = _clusters(values, clusters)
    one_cluster = len(set(of_each)) == 1
    if one_cluster or len(set(values)) == 1 or set(values) <= {0.0, 1.0}:
        mean = statistics.fmean(values)
        worth = effective_size(values, of_each)
        return {"mean": mean, "n": len(values), "ci95": wilson_interval(mean, worth)}
    return mean_with_interval(values, of_each)


def effective_size(values: Sequence[float], clusters: Clusters) -> float:
    """Return how many independent scores would say as much about the mean: n over the design effect (Kish 1965).

    The design effect is the variance of the mean as the clusters show it, over s^2 / n. The former is that of a ratio
    of two totals (Cochran 1977, section 11.7): with G clusters, and e_g the sum of what the scores of cluster g are
    above the mean, G / (G - 1) * sum(e_g^2) / n^2. It is never taken to be below 1. Scores that are all the same say
    nothing of it: then each cluster counts once.
    """
    n = len(values)
    groups = set(clusters)
    count = len(groups)
    if count == n:
        return n
    if count == 1 or len(set(values)) == 1:
        return count
    mean = statistics.fmean(values)
    above = dict.fromkeys(groups, 0.0)
    for cluster, value in zip(clusters, values, strict=True):
        above[cluster] += value - mean
    squares = math.fsum(total * total for total in above.values())
    clustered = count / (count - 1) * squares / n**2
    independent = statistics.variance(values) / n
    return n / max(1.0, clustered / independent)


def wilson_interval(share: float, n: float) -> list[float]:
    """Return both ends of the 95 % score interval of a proportion (Wilson 1927) among `n`, which may be a fraction."""
    z = statistics.NormalDist().inv_cdf(0.975)
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    variance = share * (1 - share) / n
    spread = math.sqrt(variance + z * z / (4 * n * n))
    half = z * spread / shrink
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    # rounding must not leave the share itself outside
    low = min(low, share)
    high = max(high, share)
    return [low, high]


def mean_with_interval(
    values: Sequence[float], clusters: Clusters | None = None
) -> dict[str, Any]:
    """Return the mean, n, and the 95 % bootstrap interval (1,000 resamples of whole clusters, fixed seed).

    The interval is None where nothing can be resampled: a single value or cluster, or values that are all the same.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    summary = {"mean": float(data.mean()), "n": len(data), "ci95": None}
    sums: dict[Hashable, float] = {}
    sizes: dict[Hashable, int] = {}
    for cluster, value in zip(_clusters(values, clusters), values, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
        sizes[cluster] = sizes.get(cluster, 0) + 1
    if len(set(values)) < 2 or len(sums) < 2:
        return summary
    totals = np.array(list(sums.values()), dtype=np.float64)
    counts = np.array(list(sizes.values()))
    source = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES // _BLOCK):  # in blocks, to bound the memory
        drawn = source.integers(
            0,
            len(totals),
            (_BLOCK, len(totals)),
        )
        means.append(totals[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return {**summary, "ci95": [float(low), float(high)]}


def _clusters(values: Sequence[float], clusters: Clusters | None) -> Clusters:
    """Return the cluster of each value; without any, each is one of its own."""
    return range(len(values)) if clusters is None else clusters
