"""Where a question ends: the token that has read all of it, and what answers from there on."""

from __future__ import annotations

import torch
from torch import Tensor


def ends_of(question: Tensor) -> Tensor:
    """Return the position of the last marked token of each row: (B, T) bool -> (B,); -1 for a row without any."""
    places = torch.arange(question.shape[1], device=question.device)
    marked = torch.where(question, places, -1)
    return marked.amax(1)


def only_last(question: Tensor) -> Tensor:
    """Leave of the marked tokens of each row the last one: (B, T) bool -> (B, T) bool."""
    length = question.shape[1]
    places = torch.arange(
        length,
        device=question.device,
    )
    ends = ends_of(question)
    return places == ends[:, None]


def states_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the state of each row at its position: (B, T, D), (B,) -> (B, D)."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, positions.to(hidden.device)]
