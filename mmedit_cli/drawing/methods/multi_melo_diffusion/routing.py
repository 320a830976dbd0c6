"""Find the concepts that a prompt names: by the token ids of their names, or by the encoding of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TokenTrie:
    """Sequences of token ids with names; finding them in a prompt takes one pass over it."""

    names: list[str] = field(default_factory=list)
    children: dict[int, TokenTrie] = field(default_factory=dict)

    def insert(self, ids: Sequence[int], name: str) -> None:
        """Add a sequence; raise ValueError for an empty one."""
        if not ids:
            raise ValueError("an empty sequence is in every prompt")
        node = self
        for i in ids:
            node = node.children.setdefault(i, TokenTrie())
        node.names.append(name)

    def find(self, ids: Sequence[int]) -> list[str]:
        """Return the names of the sequences in a prompt, in order, each once.

        If one sequence is the beginning of another, the longest match counts.
        """
        found: dict[str, None] = {}
        start = 0
        while start < len(ids):
            names, length = self._longest_match(ids[start:])
            found |= dict.fromkeys(names)
            start += length
        return list(found)

    def _longest_match(self, ids: Sequence[int]) -> tuple[list[str], int]:
        """Return the names of the longest sequence at the start of ids, and how many ids to go on by."""
        node = self
        names: list[str] = []
        length = 1
        for offset, i in enumerate(ids, 1):
            if i not in node.children:
                break
            node = node.children[i]
            if node.names:
                names = node.names
                length = offset
        return names, length


def nearest(encodings: Tensor, keys: Tensor, threshold: float) -> list[int | None]:
    """Return, for encodings (B, D), the key of (n, D) with the largest cosine, None if that is below `threshold`."""
    if not len(keys):
        return [None] * len(encodings)
    unit_encodings = torch.nn.functional.normalize(encodings, dim=-1)
    unit_keys = torch.nn.functional.normalize(keys, dim=-1)
    cosines = unit_encodings @ unit_keys.T
    best, indices = cosines.max(1)
    found: list[int | None] = []
    for cosine, index in zip(best, indices, strict=True):
        found.append(int(index) if cosine >= threshold else None)
    return found


def mean_encoding(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean (B, D) of the encodings (B, N, D) of each prompt's first `lengths` tokens."""
    device = hidden.device
    positions = torch.arange(hidden.shape[1], device=device)
    valid = positions < lengths.to(device)[:, None]
    masked = hidden.float() * valid[..., None]
    counts = valid.sum(1, keepdim=True)
    return masked.sum(1) / counts
