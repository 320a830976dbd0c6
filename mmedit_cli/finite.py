"""Checks for NaN and infinity where numbers leave a model; the error names the first module that made one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli.errors import NotFinite


def all_finite(values: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity.

    The sum tells in one pass and without a copy; only where it is not finite itself is each value looked at.
    """
    found = values.detach()
    return bool(found.sum(dtype=torch.float32).isfinite()) or bool(
        found.isfinite().all()
    )


def check_finite(
    values: Tensor, what: str, model: nn.Module, forward: Callable[[], Any]
) -> None:
    """Raise NotFinite if a tensor holds NaN or infinity, naming the first module of `model` that made one.

    `what` is the start of the message, such as "tiny-llava: the logits"; `forward` runs the model as it was run when
    the values were made, and is called only if they are bad.
    """
    if not all_finite(values):
        raise not_finite(what, model, forward)


def not_finite(what: str, model: nn.Module, forward: Callable[[], Any]) -> NotFinite:
    """Return the error for values that are known to be bad; see `check_finite`."""
    name = _first_broken(model, forward)
    if name is None:
        return NotFinite(f"{what} are not finite", "try --dtype float32")
    module = model.get_submodule(name)
    for key, value in module.named_parameters(recurse=False):
        if _is_bad(value):
            return NotFinite(
                f"{what} are not finite: {name}.{key} holds NaN or infinity",
                "copy the model again; if edits are on it, undo them or lower their learning_rate",
            )
    return NotFinite(
        f"{what} are not finite: {name} is the first module that gives NaN or infinity",
        "try --dtype float32; if an edit is on it or being made, a lower learning_rate",
    )


def _is_bad(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_meta or not value.is_floating_point():
        return False
    return not all_finite(value)


class _Found(Exception):
    """Ends a pass at the first bad module; never leaves this file."""


def _first_broken(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Return the name of the first module whose output is bad when `forward` runs; None if none is.

    Modules count in the order in which they end, so it is the innermost; what follows it is not run.
    """
    found: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if any(_is_bad(tensor) for tensor in _tensors(output)):
            found.append(name)
            raise _Found

    handles = []
    for name, module in model.named_modules():
        if name:
            handle = module.register_forward_hook(partial(look, name))
            handles.append(handle)
    try:
        with torch.no_grad():
            forward()
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Any]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
