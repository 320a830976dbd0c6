"""LPIPS (Zhang et al. 2018), version 0.1 on AlexNet, from weights that the user has: no torchvision is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmedit_cli.errors import ModelError

# (input channels, output channels, kernel, stride, padding); before the second and the third the map is pooled
_CONVOLUTIONS = (
    (3, 64, 11, 4, 2),
    (64, 192, 5, 1, 2),
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
)
_PLACES = (0, 3, 6, 8, 10)  # of the convolutions in AlexNet, which name their weights
_PARTS = ("weight", "bias")
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in -1..1
SMALLEST = 31  # pixels: below it AlexNet pools everything away
_HOW = "in an environment with the package lpips: save_file(lpips.LPIPS(net='alex').state_dict(), FILE) of safetensors"


class Lpips(nn.Module):
    """The learned distance of two pictures: 0 for equal ones, about 1 for unrelated ones."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, k, s, p) for i, o, k, s, p in _CONVOLUTIONS
        )
        self.weights = nn.ParameterList(torch.zeros(o) for _, o, *_ in _CONVOLUTIONS)
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])
        self.requires_grad_(False)

    @classmethod
    def load(cls, file: Path) -> Lpips:
        """Return the distance with the weights in a safetensors file; raise ModelError if they are not there."""
        if not file.is_file():
            raise ModelError(f"--set lpips={file}: no such file", _HOW)
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: not a safetensors file ({error})", _HOW
            ) from error
        names = {
            f"layers.{i}.{part}": f"net.slice{i + 1}.{n}.{part}"
            for i, n in enumerate(_PLACES)
            for part in _PARTS
        }
        names |= {f"weights.{i}": f"lin{i}.model.1.weight" for i in range(len(_PLACES))}
        found, own = cls(), cls().state_dict()
        wrong = [
            n
            for k, n in names.items()
            if n not in tensors or tensors[n].numel() != own[k].numel()
        ]
        if wrong:
            raise ModelError(
                f"{file}: {wrong[0]} is missing or has another shape, and {len(wrong) - 1} more",
                _HOW,
            )
        found.load_state_dict(
            {key: tensors[name].view_as(own[key]) for key, name in names.items()},
            strict=False,
        )
        return found

    @torch.no_grad()
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the distances (B,) of pictures (B, 3, H, W) in 0..1, both sides at least SMALLEST pixels."""
        pairs = zip(
            self._features(one), self._features(other), self.weights, strict=True
        )
        parts: list[Any] = [
            ((a - b).square() * w[:, None, None]).sum(1).mean((1, 2))
            for a, b, w in pairs
        ]
        return torch.stack(parts).sum(0)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """Return what each convolution sees, every position of length one."""
        x, found = (2 * pixels - 1 - self.shift) / self.scale, []
        for i, layer in enumerate(self.layers):
            if i in (1, 2):
                x = nn.functional.max_pool2d(x, 3, 2)
            x = nn.functional.relu(layer(x))
            found.append(normalize(x, dim=1, eps=1e-10))
        return found
