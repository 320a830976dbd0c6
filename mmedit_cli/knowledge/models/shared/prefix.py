"""Frozen results are computed once: a forward pass stops at a module, and its rows are cached."""

from __future__ import annotations

import inspect
import shutil
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mmedit_cli.runtime import Processes
from mmedit_cli.storage import new_temporary_folder

K = TypeVar("K", bound=Hashable)


class _Reached(Exception):
    """Ends a forward pass early; never leaves this file."""


def run_to(
    forward: Callable[[], Any], module: nn.Module
) -> tuple[Tensor, dict[str, Any]]:
    """Call `forward` until `module` is about to run; return (hidden, keyword arguments) that would enter it.

    Raises RuntimeError if the pass ends without coming to `module`.
    """
    arguments = arguments_of(forward, module)
    first, *_ = inspect.signature(module.forward).parameters
    return arguments.pop(first), arguments


@contextmanager
def entering(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield what enters a module at its next pass inside the block, by the names of its parameters."""
    seen: dict[str, Any] = {}

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.update(_by_name(module, args, kwargs))

    handle = module.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def arguments_of(forward: Callable[[], Any], module: nn.Module) -> dict[str, Any]:
    """Call `forward` until `module` is about to run; return what would enter it, by the names of its parameters.

    Raises RuntimeError if the pass ends without coming to `module`.
    """
    seen: list[dict[str, Any]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_by_name(module, args, kwargs))
        raise _Reached

    # before other hooks on its input: what an editor changes there belongs to what follows
    handle = module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        forward()
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError(f"the forward pass never came to {type(module).__name__}")


def _by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    # GPT-2 gives its layers some of their arguments without names
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


class _Recorded(nn.Module):
    """Stands in the place of a decoder layer: keeps what the layer would receive, and hands the hidden state on."""

    def __init__(self, real: nn.Module, *, last: bool) -> None:
        super().__init__()
        self._real = (real,)  # in a tuple it is no part of this module
        self._last = last
        self.hidden: Tensor | None = None
        self.context: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._real[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden state as it came; behind the last layer the pass ends."""
        (real,) = self._real
        self.context = _by_name(real, args, kwargs)
        first, *_ = inspect.signature(real.forward).parameters
        hidden: Tensor = self.context.pop(first)
        self.hidden = hidden
        if self._last:
            raise _Reached
        return hidden


def record_layers(
    forward: Callable[[], Any], layers: nn.ModuleList, start: int
) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
    """Call `forward` up to layer `start`; return what would enter it, and what each layer from there on receives.

    The second is one set of keyword arguments a layer, empty below `start`. No hook on those layers is called.
    """
    real = list(layers)
    standing = []
    for index in range(start, len(real)):
        last = index == len(real) - 1
        standing.append(_Recorded(real[index], last=last))
    try:
        for index, module in enumerate(standing, start):
            layers[index] = module
        forward()
    except _Reached:
        pass
    finally:
        for index in range(start, len(real)):
            layers[index] = real[index]
    hidden = standing[0].hidden
    if hidden is None:
        raise RuntimeError("the forward pass never came to its layers")
    below: list[dict[str, Any]] = [{} for _ in range(start)]
    contexts = [module.context for module in standing]
    return hidden, (*below, *contexts)


@contextmanager
def substituted(
    module: nn.Module, value: Tensor, name: str | None = None
) -> Iterator[None]:
    """Inside the block, `value` enters `module` once, at its next pass, in the place of an argument.

    That is the one called `name`, or the first.
    """

    def put(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        handle.remove()
        given = _by_name(module, args, kwargs)
        first, *_ = given
        return (), {**given, name or first: value}

    # before other hooks on its input, as where it was taken
    handle = module.register_forward_pre_hook(put, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class DeepStack:
    """Image tokens that are added to the hidden state behind the first K decoder layers (Meng et al. 2024, DeepStack).

    at: (B, T) bool, the image positions; tokens: (n, K, D), one row a position in order; K is 0 for most models.
    """

    at: Tensor
    tokens: Tensor

    @contextmanager
    def on(self, layers: nn.ModuleList) -> Iterator[None]:
        """Add the tokens in every pass through `layers` inside the block, after what hooks on a layer change."""
        handles = [
            layer.register_forward_hook(partial(self._add, k))
            for k, layer in zip(
                range(self.tokens.shape[1]),
                layers,
                strict=False,
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, k: int, _module: nn.Module, _args: object, hidden: Tensor) -> Tensor:
        if hidden.shape[1] != self.at.shape[1]:
            return hidden  # a decoding step: the pictures are in the cache already
        at = self.at.to(hidden.device)
        changed = hidden[at] + self.tokens[:, k].to(hidden)
        return hidden.masked_scatter(at.unsqueeze(-1), changed)


class RowCache(Generic[K]):
    """Frozen rows by key: computed once in fixed groups, kept under a byte budget, spilled to disk beyond it.

    `compute` maps a group of keys to one tensor each; `tick(n)` is told of n rows more that were computed. The groups
    are fixed by `plan`, so a row is always computed in the same company and is bit-identical whether it was kept, read
    back from a memory-mapped file, or computed again.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[K]], Sequence[Tensor]],
        *,
        group: int = 16,
        budget: int = 1 << 30,
        spill: bool = False,
        tick: Callable[[int], None] = lambda _n: None,
    ) -> None:
        self.compute = compute
        self.group = group
        self.budget = budget
        self.tick = tick
        self.computed = 0
        self._groups: list[tuple[K, ...]] = []
        self._place: dict[K, tuple[int, int]] = {}
        self._kept: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._bytes = 0
        self._spill = spill
        self._folder: Path | None = None
        self._together: Path | None = None
        self._groups_together = 0

    def plan(self, keys: Sequence[K]) -> None:
        """Fix the groups for the keys that are new, in the order given; nothing is computed yet."""
        new = [key for key in dict.fromkeys(keys) if key not in self._place]
        for start in range(0, len(new), self.group):
            stop = start + self.group
            members = tuple(new[start:stop])
            index = len(self._groups)
            self._groups.append(members)
            for position, key in enumerate(members):
                place = (index, position)
                self._place[key] = place

    @property
    def planned(self) -> list[K]:
        """The keys whose groups are fixed, in order."""
        return list(self._place)

    def get(self, keys: Sequence[K]) -> list[Tensor]:
        """Return one tensor a key, in order."""
        self.plan(keys)
        found: dict[int, list[Tensor]] = {}
        rows = []
        for key in keys:
            index, position = self._place[key]
            if index not in found:
                found[index] = self._rows(index)
            rows.append(found[index][position])
        return rows

    def compute_together(self, folder: Path, processes: Processes) -> None:
        """Compute every group that is planned once among several processes, and keep all of them in `folder`.

        Each computes its part, and later reads the others' from there; the caller removes the folder.
        """
        self._together = folder
        self._groups_together = len(self._groups)
        world = processes.world
        for start in range(0, len(self._groups), world):
            mine = start + processes.rank
            if mine < len(self._groups):
                rows = self._computed(mine)
                _save_rows(folder / f"{mine}.safetensors", rows)
            in_all = self._groups[start : start + world]
            self.tick(sum(map(len, in_all)))
        processes.wait()

    def _rows(self, index: int) -> list[Tensor]:
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        rows = self._read(index)
        if rows is None:
            rows = self._computed(index)
            self.tick(len(rows))
        self._keep(index, rows)
        return rows

    def _computed(self, index: int) -> list[Tensor]:
        with torch.no_grad():
            found = self.compute(self._groups[index])
        self.computed += len(found)
        return [row.detach().to("cpu", copy=True) for row in found]

    def _keep(self, index: int, rows: list[Tensor]) -> None:
        self._kept[index] = rows
        self._bytes += _size(rows)
        while self._bytes > self.budget and self._kept:
            old, evicted = self._kept.popitem(last=False)
            self._bytes -= _size(evicted)
            self._write(old, evicted)

    def _write(self, index: int, rows: list[Tensor]) -> None:
        if not self._spill or index < self._groups_together:
            return
        if self._folder is None:
            self._folder = new_temporary_folder()
            weakref.finalize(
                self,
                shutil.rmtree,
                self._folder,
                ignore_errors=True,
            )
        file = self._folder / f"{index}.safetensors"
        if not file.exists():
            _save_rows(file, rows)

    def _read(self, index: int) -> list[Tensor] | None:
        from safetensors.torch import load_file

        folder = self._folder
        if index < self._groups_together:
            folder = self._together
        if folder is None:
            return None
        file = folder / f"{index}.safetensors"
        if not file.exists():
            return None
        tensors = load_file(file)
        return [tensors[str(i)] for i in range(len(tensors))]


def _save_rows(file: Path, rows: Sequence[Tensor]) -> None:
    from safetensors.torch import save_file

    tensors = {str(i): row.contiguous() for i, row in enumerate(rows)}
    save_file(tensors, file)


def _size(rows: Sequence[Tensor]) -> int:
    return sum(row.numel() * row.element_size() for row in rows)
