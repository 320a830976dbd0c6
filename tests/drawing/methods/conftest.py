"""Photos to learn from, tiny models to teach, and what they look like bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmedit_cli import registry
from mmedit_cli.drawing.covariance import Covariance
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.stable_diffusion import Sampling
from mmedit_cli.hparams import load_hparams
from mmedit_cli.types import Concept

FEW = Sampling(steps=2)


@pytest.fixture(scope="session", params=["tiny-sd", "tiny-sdxl"])
def model(request):
    """Each tiny model in float32, shared by the session: a test leaves it as it was."""
    loaded = load_stable_diffusion(request.param, device="cpu")
    draw(loaded, ["a dog"])  # transformers installs hooks of its own at the first pass
    return loaded


@pytest.fixture
def photos(tmp_path):
    """Three small photos."""
    source = np.random.default_rng(0)
    for i in range(3):
        picture = np.full((40, 32, 3), 200, np.uint8)
        picture[8:30, 6:24] = (220, 40, 40)
        picture += source.integers(0, 20, picture.shape, dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    return tuple(sorted(tmp_path.glob("*.png")))


@pytest.fixture
def concept(photos):
    return Concept("<my-dog>", "dog", photos)


def covariance(model):
    """A well-conditioned second moment for a model's encodings."""
    rows = torch.randn(
        4000,
        model.width,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    mixed = rows @ (torch.eye(model.width).double() + 0.1)
    return Covariance(
        mixed.T @ mixed / 4000,
        source={"encoder": model.text_fingerprint, "rule": "valid"},
    )


def make(name, model, *overrides, seed=0, **more):
    cls = registry.personalizers.get(name)
    hparams = load_hparams(
        registry.hparams_file(name),
        cls.Hparams,
        variant=model.name,
        overrides=overrides,
    )
    if name == "perfusion":
        more = {"covariance": covariance(model), **more}
    return cls(model, hparams, seed=seed, **more)


def draw(model, prompts, seed=0, sampling=FEW):
    return np.stack(
        [
            np.asarray(image)
            for image in model.generate(prompts, [seed] * len(prompts), sampling)
        ]
    )


def snapshot(model):
    """Everything a personalizer could leave behind: bits of tensors, hooks, flags, modules, words."""
    return {
        "tensors": {k: v.clone() for k, v in model.model.state_dict().items()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.model.named_modules()
        },
        "modules": {n: id(m) for n, m in model.model.named_modules()},
        "flags": {
            n: (p.requires_grad, p.grad is None)
            for n, p in model.model.named_parameters()
        },
        "training": {n: m.training for n, m in model.model.named_modules()},
        "words": dict(model.words),
        "current_prompts": model.current_prompts,
        "windows": model.windows,
    }


def assert_same(after, before):
    for key in before:
        if key != "tensors":
            assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name
