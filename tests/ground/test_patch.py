"""Patch restores everything, bit for bit."""

import pytest
import torch
from torch import nn

from mmedit_cli.patch import Patch, trainable


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x)), "rest"


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, "rest"


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy().requires_grad_(False)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(
        torch.equal(after[k], v) for k, v in before.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_restores_weights_that_arithmetic_would_not(toy, dtype):
    toy.to(dtype)
    before = snapshot(toy)
    delta = torch.full((4, 4), 1e-3, dtype=dtype) + torch.rand(4, 4).to(dtype)
    patch = Patch(toy)
    for _ in range(3):
        patch.add_("a.weight", delta)
    assert set(patch.changed()) == {"a.weight"}
    for _ in range(3):  # what undo must not do
        toy.a.weight -= delta
    if dtype == torch.bfloat16:
        assert not same(toy, before)
    patch.undo()
    assert same(toy, before)


def test_modules_and_hooks_are_put_back(toy):
    before, x, a = snapshot(toy), torch.ones(2, 4), toy.a
    expected = toy(x)[0]
    with Patch(toy) as patch:
        patch.replace("a", nn.Identity())
        patch.replace("a", nn.Linear(4, 4))
        patch.hook("b", lambda h: h * 2)
        patch.hook("b", lambda h: None)
        assert not torch.equal(toy(x)[0], expected)
    assert toy.a is a
    assert same(toy, before)
    assert not toy.b._forward_hooks
    assert torch.equal(toy(x)[0], expected)


def test_hook_changes_the_first_entry_of_a_tuple_and_keeps_the_rest():
    model = nn.Sequential(Pair())
    with Patch(model) as patch:
        patch.hook("0", lambda h: h * 10)
        first, rest = model(torch.ones(1))
    assert (first.item(), rest) == (20.0, "rest")


def test_hook_call_sees_what_went_in_and_what_came_out(toy):
    x, before = torch.ones(1, 4), snapshot(toy)
    with Patch(toy) as patch:
        patch.hook_call("a", lambda went, came: came + 2 * went)
        changed = toy.a(x)
        patch.hook_call("b", lambda *_: None)
        assert torch.equal(
            toy.b(x), torch.nn.functional.linear(x, toy.b.weight, toy.b.bias)
        )
    assert torch.equal(changed, toy.a(x) + 2)
    assert same(toy, before)


def test_a_wrong_shape_changes_nothing(toy):
    before = snapshot(toy)
    with (
        Patch(toy) as patch,
        pytest.raises(
            ValueError, match=r"a.weight: shape \(2,\) given, \(4, 4\) expected"
        ),
    ):
        patch.set_("a.weight", torch.ones(2))
    assert same(toy, before)


def test_an_error_inside_the_block_still_restores(toy):
    before = snapshot(toy)

    def fail():
        with Patch(toy) as patch:
            patch.add_("b.bias", torch.ones(4))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same(toy, before)


def test_trainable_lets_gradients_reach_only_the_named(toy):
    with (
        torch.no_grad(),
        trainable([toy.a.weight]),
    ):  # an evaluator around it does not matter
        loss = toy(torch.ones(1, 4))[0].sum()
        (gradient,) = torch.autograd.grad(loss, [toy.a.weight])
    assert gradient.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in toy.parameters())


def test_trainable_gives_flags_and_gradients_back(toy):
    """What was gathered before is neither lost nor added to, and what was trained in the block leaves no gradient."""
    old = torch.full_like(toy.a.weight, 3.0)
    toy.a.weight.grad = old
    toy.b.weight.requires_grad_(True)
    with trainable([toy.a.weight, toy.b.weight]):
        toy(torch.ones(1, 4))[0].sum().backward()
        assert toy.b.weight.grad is not None
    assert toy.a.weight.grad is old
    assert torch.equal(old, torch.full_like(old, 3.0))
    assert toy.b.weight.grad is None
    assert (toy.a.weight.requires_grad, toy.b.weight.requires_grad) == (False, True)


def test_trainable_gives_them_back_after_an_error_too(toy):
    block = trainable([toy.a.weight])
    block.__enter__()
    toy(torch.ones(1, 4))[0].sum().backward()
    error = ZeroDivisionError()
    assert not block.__exit__(ZeroDivisionError, error, None)
    assert (toy.a.weight.requires_grad, toy.a.weight.grad) == (False, None)


def test_lifted_weights_are_the_originals_for_a_while():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with Patch(model) as patch:
        patch.add_("weight", torch.full((2, 2), 1e-3))
        changed = model.weight.detach().clone()
        with patch.lifted():
            assert torch.equal(model.weight, before)
        assert torch.equal(model.weight, changed)
    assert torch.equal(model.weight, before)
