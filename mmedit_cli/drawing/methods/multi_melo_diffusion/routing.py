"""Which concepts a prompt is about: by their names as token ids, or by what the text encoder says of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TokenTrie:
    """Sequences of token ids, each with a name; looking a prompt up takes one pass over it."""

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
        """Return the names of the sequences in a prompt, in the order they stand there, each once.

        Where one sequence begins another, the longest that is there counts.
        """
        found: dict[str, None] = {}
        start = 0
        while start < len(ids):
            node, longest, length = self, [], 1
            for offset, i in enumerate(ids[start:], 1):
                if i not in node.children:
                    break
                node = node.children[i]
                if node.names:
                    longest, length = node.names, offset
            found |= dict.fromkeys(longest)
            start += length
        return list(found)


def nearest(encodings: Tensor, keys: Tensor, threshold: float) -> list[int | None]:
    """Return, for encodings (B, D), the key of (n, D) with the largest cosine, None if that is below `threshold`."""
    if not len(keys):
        return [None] * len(encodings)
    cosine = (
        torch.nn.functional.normalize(encodings, dim=-1)
        @ torch.nn.functional.normalize(keys, dim=-1).T
    )
    best, which = cosine.max(1)
    return [
        int(i) if value >= threshold else None
        for value, i in zip(best, which, strict=True)
    ]


def mean_encoding(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean (B, D) of the encodings (B, N, D) of each prompt's first `lengths` tokens."""
    valid = (
        torch.arange(hidden.shape[1], device=hidden.device)
        < lengths.to(hidden.device)[:, None]
    )
    return (hidden.float() * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
