"""LPIPS from a file of weights: its formula, and files that hold something else."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import conv2d, relu

from mmedit_cli.errors import ModelError
from mmedit_cli.picture_editing.evaluation.lpips import SMALLEST, Lpips

SHAPES = ((64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Random weights under the names of the package lpips."""
    generator = torch.Generator().manual_seed(0)
    found = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for i, (place, (out, into, kernel)) in enumerate(
        zip((0, 3, 6, 8, 10), SHAPES, strict=True)
    ):
        found[f"net.slice{i + 1}.{place}.weight"] = (
            torch.randn(out, into, kernel, kernel, generator=generator) / 30
        )
        found[f"net.slice{i + 1}.{place}.bias"] = (
            torch.randn(out, generator=generator) / 30
        )
        found[f"lin{i}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return found


def pictures(n: int, side: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_equal_pictures_are_at_no_distance_and_order_does_not_matter(tensors, tmp_path):
    save_file(tensors, tmp_path / "alex.safetensors")
    lpips = Lpips.load(tmp_path / "alex.safetensors")
    one, other = pictures(3), pictures(3, seed=2)
    assert lpips(one, one).tolist() == [0, 0, 0]
    assert torch.equal(lpips(one, other), lpips(other, one))
    assert (lpips(one, other) > 0).all()
    assert torch.allclose(
        lpips(one, other)[1:2], lpips(one[1:2], other[1:2]), atol=1e-6
    )
    assert lpips(pictures(1, SMALLEST), pictures(1, SMALLEST, 2)).isfinite().all()


def test_the_first_layer_by_hand(tensors, tmp_path):
    for i in range(1, 5):
        tensors[f"lin{i}.model.1.weight"].zero_()
    save_file(tensors, tmp_path / "alex.safetensors")
    one, other = pictures(1), pictures(1, seed=2)
    shift, scale = (
        torch.tensor([-0.030, -0.088, -0.188]),
        torch.tensor([0.458, 0.448, 0.450]),
    )
    seen = []
    for picture in (one, other):
        x = ((picture * 2 - 1).permute(0, 2, 3, 1) - shift) / scale
        weight, bias = tensors["net.slice1.0.weight"], tensors["net.slice1.0.bias"]
        x = relu(conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=4, padding=2))
        seen.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    expected = ((seen[0] - seen[1]) ** 2 * tensors["lin0.model.1.weight"]).sum(1).mean()
    assert Lpips.load(tmp_path / "alex.safetensors")(
        one, other
    ).item() == pytest.approx(expected.item(), rel=1e-5)


def test_other_files_are_refused(tensors, tmp_path):
    file = tmp_path / "alex.safetensors"
    with pytest.raises(ModelError, match="no such file"):
        Lpips.load(file)
    file.write_bytes(b"pickle")
    with pytest.raises(ModelError, match="not a safetensors file"):
        Lpips.load(file)
    del tensors["lin2.model.1.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lin2.model.1.weight is missing"):
        Lpips.load(file)
