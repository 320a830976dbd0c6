"""Paired comparisons against what was computed by hand."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from mmedit_cli.knowledge.evaluation.paired import difference, holm, sign_flip_test


def scores(*values: float) -> dict[str, float]:
    return {f"case-{place}": value for place, value in enumerate(values)}


def alone(table: dict[str, float]) -> dict[str, str]:
    return {case: case for case in table}


def test_cases_that_are_right_or_wrong_are_compared_as_mcnemar_does():
    # 9 cases only the second gets right, 1 only the first, 5 both: p = 2 * (C(10, 0) + C(10, 1)) / 2^10
    first = scores(*[0.0] * 9, 1.0, *[1.0] * 5)
    second = scores(*[1.0] * 9, 0.0, *[1.0] * 5)
    found = difference(first, second, alone(first))
    assert found.p == 22 / 1024
    assert found.mean == pytest.approx(8 / 15)
    assert (found.n, found.clusters) == (15, 15)


def test_a_concept_counts_once_however_many_cases_it_has():
    first = scores(0.0, 0.0, 0.0, 0.0, 0.0)
    second = scores(1.0, 1.0, 1.0, 1.0, 1.0)
    apart = difference(first, second, alone(first))
    together = difference(first, second, dict.fromkeys(first, "one"))
    pairs = dict(zip(first, ["a", "a", "b", "b", "b"], strict=True))
    in_two = difference(first, second, pairs)
    assert apart.p == 2 / 2**5
    assert together.p is None
    # totals 2 and 3: two of four signs lead as far from 0
    assert in_two.p == 0.5


def test_few_totals_of_different_sizes_are_tried_with_every_sign():
    totals = [3.0, -1.0, 0.5, 0.0]
    sums = [
        abs(a * 3 + b + c * 0.5) for a, b, c in itertools.product((-1, 1), repeat=3)
    ]
    assert sign_flip_test(totals) == sum(s >= 2.5 for s in sums) / 8 == 0.75


def test_many_totals_are_tried_with_signs_that_are_drawn():
    source = random.Random(3)
    null = [source.gauss(0, 1) for _ in range(40)]
    drawn = sign_flip_test(null)
    # the normal approximation of the same test
    z = abs(math.fsum(null)) / math.sqrt(math.fsum(t * t for t in null))
    expected = 2 * (1 - statistics.NormalDist().cdf(z))
    assert drawn == pytest.approx(expected, abs=0.02)
    assert sign_flip_test(null) == drawn
    assert sign_flip_test([t + 3 for t in null]) == 1 / 10_000


def test_runs_that_do_not_differ_have_no_p():
    first = scores(0.0, 1.0, 1.0)
    found = difference(first, dict(first), alone(first))
    assert (found.mean, found.ci95, found.p, found.smallest) == (0, None, None, None)


def test_only_cases_of_both_runs_count():
    first = scores(1.0, 1.0, 0.0)
    second = {"case-0": 0.0, "case-7": 1.0, "case-2": 1.0}
    found = difference(first, second, alone(first))
    assert (found.n, found.first, found.second) == (2, 0.5, 0.5)


def test_the_smallest_difference_that_is_found_is_that_of_the_standard_error():
    # changes 1, 1, 0, 0 of cases that are alone: SE = s / sqrt(n), s^2 = 1/3
    first = scores(0.0, 0.0, 1.0, 0.0)
    second = scores(1.0, 1.0, 1.0, 0.0)
    found = difference(first, second, alone(first))
    error = math.sqrt(1 / 3 / 4)
    assert found.smallest == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)


def test_several_tests_raise_each_p_as_holm_does():
    assert holm([0.01, None, 0.04, 0.03]) == [0.03, None, 0.06, 0.06]
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
