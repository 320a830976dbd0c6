"""A canvas wider than the model's pictures, denoised in overlapping windows of its native size.

MultiDiffusion (Bar-Tal et al. 2023, section 4.1, equation 5): where windows overlap, the weighted mean of what is
predicted for each is the prediction that is nearest to all of them. Every window has a prompt of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 8  # neighbours have this part of a window in common
GRID = 8  # diffusers draws pictures of multiples of 8 pixels


@dataclass(frozen=True)
class Canvas:
    """`count` windows of `side` latents beside each other, neighbours with `common` columns in common."""

    count: int
    side: int
    common: int

    @classmethod
    def of(cls, count: int, side: int, scale: int) -> Canvas:
        """Return the canvas for windows of `side` pixels, where a latent is `scale` pixels wide."""
        step = math.lcm(GRID, scale)
        common = max(step, side // SHARE // step * step)
        return cls(count, side // scale, common // scale if 2 * common <= side else 0)

    @property
    def width(self) -> int:
        """Its width in latents."""
        return self.count * self.side - (self.count - 1) * self.common

    @property
    def starts(self) -> list[int]:
        """The first column of every window."""
        return [i * (self.side - self.common) for i in range(self.count)]

    def weights(self) -> Tensor:
        """Return (count, side) weights that fall off linearly towards a neighbour; those of a column sum to 1."""
        fall = torch.arange(1, self.common + 1) / (self.common + 1)
        found = torch.ones(self.count, self.side)
        found[1:, : self.common] = fall
        found[:-1, self.side - self.common :] = fall.flip(0)
        return found

    def cut(self, wide: Tensor) -> Tensor:
        """Return the windows (B * count, C, h, side) of canvases (B, C, h, width), those of a canvas in a row."""
        return torch.stack(
            [wide[..., i : i + self.side] for i in self.starts], 1
        ).flatten(0, 1)

    def join(self, windows: Tensor) -> Tensor:
        """Return canvases (B, C, h, width) of windows (B * count, C, h, side): the mean where they overlap."""
        parts = windows.unflatten(0, (-1, self.count))
        weights = self.weights().to(windows)
        total = windows.new_zeros(*parts.shape[:1], *parts.shape[2:4], self.width)
        for i, start in enumerate(self.starts):
            total[..., start : start + self.side] += parts[:, i] * weights[i]
        return total


@contextmanager
def in_windows(
    unet: nn.Module,
    canvas: Canvas,
    hidden: Tensor,
    conditions: Callable[[Tensor], dict[str, Any] | None],
) -> Iterator[None]:
    """Let a UNet of diffusers that is given canvases see their windows inside the block.

    `hidden` (B * count, N, D) is what the windows are told; `conditions(windows)` are those of XL.
    """

    def cut(
        _unet: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        windows = canvas.cut(inputs[0])
        options = {
            **options,
            "encoder_hidden_states": hidden,
            "added_cond_kwargs": conditions(windows),
        }
        if options.get("timestep_cond") is not None:
            options["timestep_cond"] = options["timestep_cond"].repeat_interleave(
                canvas.count, 0
            )
        return (windows, *inputs[1:]), options

    def join(
        _unet: nn.Module, _inputs: Any, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return (canvas.join(output[0]), *output[1:])

    handles = [
        unet.register_forward_pre_hook(cut, with_kwargs=True),
        unet.register_forward_hook(join),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
