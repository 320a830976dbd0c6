"""Greedy answers whatever the model's own settings say; and nothing that is not finite passes."""

from __future__ import annotations

import pytest
import torch
from conftest import QUERIES

from mmedit_cli.errors import ModelError, NotFinite
from mmedit_cli.finite import all_finite
from mmedit_cli.knowledge.models.shared.generation import described
from mmedit_cli.knowledge.models.shared.loading import load_backbone

SETTINGS = {
    "repetition_penalty": 50.0,
    "num_beams": 3,
    "no_repeat_ngram_size": 1,
    "guidance_scale": 3.0,
    "stop_strings": ["a", "e"],
    "return_dict_in_generate": True,
    "do_sample": True,
    "temperature": 5.0,
    "suppress_tokens": list(range(3, 60)),
    "min_new_tokens": 9,
}


@pytest.fixture(scope="module", params=["tiny-blip2", "tiny-qwen2.5-vl"])
def own(request):
    return load_backbone(request.param, device="cpu")


@pytest.fixture(autouse=True)
def _as_before(own):
    before = own.generator.generation_config.to_dict()
    yield
    own.generator.generation_config = type(own.generator.generation_config).from_dict(
        before
    )
    forget(own)


def forget(backbone):
    """Have the settings read again."""
    backbone.__dict__.pop("own_settings", None)


def test_greedy_ignores_what_the_model_asks_for(own):
    greedy = own.generate(QUERIES, max_new_tokens=6)
    assert own.own_settings == {}
    for name, value in SETTINGS.items():
        setattr(own.generator.generation_config, name, value)
    forget(own)
    assert own.generate(QUERIES, max_new_tokens=6) == greedy
    assert own.own_settings == SETTINGS
    assert "num_beams=3" in described(own.own_settings)
    assert own.generator.generation_config.repetition_penalty == 50.0, (
        "the model's own settings stay what they are"
    )


def test_the_models_own_settings_can_be_followed(own):
    greedy = own.generate(QUERIES, max_new_tokens=8)
    assert own.generate(QUERIES, max_new_tokens=8, sampling="model") == greedy, (
        "without settings it is the same"
    )
    own.generator.generation_config.no_repeat_ngram_size = 1
    own.generator.generation_config.stop_strings = ["never said"]
    forget(own)
    followed = own.generate(QUERIES, max_new_tokens=8, sampling="model")
    assert followed != greedy
    own.generator.generation_config.do_sample = True
    own.generator.generation_config.top_k = 5
    forget(own)
    state = torch.random.get_rng_state()
    drawn = own.generate(QUERIES, max_new_tokens=8, sampling="model")
    assert drawn == own.generate(QUERIES, max_new_tokens=8, sampling="model"), "seeded"
    assert torch.equal(state, torch.random.get_rng_state())


def test_settings_that_cannot_be_followed_are_named(own):
    own.generator.generation_config.num_beams = 3
    own.generator.generation_config.num_beam_groups = 2
    own.generator.generation_config.guidance_scale = 2.0
    forget(own)
    with pytest.raises(
        ModelError,
        match=r"its own settings \(.*guidance_scale=2.0.*\) cannot be followed",
    ):
        own.generate(QUERIES, max_new_tokens=3, sampling="model")


def test_each_question_has_a_limit_of_its_own(own):
    long, short = (
        own.generate(QUERIES[:2], max_new_tokens=9),
        own.generate(QUERIES[:2], max_new_tokens=3),
    )
    assert own.generate(QUERIES[:2], max_new_tokens=[9, 3]) == [long[0], short[1]]
    assert long[1] != short[1]


@pytest.mark.parametrize("role", ["ffn_out", "attn_v", "vision"])
def test_the_first_module_with_nan_is_named(own, role):
    batch = own.batch(QUERIES)
    middle = own.n_layers // 2
    if role == "vision":
        root = own.anchors.path("vision")
        name, weight = next(
            (n, p)
            for n, p in own.model.get_submodule(root).named_parameters()
            if "mlp" in n
        )
        name = f"{root}.{name}"
    else:
        name = own.anchors.path(role, middle) + ".weight"
        weight = own.model.get_parameter(name)
    prefix = own.prefix(batch, middle)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[3] = torch.nan
    try:
        match = f"{own.name}: the logits are not finite: {name} holds NaN or infinity"
        with pytest.raises(NotFinite, match=match):
            own.logits(batch)
        with pytest.raises(NotFinite, match=match):
            own.generate(QUERIES, max_new_tokens=2)
        with (
            own.cached_activations(middle, QUERIES, group=4, budget=1 << 20),
            pytest.raises(NotFinite, match=match),
        ):
            own.resume(own.prefix(batch, middle))
        if role != "vision":
            with pytest.raises(NotFinite, match=match):
                own.resume(prefix, at=batch.predicting)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert all_finite(own.logits(batch))


def test_a_number_that_overflows_on_the_way_is_named_too(own):
    path = own.anchors.path("ffn_in", 1)
    handle = own.model.get_submodule(path).register_forward_hook(
        lambda _m, _i, out: out * torch.inf
    )
    try:
        with pytest.raises(
            NotFinite, match=f"{path} is the first module that gives NaN or infinity"
        ):
            own.logits(own.batch(QUERIES))
    finally:
        handle.remove()


def test_what_is_finite():
    assert all_finite(torch.full((4,), 3e38)), "the sum alone overflows"
    assert not all_finite(torch.tensor([1.0, torch.inf, -torch.inf]))
    assert not all_finite(torch.tensor([1.0, torch.nan], dtype=torch.bfloat16))
    assert all_finite(torch.full((100,), 60000.0, dtype=torch.float16))
