"""Products of matrices in 16 bits on a processor that cannot multiply such numbers: computed in float32.

Without the instructions for them, PyTorch multiplies bfloat16 and float16 a sixth as fast as float32, and a hundredth
as fast for gradients. Weights stay as they are stored; a block of them at a time is converted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 1 << 19  # weights that are converted at once: as many as stay in the caches
_FEW = 4  # rows below which converting costs more than it gains
_SLOW = (torch.bfloat16, torch.float16)
_FAST = "AVX512"  # the capability below which they are


def widen(model: nn.Module) -> None:
    """Let the linear layers of a model on this processor multiply in float32, if it cannot do so in their format."""
    for module in model.modules():
        if type(module) is nn.Linear and _is_slow(module.weight):
            module.__class__ = WideLinear


class WideLinear(nn.Linear):
    """A linear layer in 16 bits whose sums and products are of 32: rounded once, at its outputs."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs (..., out) of inputs (..., in), in the format of the weights."""
        if not _is_slow(self.weight):
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        learns = torch.is_grad_enabled() and (
            input.requires_grad or self.weight.requires_grad
        )
        if len(rows) < _FEW and not learns:
            return super().forward(input)
        found = _product(rows, self.weight, self.bias)
        return found.view(*input.shape[:-1], self.out_features)


def _is_slow(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in _SLOW:
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    return not capability.startswith(_FAST)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = _Product.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """rows (n, in), weight (out, in), bias (out,) or None -> rows @ weight.T + bias, (n, out)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        outputs = torch.empty(
            len(rows),
            len(weight),
            dtype=torch.float32,
        )
        if bias is None:
            outputs.zero_()
        else:
            outputs.copy_(bias)
        # blocks lie in one piece: a matrix is cut along its outputs, a transposed one along its inputs
        across = int(not weight.is_contiguous())
        size = max(1, _BLOCK // weight.shape[1 - across])
        wide = rows.float()
        start = 0
        for block in weight.split(size, across):
            stop = start + block.shape[across]
            if across:
                outputs.addmm_(wide[:, start:stop], block.float().T)
            else:
                outputs[:, start:stop].addmm_(wide, block.float().T)
            start = stop
        return outputs.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        rows, weight = ctx.saved_tensors
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = _product(gradient, weight.T, None)
        if ctx.needs_input_grad[1]:
            of_weight = _product(gradient.T, rows.T, None)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_rows, of_weight, of_bias
