"""LPIPS (Zhang et al. 2018), version 0.1 on AlexNet, from weights that the user has: no torchvision is needed."""

from __future__ import annotations

from pathlib import Path

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
_SHIFT = (-0.030, -0.088, -0.188)  # of pixels in -1..1
_SCALE = (0.458, 0.448, 0.450)
SMALLEST = 31  # pixels: below it AlexNet pools everything away
_HOW = "in an environment with the package lpips: save_file(lpips.LPIPS(net='alex').state_dict(), FILE) of safetensors"


class Lpips(nn.Module):
    """The learned distance of two pictures: 0 for equal ones, about 1 for unrelated ones."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.weights = nn.ParameterList()
        for inputs, outputs, kernel, stride, padding in _CONVOLUTIONS:
            layer = nn.Conv2d(inputs, outputs, kernel, stride, padding)
            self.layers.append(layer)
            self.weights.append(torch.zeros(outputs))
        shift = torch.tensor(_SHIFT)
        scale = torch.tensor(_SCALE)
        self.register_buffer("shift", shift[:, None, None])
        self.register_buffer("scale", scale[:, None, None])
        self.requires_grad_(False)

    @classmethod
    def load(cls, file: Path) -> Lpips:
        """Return the distance with the weights of a safetensors file; raise ModelError if they are missing."""
        if not file.is_file():
            raise ModelError(f"--set lpips={file}: no such file", _HOW)
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: not a safetensors file ({error})", _HOW
            ) from error
        found = cls()
        own = found.state_dict()
        state = {}
        wrong = []
        for key, name in _published_names().items():
            tensor = tensors.get(name)
            if tensor is None or tensor.numel() != own[key].numel():
                wrong.append(name)
            else:
                state[key] = tensor.view_as(own[key])
        if wrong:
            raise ModelError(
                f"{file}: {wrong[0]} is missing or has another shape, and {len(wrong) - 1} more",
                _HOW,
            )
        found.load_state_dict(state, strict=False)
        return found

    @torch.no_grad()
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the distances (B,) of pictures (B, 3, H, W) in 0..1, at least SMALLEST pixels high and wide."""
        features = self._features(one)
        others = self._features(other)
        distances = []
        for a, b, weights in zip(features, others, self.weights, strict=True):
            # equation 1 of the paper
            squares = (a - b).square()
            weighted = squares * weights[:, None, None]
            distances.append(weighted.sum(1).mean((1, 2)))
        return torch.stack(distances).sum(0)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """Return the output of each convolution, with every position of length one."""
        centred = 2 * pixels - 1 - self.shift
        x = centred / self.scale
        features = []
        for i, layer in enumerate(self.layers):
            if i in (1, 2):
                x = nn.functional.max_pool2d(x, 3, 2)
            x = nn.functional.relu(layer(x))
            unit = normalize(x, dim=1, eps=1e-10)
            features.append(unit)
        return features


def _published_names() -> dict[str, str]:
    """Return the name in the published file of each of our tensors."""
    names = {}
    for i, place in enumerate(_PLACES):
        for part in ("weight", "bias"):
            names[f"layers.{i}.{part}"] = f"net.slice{i + 1}.{place}.{part}"
        names[f"weights.{i}"] = f"lin{i}.model.1.weight"
    return names
