"""Patch: the only way to touch a model. What it changes it can take back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Patch(AbstractContextManager["Patch"]):
    """A set of changes to one model: weights, modules and hooks; leaving or `undo()` restores every bit.

    The original of a weight is copied at its first change, because in low precision (w + d) - d is not w.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._originals: dict[str, Tensor] = {}
        self._modules: list[tuple[nn.Module, str, nn.Module]] = []
        self._hooks: list[RemovableHandle] = []

    def parameter(self, name: str) -> nn.Parameter:
        """Return the named parameter, free to be overwritten in place: its original is kept first."""
        parameter = self.model.get_parameter(name)
        if name not in self._originals:
            self._originals[name] = parameter.detach().clone()
        return parameter

    def set_(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter; raise ValueError if the shape differs."""
        parameter = self.parameter(name)
        if value.shape != parameter.shape:
            raise ValueError(f"{name}: shape {tuple(value.shape)} given, {tuple(parameter.shape)} expected")
        with torch.no_grad():
            parameter.copy_(value)

    def add_(self, name: str, delta: Tensor) -> None:
        """Add to a parameter; raise ValueError if the shape differs."""
        self.set_(name, self.model.get_parameter(name).detach() + delta)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of the named one."""
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        self._modules.append((parent, child, self.model.get_submodule(name)))
        setattr(parent, child, module)

    def hook(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Pass the output of the named module (the first entry, if it is a tuple) through `change`; None keeps it."""

        def forward_hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            changed = change(first)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        self._hooks.append(self.model.get_submodule(name).register_forward_hook(forward_hook))

    def hook_call(self, name: str, change: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Pass what enters the named module (its first argument) and its output through `change`; None keeps it."""

        def forward_hook(_module: nn.Module, inputs: Any, output: Any) -> Any:
            return change(inputs[0], output)

        self._hooks.append(self.model.get_submodule(name).register_forward_hook(forward_hook))

    def hook_input(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Pass what enters the named module (its first argument) through `change`; None keeps it."""

        def forward_pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = change(args[0] if args else kwargs["hidden_states"])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        module = self.model.get_submodule(name)
        self._hooks.append(module.register_forward_pre_hook(forward_pre_hook, with_kwargs=True))

    def changed(self) -> dict[str, Tensor]:
        """Return the present value of every parameter that was touched."""
        return {name: self.model.get_parameter(name).detach().clone() for name in self._originals}

    def undo(self) -> None:
        """Restore hooks, modules and weights, the last change first."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._modules:
            parent, child, module = self._modules.pop()
            setattr(parent, child, module)
        with torch.no_grad():
            for name, original in self._originals.items():
                self.model.get_parameter(name).copy_(original)
        self._originals.clear()

    def __exit__(self, *_: object) -> None:
        self.undo()


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach just these parameters inside the block; flags and gradients are as before afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        for p, _, _ in before:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
