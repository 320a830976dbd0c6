"""LoRA layers: what they add, in numbers, and that nothing is left of them."""

from __future__ import annotations

import torch
from torch import nn

from mmedit_cli.adapters import LoraLayers, joined
from mmedit_cli.patch import Patch


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def pair(rank: int, layer: nn.Linear, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, layer.in_features, generator=source)
    return down, torch.randn(layer.out_features, rank, generator=source)


def test_a_new_adapter_changes_nothing_and_its_scale_is_alpha_over_rank():
    model, x = network(), torch.randn(5, 4)
    before = model(x)
    with Patch(model) as patch:
        layers = LoraLayers(patch, {"0": 2}, {"0": 6.0}, seed=1)
        assert torch.equal(model(x), before)
        down, up = layers.pairs()["0"]
        assert (down.shape, up.shape) == ((2, 4), (3, 2))
        assert not up.any()
        with torch.no_grad():
            up.fill_(1.0)
        hidden = layers.modules["0"].get_base_layer()(x) + 3.0 * x @ down.T @ up.T
        torch.testing.assert_close(model(x), model[2](hidden.tanh()))
    assert torch.equal(model(x), before)
    assert type(model[0]) is nn.Linear


def test_the_start_depends_on_the_seed_alone():
    drawn = []
    for seed in (3, 3, 4):
        torch.rand(7)  # whatever else drew from the global source before
        with Patch(network()) as patch:
            drawn.append(
                LoraLayers(patch, {"0": 2}, {"0": 2.0}, seed)
                .pairs()["0"][0]
                .detach()
                .clone()
            )
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_several_adapters_of_other_ranks_and_layers_are_added_up():
    model, x = network(), torch.randn(5, 4)
    first = {"0": pair(2, model[0], 1), "2": pair(2, model[2], 2)}
    second = {"0": pair(3, model[0], 3)}
    extra = sum(x @ down.T @ up.T for down, up in (first["0"], second["0"]))
    hidden = (model[0](x) + extra).tanh()
    down, up = first["2"]
    wanted = model[2](hidden) + hidden @ down.T @ up.T
    with Patch(model) as patch:
        layers = LoraLayers.of(patch, joined([first, second]))
        torch.testing.assert_close(model(x), wanted)
        assert not any(parameter.requires_grad for parameter in layers.parameters())
