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

OVERLAP = 8  # neighbours share one eighth of a window
GRID = 8  # diffusers draws pictures of multiples of 8 pixels


@dataclass(frozen=True)
class Canvas:
    """A row of `count` windows of `size` x `size` latents; neighbours share `overlap` columns."""

    count: int
    size: int
    overlap: int

    @classmethod
    def of(cls, count: int, resolution: int, scale: int) -> Canvas:
        """Return the canvas for windows of `resolution` pixels, where a latent is `scale` pixels wide."""
        step = math.lcm(GRID, scale)
        shared_steps = resolution // OVERLAP // step
        shared = max(step, shared_steps * step)
        if 2 * shared > resolution:
            shared = 0
        return cls(
            count,
            resolution // scale,
            shared // scale,
        )

    @property
    def width(self) -> int:
        """Width in latents."""
        return self.count * self.size - (self.count - 1) * self.overlap

    @property
    def starts(self) -> list[int]:
        """The first column of every window."""
        stride = self.size - self.overlap
        return [i * stride for i in range(self.count)]

    def weights(self) -> Tensor:
        """Return weights (count, size) that fall linearly towards a neighbour; those of one column sum to 1."""
        steps = torch.arange(1, self.overlap + 1)
        rising = steps / (self.overlap + 1)
        falling = rising.flip(0)
        left = slice(None, self.overlap)
        right = slice(self.size - self.overlap, None)
        weights = torch.ones(self.count, self.size)
        weights[1:, left] = rising
        weights[:-1, right] = falling
        return weights

    def cut(self, wide: Tensor) -> Tensor:
        """Return the windows (B * count, C, h, size) of canvases (B, C, h, width), canvas by canvas."""
        windows = []
        for start in self.starts:
            end = start + self.size
            windows.append(wide[..., start:end])
        stacked = torch.stack(windows, 1)
        return stacked.flatten(0, 1)

    def join(self, windows: Tensor) -> Tensor:
        """Return canvases (B, C, h, width) of windows (B * count, C, h, size): the weighted mean of overlaps."""
        by_canvas = windows.unflatten(0, (-1, self.count))
        batch, _, channels, height, _ = by_canvas.shape
        weights = self.weights().to(windows)
        # The weights of a column sum to 1, so the sum is the mean of equation 5.
        total = windows.new_zeros(batch, channels, height, self.width)
        for i, start in enumerate(self.starts):
            weighted = by_canvas[:, i] * weights[i]
            end = start + self.size
            total[..., start:end] += weighted
        return total


@contextmanager
def in_windows(
    unet: nn.Module,
    canvas: Canvas,
    hidden: Tensor,
    conditions: Callable[[Tensor], dict[str, Any] | None],
) -> Iterator[None]:
    """Inside the block, a UNet of diffusers that is given canvases sees their windows.

    `hidden` (B * count, N, D) are the prompt encodings of the windows. `conditions(windows)` returns the
    `added_cond_kwargs` of SDXL.
    """

    def cut(
        _unet: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        wide, *others = inputs
        windows = canvas.cut(wide)
        kwargs = dict(kwargs)
        kwargs["encoder_hidden_states"] = hidden
        kwargs["added_cond_kwargs"] = conditions(windows)
        time_condition = kwargs.get("timestep_cond")
        if time_condition is not None:
            repeated = time_condition.repeat_interleave(canvas.count, 0)
            kwargs["timestep_cond"] = repeated
        return (windows, *others), kwargs

    def join(
        _unet: nn.Module, _inputs: Any, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        predicted, *others = output
        return (canvas.join(predicted), *others)

    handles = [
        unet.register_forward_pre_hook(cut, with_kwargs=True),
        unet.register_forward_hook(join),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
