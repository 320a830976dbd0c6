"""Stopping in the middle, and rows that are computed once."""

import pytest
import torch
from torch import nn

from mmedit_cli.knowledge.models.shared.prefix import RowCache, run_to


def test_run_to_stops_before_the_module_and_leaves_no_hook():
    ran = []
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.register_forward_hook(lambda *_: ran.append(1))
    hidden, context = run_to(lambda: second(first(torch.ones(1, 2))), second)
    assert torch.equal(hidden, first(torch.ones(1, 2)))
    assert context == {}
    assert not ran
    assert not second._forward_pre_hooks


def test_run_to_says_when_the_module_was_not_reached():
    with pytest.raises(RuntimeError, match="never came to Linear"):
        run_to(lambda: None, nn.Linear(1, 1))


def counting(group_sizes):
    def compute(keys):
        group_sizes.append(len(keys))
        return [torch.full((3,), float(key)) for key in keys]

    return compute


def test_each_row_is_computed_once_and_in_fixed_groups():
    groups = []
    cache = RowCache(counting(groups), group=4)
    cache.plan(range(10))
    rows = cache.get([9, 0, 9, 5])
    assert [row[0].item() for row in rows] == [9, 0, 9, 5]
    cache.get([3, 4, 8])
    assert groups == [2, 4, 4]  # the groups of 9, of 0 and of 5, each whole
    assert cache.computed == 10


@pytest.mark.parametrize(("spill", "computed"), [(True, 8), (False, 32)])
def test_beyond_the_budget_rows_are_spilled_or_computed_again(spill, computed):
    cache = RowCache(
        counting([]), group=4, budget=4 * 3 * 4, spill=spill
    )  # one group fits
    cache.plan(range(8))
    for _ in range(2):
        for key in (0, 4, 1, 5):
            assert torch.equal(cache.get([key])[0], torch.full((3,), float(key)))
    assert cache.computed == computed


def test_a_row_does_not_hold_on_to_the_padded_batch_it_came_from():
    cache = RowCache(lambda keys: list(torch.zeros(len(keys), 1000)[:, :2]), group=2)
    assert cache.get([1])[0].untyped_storage().nbytes() == 8
