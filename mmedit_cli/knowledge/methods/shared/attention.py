"""Attention that reads a sequence to tell which edit it belongs to (Chen et al. 2025, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def span(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens under a mask, moved together: (B, T, D), (B, T) bool -> (B, L, D), (B, L) bool.

    Projections then run on the few tokens of a prompt and not on a whole sequence with its picture.
    """
    marked_first = mask.to(torch.int8).argsort(
        dim=1,
        descending=True,
        stable=True,
    )
    longest = int(mask.sum(1).max())
    order = marked_first[:, :longest]
    width = hidden.shape[-1]
    places = order[..., None].expand(-1, -1, width)
    tokens = hidden.gather(1, places)
    return tokens, mask.gather(1, order)


class CrossAttention(nn.Module):
    """Multi-head cross attention with biases and without an output projection."""

    def __init__(
        self, query_dim: int, token_dim: int, key_dim: int, value_dim: int, heads: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(query_dim, key_dim)
        self.k = nn.Linear(token_dim, key_dim)
        self.v = nn.Linear(token_dim, value_dim)

    def forward(
        self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """(B, n, query_dim), (B, L, token_dim), (B, L) bool of the tokens that count -> (B, n, value_dim)."""
        q = self._by_head(self.q(queries))
        k = self._by_head(self.k(tokens))
        v = self._by_head(self.v(tokens))
        if mask is not None:
            mask = mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
        )
        return attended.transpose(1, 2).flatten(2)

    def _by_head(self, projected: Tensor) -> Tensor:
        """Return (B, L, heads * d) as (B, heads, L, d)."""
        rows, length, _ = projected.shape
        parts = projected.view(rows, length, self.heads, -1)
        return parts.transpose(1, 2)


class Extractor(nn.Module):
    """Reads a sequence as two features: what the prompt looks for in the picture, and the prompt itself.

    With `sentinel_tokens` it also owns the sentinel, a learned picture that every expert has to beat.
    """

    def __init__(
        self, width: int, dim: int, heads: int, vectors: int, sentinel_tokens: int = 0
    ) -> None:
        super().__init__()
        self.vision_queries = nn.Parameter(initial_values(1, vectors, dim))
        self.prompt_queries = nn.Parameter(initial_values(1, vectors, dim))
        self.vision_norm = nn.LayerNorm(width)
        self.prompt_norm = nn.LayerNorm(width)
        self.attn_prompt_for_vision = CrossAttention(
            dim,
            width,
            dim,
            dim,
            heads,
        )
        self.attn_vision = CrossAttention(
            dim,
            width,
            dim,
            dim,
            heads,
        )
        self.attn_prompt = CrossAttention(
            dim,
            width,
            dim,
            dim,
            heads,
        )
        if sentinel_tokens:
            sentinel = initial_values(1, sentinel_tokens, width)
            self.vision_sentinel = nn.Parameter(sentinel)

    def forward(
        self, hidden: Tensor, prompt_mask: Tensor, image_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the vision feature, the prompt feature, and the sentinel's or None, each (B, k * m).

        hidden: (B, T, D) at the edit layer; the masks: (B, T) bool, with at least one token a row each.
        """
        prompt, prompt_valid = span(hidden, prompt_mask)
        vision, vision_valid = span(hidden, image_mask)
        size = len(hidden)
        # what the prompt looks for is the query of the attention on the picture
        queries = self.vision_queries.expand(size, -1, -1)
        words = self.vision_norm(prompt)
        wanted = self.attn_prompt_for_vision(
            queries,
            words,
            prompt_valid,
        )
        seen = self.attn_vision(
            wanted,
            self.vision_norm(vision),
            vision_valid,
        )
        queries = self.prompt_queries.expand(size, -1, -1)
        words = self.prompt_norm(prompt)
        asked = self.attn_prompt(
            queries,
            words,
            prompt_valid,
        )
        sentinel = None
        if hasattr(self, "vision_sentinel"):
            tokens = self.vision_norm(self.vision_sentinel)
            tokens = tokens.expand(size, -1, -1)
            sentinel = self.attn_vision(wanted, tokens).flatten(1)
        return seen.flatten(1), asked.flatten(1), sentinel


def first_valid(tokens: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first tokens of each row, so many of them: (B, L, D), (B, L) -> (B, count, D), (B, count) bool."""
    length = tokens.shape[1]
    if length < count:
        missing = count - length
        tokens = F.pad(tokens, (0, 0, 0, missing))
        valid = F.pad(valid, (0, missing))
    return tokens[:, :count], valid[:, :count]


def initial_values(*shape: int) -> Tensor:
    """Kaiming's normal initialisation of a three-dimensional tensor, as published: the last two sizes are the fan."""
    fan = shape[1] * shape[2]
    deviation: float = (2 / fan) ** 0.5
    return torch.randn(shape) * deviation
