"""Layers by depth: a fraction names the same place in every model."""

from __future__ import annotations

import pytest

from mmedit_cli.knowledge.methods.ft import FtHparams
from mmedit_cli.knowledge.methods.multi_melo.hparams import MultiMeloHparams
from mmedit_cli.knowledge.methods.unike.hparams import UnikeHparams
from mmedit_cli.layers import at_depth, count_above, layer_number, layer_numbers

PUBLISHED = (0.47, 0.63, 0.79, 0.97)


@pytest.mark.parametrize(
    ("layer", "depth", "number"),
    [
        (0.66, 32, 21),
        (0.66, 6, 3),
        (0.0, 6, 0),
        (0.999, 6, 5),
        (0.5, 1, 0),
        (21, 32, 21),
        (-1, 6, -1),
    ],
)
def test_the_number_of_a_layer(layer, depth, number):
    assert layer_number(layer, depth) == number


def test_the_published_layers_are_those_fractions_of_32():
    assert layer_numbers(PUBLISHED, 32) == (15, 20, 25, 31)
    assert layer_numbers(PUBLISHED, 6) == (2, 3, 4, 5)
    assert layer_numbers(PUBLISHED, 2) == (0, 1), "named once"
    assert layer_numbers(PUBLISHED, 2, lowest=1) == (1,)
    assert layer_numbers((3, 3), 6) == (3, 3), "numbers stay as they were given"


@pytest.mark.parametrize(
    ("share", "depth", "count"),
    [
        (0.125, 32, 4),
        (0.125, 28, 4),
        (0.125, 6, 1),
        (0.01, 6, 1),
        (1.0, 6, 6),
        (4, 6, 4),
    ],
)
def test_the_last_layers_as_a_share_of_all(share, depth, count):
    assert count_above(share, depth) == count


def test_hyper_parameters_are_resolved_for_a_depth():
    assert at_depth(MultiMeloHparams(), 32).layers == (15, 20, 25, 31)
    assert at_depth(UnikeHparams(), 32).layers == 4
    numbers = MultiMeloHparams(layers=(3, -1))
    assert at_depth(numbers, 32) == numbers
    assert at_depth(FtHparams(), None).layers == (-1,), "a depth that is not known"


@pytest.mark.parametrize("layer", [1.0, 21.0, -0.5])
def test_a_fraction_outside_the_depth_is_refused(layer):
    with pytest.raises(ValueError, match=f"layers {layer}: a fraction of the depth"):
        MultiMeloHparams(layers=(0.5, layer))
