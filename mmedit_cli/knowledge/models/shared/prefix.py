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
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # GPT-2 gives its layers some of their arguments without names
        names = list(inspect.signature(module.forward).parameters)
        by_name = dict(zip(names, args, strict=False))
        first, *_ = names
        rest = {**by_name, **kwargs}
        seen.append((rest.pop(first), rest))
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

    def _rows(self, index: int) -> list[Tensor]:
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        rows = self._read(index)
        if rows is None:
            with torch.no_grad():
                found = self.compute(self._groups[index])
            rows = [row.detach().to("cpu", copy=True) for row in found]
            self.computed += len(rows)
            self.tick(len(rows))
        self._keep(index, rows)
        return rows

    def _keep(self, index: int, rows: list[Tensor]) -> None:
        self._kept[index] = rows
        self._bytes += _size(rows)
        while self._bytes > self.budget and self._kept:
            old, evicted = self._kept.popitem(last=False)
            self._bytes -= _size(evicted)
            self._write(old, evicted)

    def _write(self, index: int, rows: list[Tensor]) -> None:
        from safetensors.torch import save_file

        if not self._spill:
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
            save_file({str(i): row for i, row in enumerate(rows)}, file)

    def _read(self, index: int) -> list[Tensor] | None:
        from safetensors.torch import load_file

        if self._folder is None:
            return None
        file = self._folder / f"{index}.safetensors"
        if not file.exists():
            return None
        tensors = load_file(file)
        return [tensors[str(i)] for i in range(len(tensors))]


def _size(rows: Sequence[Tensor]) -> int:
    return sum(row.numel() * row.element_size() for row in rows)
