"""Patch: the only way to touch a model. What it changes it can take back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmedit_cli.errors import ModelError


def bring_in(model: nn.Module, name: str) -> None:
    """Load for good the weights of the named module that are on disk or in CPU memory until they are used.

    accelerate keeps such weights as empty tensors, and what is written into one of them is lost. Raises ModelError
    for a module whose weights are nowhere.
    """
    submodule = model.get_submodule(name)
    for path, module in submodule.named_modules(prefix=name):
        own = module.parameters(recurse=False)
        if any(parameter.is_meta for parameter in own):
            _load_offloaded(path, module)


def _load_offloaded(path: str, module: nn.Module) -> None:
    from accelerate.hooks import (
        AlignDevicesHook,
        add_hook_to_module,
        remove_hook_from_module,
    )
    from accelerate.utils import align_module_device, set_module_tensor_to_device

    values = {}
    with align_module_device(module):  # as for a forward pass
        for key, parameter in module.named_parameters(recurse=False):
            values[key] = parameter.detach().clone()
    device = next(iter(values.values())).device
    if device.type == "meta":
        raise ModelError(
            f"{path}: its weights are on device {device}: they were never loaded",
            "leave --device-map out",
        )
    remove_hook_from_module(module)
    for key, value in values.items():
        set_module_tensor_to_device(module, key, device, value=value)
    # inputs still come from other devices
    add_hook_to_module(module, AlignDevicesHook(execution_device=device))


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
        """Return the named parameter, free to be overwritten in place: its original is kept first.

        An offloaded one is brought in, and stays.
        """
        bring_in(self.model, name.rpartition(".")[0])
        parameter = self.model.get_parameter(name)
        if name not in self._originals:
            self._originals[name] = parameter.detach().clone()
        return parameter

    def set_(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter; raise ValueError if the shape differs."""
        parameter = self.parameter(name)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{name}: shape {tuple(value.shape)} given, {tuple(parameter.shape)} expected"
            )
        with torch.no_grad():
            parameter.copy_(value)

    def add_(self, name: str, delta: Tensor) -> None:
        """Add to a parameter; raise ValueError if the shape differs."""
        self.set_(name, self.parameter(name).detach() + delta)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of the named one, which is brought in if it is offloaded."""
        bring_in(self.model, name)
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        original = parent.get_submodule(child)
        self._modules.append((parent, child, original))
        setattr(parent, child, module)

    def hook(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Pass the output of the named module (the first entry, if it is a tuple) through `change`; None keeps it."""

        def forward_hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return change(output)
            first, *rest = output
            changed = change(first)
            return None if changed is None else (changed, *rest)

        module = self.model.get_submodule(name)
        self._hooks.append(module.register_forward_hook(forward_hook))

    def hook_call(
        self, name: str, change: Callable[[Tensor, Tensor], Tensor | None]
    ) -> None:
        """Pass (first argument, output) of the named module through `change`; None keeps the output."""

        def forward_hook(
            _module: nn.Module, args: tuple[Any, ...], output: Tensor
        ) -> Tensor | None:
            return change(args[0], output)

        module = self.model.get_submodule(name)
        self._hooks.append(module.register_forward_hook(forward_hook))

    def hook_input(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Pass what enters the named module (its first argument) through `change`; None keeps it."""

        def forward_pre_hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            # transformers passes the hidden state by position or by this name
            hidden = args[0] if args else kwargs["hidden_states"]
            changed = change(hidden)
            if changed is None:
                return None
            if args:
                return (changed, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed}

        module = self.model.get_submodule(name)
        handle = module.register_forward_pre_hook(
            forward_pre_hook,
            with_kwargs=True,
        )
        self._hooks.append(handle)

    def changed(self) -> dict[str, Tensor]:
        """Return the present value of every parameter that was changed."""
        present = {}
        for name in self._originals:
            parameter = self.model.get_parameter(name)
            present[name] = parameter.detach().clone()
        return present

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside the block every weight is as it was before its first change; hooks and modules stay."""
        present = self.changed()
        with torch.no_grad():
            for name, original in self._originals.items():
                self.model.get_parameter(name).copy_(original)
        try:
            yield
        finally:
            for name, value in present.items():
                self.set_(name, value)

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
    before = []
    for parameter in parameters:
        before.append((parameter, parameter.requires_grad, parameter.grad))
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(True)
            # backward() would add to the gradient that is given back
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad
