"""How far a key reaches, measured by the model's own keys: of unrelated questions, of rewordings, of an empty picture.

n requests, D width of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.grace.codebook import distances
from mmedit_cli.knowledge.methods.shared.unrelated import on_empty_picture, unrelated
from mmedit_cli.types import Query


class Neighbourhood:
    """What lies around a key; `keys_of` returns the keys of questions, (n, D), by the base model."""

    def __init__(self, keys_of: Callable[[Sequence[Query]], Tensor]) -> None:
        self._keys_of = keys_of

    @cached_property
    def unrelated(self) -> Tensor:
        """(32, D): the keys of questions that ship with the package."""
        return self._keys_of(unrelated())

    @cached_property
    def spread(self) -> float:
        """The median distance between keys of unrelated questions: the scale of all radii."""
        keys = self.unrelated
        apart = distances(keys, keys)
        count = len(keys)
        one, other = torch.triu_indices(
            count,
            count,
            offset=1,
        )
        pairs = apart[one, other]
        return float(pairs.median())

    def balanced(
        self,
        requests: Sequence[Query],
        keys: Tensor,
        *,
        balance: float,
        rewordings: Sequence[str],
    ) -> Tensor:
        """Return BalancEdit's radii: (1 - balance) times the negative's distance + balance times the positive's: (n,).

        The positive is the farthest rewording. The negative is the same question about an empty picture, and of a
        question without a picture the nearest unrelated one.
        """
        positive = torch.zeros(len(keys), device=keys.device)
        for wording in rewordings:
            reworded = [_reworded(request, wording) for request in requests]
            apart = _apart(keys, self._keys_of(reworded))
            positive = torch.maximum(positive, apart)
        negative = self._negatives(requests, keys)
        return (1 - balance) * negative + balance * positive

    def _negatives(self, requests: Sequence[Query], keys: Tensor) -> Tensor:
        """Return how far from each key the question lies that it must not reach: (n,)."""
        to_unrelated = distances(keys, self.unrelated)
        negative = to_unrelated.amin(1)
        seeing: list[int] = []
        for i, request in enumerate(requests):
            if request.image is not None:
                seeing.append(i)
        if seeing:
            emptied = []
            for i in seeing:
                empty = on_empty_picture(requests[i])
                emptied.append(empty)
            others = self._keys_of(emptied)
            negative[seeing] = _apart(
                keys[seeing],
                others,
            )
        return negative


def _reworded(request: Query, wording: str) -> Query:
    return replace(request, prompt=wording.replace("{}", request.prompt))


def _apart(some: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each row to that of the other: (n, D), (n, D) -> (n,)."""
    return (some - others).square().sum(1).sqrt()
