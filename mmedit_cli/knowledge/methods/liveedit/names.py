"""Whether two pictures are given the same name: by what the untouched model says that they show (ours).

A name is what the model answers, greedily, to one fixed question about a picture. Of each of its n tokens the L
likeliest are kept with their log-probabilities, so that a picture may go by a second name. R queries, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

LENGTH = 8  # n, the tokens of a name at most; its end counts as one
LIKELY = 8  # L, the likeliest tokens that are kept of each
# the token that was said, the likeliest tokens, their log-probabilities
WIDTH = 1 + 2 * LIKELY
NO_TOKEN = -1.0  # behind the end of a name, and in a picture without one
UNLIKELY = -6.0  # what has less log-probability counts as much


def no_names(rows: int) -> Tensor:
    """Return the names of pictures of which nothing was said: (rows, n, 1 + 2 L)."""
    shape = (rows, LENGTH, WIDTH)
    return torch.full(shape, NO_TOKEN)


def likeliest(logits: Tensor) -> Tensor:
    """Return the L likeliest tokens and their log-probabilities: (..., V) -> (..., 2 L)."""
    every = logits.float().log_softmax(-1)
    *rows, size = every.shape
    kept = min(LIKELY, size)
    values, indices = every.topk(kept, dim=-1)
    tokens = values.new_full((*rows, LIKELY), NO_TOKEN)
    likelihoods = torch.full_like(tokens, UNLIKELY)
    tokens[..., :kept] = indices.to(tokens.dtype)
    likelihoods[..., :kept] = values
    return torch.cat((tokens, likelihoods), -1)


def spoken(
    following: Callable[[list[int]], Tensor], stops: Collection[int], end: int
) -> Tensor:
    """Return what is said greedily about a picture: (1, n, 1 + 2 L).

    `following` gives the logits (V,) behind the tokens that were said so far. What stops an answer is its `end`.
    """
    names = no_names(1)
    name = names[0]
    said: list[int] = []
    for place in range(LENGTH):
        logits = following(said).cpu()
        token = int(logits.argmax())
        is_last = token in stops
        if is_last and not said:
            break
        name[place, 0] = end if is_last else token
        name[place, 1:] = likeliest(logits)
        if is_last:
            break
        said.append(token)
    return names


def agreement(queries: Tensor, keys: Tensor) -> Tensor:
    """Return how surely pictures have the same name: (R, n, 1 + 2 L), (N, n, 1 + 2 L) -> (R, N), in [UNLIKELY, 0].

    It is the mean of two log-probabilities: of the key's name where the query's picture is seen, and the other way
    round. Where two names part, the token that parts them counts and what follows does not. A picture without a name
    agrees with none.
    """
    there = _likelihood(queries, keys)
    back = _likelihood(keys, queries)
    return (there + back.T) / 2


def _likelihood(hearers: Tensor, speakers: Tensor) -> Tensor:
    """Return the log-probability that one picture is given another's name, up to where they part: (R, N)."""
    heard = hearers[..., 0]
    said = speakers[..., 0]
    heard_first = heard[:, :1]
    said_first = said[:, 0]
    # many names begin alike: each beginning is looked up once
    beginnings, which = said_first.unique(return_inverse=True)
    looked_up = beginnings.expand(len(heard), -1)
    total = _of_token(hearers[:, 0], looked_up)[:, which]
    # from then on few pairs are left
    together = heard_first == said_first
    row, column = together.nonzero(as_tuple=True)
    for place in range(1, LENGTH):
        token = said[column, place]
        goes_on = token != NO_TOKEN
        row = row[goes_on]
        column = column[goes_on]
        token = token[goes_on]
        if not len(row):
            break
        likelihood = _of_token(hearers[row, place], token[:, None])
        total[row, column] += likelihood[:, 0]
        same = heard[row, place] == token
        row = row[same]
        column = column[same]
    both_named = (said_first != NO_TOKEN) & (heard_first != NO_TOKEN)
    known = torch.where(both_named, total, UNLIKELY)
    return known.clamp(min=UNLIKELY)


def _of_token(heard: Tensor, wanted: Tensor) -> Tensor:
    """Return the log-probabilities of tokens where one was said: (R, 1 + 2 L), (R, m) -> (R, m)."""
    tokens = heard[:, 1 : 1 + LIKELY]
    likelihoods = heard[:, 1 + LIKELY :]
    is_it = tokens[:, :, None] == wanted[:, None]
    beside = likelihoods[:, :, None]
    found = torch.where(
        is_it,
        beside,
        UNLIKELY,
    )
    return found.amax(1)
