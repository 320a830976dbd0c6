"""One of several, by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Generator

T = TypeVar("T")


def one_of(items: Sequence[T], source: Generator) -> T:
    """Return one of the items, each as likely as any other."""
    place = torch.randint(len(items), (1,), generator=source)
    return items[int(place)]
