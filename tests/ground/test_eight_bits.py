"""Tensors in eight bits: half a level off at most, and what is not a matrix as it was."""

from __future__ import annotations

import torch

from mmedit_cli.eight_bits import from_eight_bits, to_eight_bits


def test_every_number_comes_back_within_half_a_level_of_its_row():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, 50, generator=generator)
    wide[2] *= 1000  # another row does not make this one coarse
    small = to_eight_bits({"w": wide, "zero": torch.zeros(2, 3)})
    assert small["w"].dtype == torch.int8
    back = from_eight_bits(small)
    assert set(back) == {"w", "zero"}
    largest = wide.abs().amax((1, 2), keepdim=True)
    assert ((back["w"] - wide).abs() <= largest / 127 * 0.501).all()
    assert torch.equal(back["zero"], torch.zeros(2, 3))


def test_a_file_in_full_is_read_as_it_is():
    full = {"w": torch.randn(3, 4).half(), "b": torch.randn(4), "n": torch.tensor(3)}
    back = from_eight_bits(full)
    assert back.keys() == full.keys()
    for name, value in full.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)


def test_vectors_are_kept_in_half_precision():
    bias = torch.tensor([0.5, -2.0])
    back = from_eight_bits(to_eight_bits({"b": bias}))
    assert torch.equal(back["b"], bias.half())


def test_a_tensor_that_is_called_scale_is_kept():
    tensors = {"norm.scale": torch.ones(3), "gain": torch.ones(2, 2)}
    values = from_eight_bits(to_eight_bits(tensors))
    assert values.keys() == tensors.keys()
    assert torch.equal(from_eight_bits(tensors)["norm.scale"], tensors["norm.scale"])
