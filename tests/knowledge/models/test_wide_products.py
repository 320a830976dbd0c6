"""Linear layers in 16 bits against float64, forwards and backwards; what is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmedit_cli.knowledge.models.shared import wide_products
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.models.shared.wide_products import WideLinear, widen
from mmedit_cli.runtime import generator


@pytest.fixture
def slow(monkeypatch):
    """A processor that cannot multiply in 16 bits, whichever this is; blocks are small."""
    kinds = wide_products._SLOW
    monkeypatch.setattr(wide_products, "_is_slow", lambda weight: weight.dtype in kinds)
    monkeypatch.setattr(wide_products, "_BLOCK", 40)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def layer(dtype, *, bias):
    linear = nn.Linear(24, 17, bias=bias)
    weights = {"weight": drawn(17, 24, seed=1)}
    if bias:
        weights["bias"] = drawn(17, seed=2)
    linear.load_state_dict(weights)
    return linear.to(dtype)


def results(linear, rows, gradient):
    """Outputs, and the gradients of everything that enters."""
    rows = rows.clone().requires_grad_(True)
    outputs = linear(rows)
    entering = [rows, *linear.parameters()]
    return outputs.detach(), *torch.autograd.grad(outputs, entering, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 5, 24)])
def test_outputs_and_gradients_are_rounded_once(slow, dtype, bias, shape):
    linear = layer(dtype, bias=bias)
    exact = layer(dtype, bias=bias).double()
    rows = drawn(*shape).to(dtype)
    gradient = drawn(*shape[:-1], 17, seed=3).to(dtype)
    widen(linear)
    assert type(linear) is WideLinear
    expected = results(exact, rows.double(), gradient.double())
    found = results(linear, rows, gradient)
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype is dtype
        assert mine.shape == right.shape
        rounding = torch.finfo(dtype).eps
        assert torch.allclose(mine.double(), right, rtol=rounding, atol=1e-4)


def test_gradients_of_gradients(slow):
    linear = layer(torch.bfloat16, bias=True)
    widen(linear)
    rows = drawn(6, 24).bfloat16().requires_grad_(True)
    energy = linear(rows).square().sum()
    (first,) = torch.autograd.grad(energy, rows, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), rows)
    weight = linear.weight.double()
    curvature = 2 * weight.T @ weight
    expected = curvature.sum(0).expand(6, 24)
    assert torch.allclose(second.double(), expected, rtol=0.05, atol=1.0)


def test_few_rows_and_float32_are_as_they_were(slow):
    plain = layer(torch.bfloat16, bias=True).requires_grad_(False)
    linear = layer(torch.bfloat16, bias=True).requires_grad_(False)
    widen(linear)
    rows = drawn(2, 24).bfloat16()
    assert torch.equal(linear(rows), plain(rows))
    wider = layer(torch.float32, bias=True)
    widen(wider)
    assert type(wider) is nn.Linear


def test_a_model_in_16_bits_has_them_and_one_in_32_has_none(slow):
    counts = []
    for dtype in ("bfloat16", "float32"):
        model = load_backbone("tiny-llava", device="cpu", dtype=dtype).model
        wide = [module for module in model.modules() if type(module) is WideLinear]
        counts.append(len(wide))
    assert counts[0] > 20
    assert counts[1] == 0
