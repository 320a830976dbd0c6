"""Intervals over clusters: a naive computation says the same, and a cluster a case is the interval over cases."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from mmedit_cli.knowledge.evaluation.intervals import (
    effective_size,
    mean_with_interval,
    score_with_interval,
    wilson_interval,
)


def drawn(seed: int, *, binary: bool) -> tuple[list[float], list[str]]:
    """Scores of 40 clusters of one to four cases that are alike within a cluster."""
    source = random.Random(seed)
    values, clusters = [], []
    for cluster in range(40):
        level = source.random()
        for _ in range(source.randint(1, 4)):
            likely = float(source.random() < level)
            values.append(likely if binary else (likely + source.random()) / 2)
            clusters.append(f"c{cluster}")
    together = list(zip(values, clusters, strict=True))
    source.shuffle(together)  # the cases of a cluster do not stand beside each other
    return [value for value, _ in together], [cluster for _, cluster in together]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("binary", [True, False])
def test_the_effective_size_is_that_of_all_pairs(seed, binary):
    """Cluster-robust variance as the sum over all pairs of cases of one cluster, over the variance of a mean."""
    values, clusters = drawn(seed, binary=binary)
    n, groups, mean = len(values), len(set(clusters)), sum(values) / len(values)
    pairs = sum(
        (values[i] - mean) * (values[j] - mean)
        for i in range(n)
        for j in range(n)
        if clusters[i] == clusters[j]
    )
    robust = groups / (groups - 1) * pairs / n**2
    plain = sum((value - mean) ** 2 for value in values) / (n - 1) / n
    assert robust > plain, "the clusters were drawn to be alike"
    wanted = n * plain / robust
    assert effective_size(values, clusters) == pytest.approx(wanted, rel=1e-12)
    if binary:
        found = score_with_interval(values, clusters)["ci95"]
        assert found == pytest.approx(wilson_interval(mean, wanted), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_bootstrap_draws_whole_clusters(seed):
    values, clusters = drawn(seed, binary=False)
    names = list(dict.fromkeys(clusters))
    members = {
        name: [v for v, c in zip(values, clusters, strict=True) if c == name]
        for name in names
    }
    source, means = np.random.default_rng(0), []
    for _ in range(10):
        for row in source.integers(0, len(names), (100, len(names))):
            chosen = [value for i in row for value in members[names[i]]]
            means.append(statistics.fmean(chosen))
    wanted = np.percentile(means, [2.5, 97.5])
    found = score_with_interval(values, clusters)
    assert found["mean"] == pytest.approx(statistics.fmean(values))
    assert found["ci95"] == pytest.approx(list(wanted), rel=1e-9)
    plain_low, plain_high = score_with_interval(values)["ci95"]
    assert found["ci95"][1] - found["ci95"][0] > plain_high - plain_low


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("binary", [True, False])
def test_a_cluster_a_case_is_the_interval_over_cases(seed, binary):
    values, _ = drawn(seed, binary=binary)
    own = [f"case-{i}" for i in range(len(values))]
    assert score_with_interval(values, own) == score_with_interval(values)
    assert mean_with_interval(values, own) == mean_with_interval(values)
    assert effective_size(values, own) == len(values)


def test_cases_that_were_asked_thrice_say_no_more_than_once():
    values, clusters = [1.0, 1.0, 0.0, 1.0] * 10, [str(i) for i in range(40)]
    once = score_with_interval(values, clusters)["ci95"]
    thrice = score_with_interval(values * 3, clusters * 3)["ci95"]
    assert thrice == pytest.approx(once, abs=5e-3)
    assert thrice != pytest.approx(score_with_interval(values * 3)["ci95"], abs=0.02)


def test_where_nothing_differs_each_cluster_counts_once():
    right = score_with_interval([1.0] * 6, ["a", "a", "b", "b", "c", "c"])
    assert right == {"mean": 1, "n": 6, "ci95": wilson_interval(1, 3)}
    one = score_with_interval([1.0, 0.0, 1.0, 0.0], ["a"] * 4)
    assert one["ci95"] == wilson_interval(0.5, 1)
    assert score_with_interval([1.0, 0.5], ["a"] * 2)["ci95"] is not None
    assert mean_with_interval([1.0, 0.5], ["a"] * 2)["ci95"] is None


def test_clusters_never_make_an_interval_narrower():
    opposed = [1.0, 0.0] * 6  # of each cluster one is right and one is wrong
    clusters = [i // 2 for i in range(12)]
    assert score_with_interval(opposed, clusters) == score_with_interval(opposed)


def test_the_truth_lies_inside_as_often_as_is_said():
    """Clusters of three cases that are all right or all wrong: 300 samples of 60 clusters, the truth being 0.7."""
    inside = {"clustered": 0, "plain": 0}
    source = random.Random(0)
    clusters = [i // 3 for i in range(180)]
    for _ in range(300):
        values = []
        for _ in range(60):
            values += [float(source.random() < 0.7)] * 3
        for name, of in (("clustered", clusters), ("plain", None)):
            low, high = score_with_interval(values, of)["ci95"]
            inside[name] += low <= 0.7 <= high
    sd = math.sqrt(300 * 0.95 * 0.05)
    assert inside["clustered"] > 285 - 3 * sd
    assert inside["plain"] < 285 - 3 * sd
