"""The two networks of SERAC: the scope classifier and the counterfactual model (Mitchell et al. 2022, section 3).

R queries, N edits, T tokens, S tokens of an answer, D width of the model, E width of what enters it, C values of a
code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmedit_cli.knowledge.methods.serac.hparams import SeracHparams

_APART = -1e4  # score of a pair of which one alone has a picture
# the sharpness with which each part of a code is compared at first
_SHARPNESS = {"prompt": 10.0, "words": 60.0, "picture": 20.0, "detail": 5.0}
_OFFSET = 3.0  # score of two codes that are the same, at first


class Scope(nn.Module):
    """Says how surely a query is about an edit, by picture and prompt; an answer never enters.

    A code holds directions: of the prompt as a network reads it, of its words as they are, of the picture as the image
    encoder sees it, and of a few of its details. The score falls with the distance of the codes from an offset, as
    the published exp(-distance) does from 1. Facts without a picture are compared by their words alone.
    """

    def __init__(self, entry_width: int, hparams: SeracHparams) -> None:
        super().__init__()
        hp = hparams
        self.parts = [hp.prompt_dim, entry_width, entry_width, hp.detail_dim, 1]
        self.norm = nn.LayerNorm(entry_width)
        self.reads = nn.Linear(entry_width, hp.hidden_dim)
        self.prompt = nn.Linear(
            hp.hidden_dim,
            hp.prompt_dim,
        )
        self.detail = nn.Linear(
            entry_width,
            hp.detail_dim,
            bias=False,
        )
        # kept as tenths: a step of the optimizer moves them ten times as far as a weight
        logs = [math.log(value) for value in _SHARPNESS.values()]
        start = torch.tensor([*logs, _OFFSET])
        self.tenths = nn.Parameter(start / 10)

    @property
    def width(self) -> int:
        """C, the number of values of a code."""
        return sum(self.parts)

    def code(self, words: Tensor, picture: Tensor, sees: Tensor) -> Tensor:
        """Return the codes of queries: mean embeddings of words and of picture (R, E) each, (R,) bool -> (R, C)."""
        words = words.float()
        picture = picture.float()
        read = self.reads(self.norm(words)).relu()
        prompt = self.prompt(read)
        whole = F.layer_norm(
            picture,
            picture.shape[-1:],
        )
        detail = self.detail(whole)
        directions = []
        for part in (prompt, words, whole, detail):
            direction = F.normalize(
                part,
                dim=-1,
            )
            directions.append(direction)
        flag = sees[:, None]
        directions.append(flag.float())
        return torch.cat(directions, 1)

    def composed(self, prompts: Tensor, pictures: Tensor) -> Tensor:
        """Return codes with the prompts of some and the pictures of others: (R, C) each."""
        asked = sum(self.parts[:2])
        return torch.cat((prompts[:, :asked], pictures[:, asked:]), 1)

    def forward(self, queries: Tensor, edits: Tensor) -> Tensor:
        """Return the score of each query for each edit, above 0 if it is about it: (R, C), (N, C) -> (R, N)."""
        values = 10 * self.tenths
        *logs, offset = values.unbind()
        asked = torch.split(
            queries,
            self.parts,
            1,
        )
        known = torch.split(edits, self.parts, 1)
        distances = []
        for number, log in enumerate(logs):
            own = known[number].T
            cosine = asked[number] @ own
            sharpness = log.exp()
            distances.append(sharpness * (1 - cosine))
        prompt, words, picture, detail = distances
        with_picture = offset - prompt - picture - detail
        without = offset - words
        sees = asked[-1]
        seen = known[-1].T
        both_see = sees * seen > 0
        score = torch.where(
            both_see,
            with_picture,
            without,
        )
        apart = sees != seen
        return score.masked_fill(apart, _APART)


class Counterfactual(nn.Module):
    """Answers a query from one edit: a small network on the last states of the frozen model, for its own head.

    What the model has in mind at a token is compared with what it had in mind at each token of the edit's answer, and
    the word that was to follow there is added, beside what a small network makes of both.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(
            width,
            dim,
        )
        self.key = nn.Linear(width, dim)
        self.reads = nn.Linear(
            2 * width,
            dim,
        )
        self.writes = nn.Linear(dim, width)
        strength = torch.tensor(math.log(2.0))
        self.tenth = nn.Parameter(strength / 10)
        # what is alike is near from the start, and nothing is written yet
        start = self.query.state_dict()
        self.key.load_state_dict(start)
        nn.init.zeros_(self.writes.weight)
        nn.init.zeros_(self.writes.bias)

    def forward(
        self, states: Tensor, keys: Tensor, words: Tensor, used: Tensor
    ) -> Tensor:
        """Return the states that answer: (R, T, D), keys and words (R, S, D), used (R, S) bool -> (R, T, D)."""
        states = states.float()
        normed = self.norm(states)
        normed_keys = self.norm(keys.float())
        weights = self._weights(
            normed,
            normed_keys,
            used,
        )
        directions = F.normalize(
            words.float(),
            dim=-1,
        )
        mixed = weights @ directions
        word = F.normalize(mixed, dim=-1)
        both = torch.cat((normed, word), -1)
        read = self.reads(both)
        active = F.gelu(read)
        written = self.writes(active)
        strength = (10 * self.tenth).exp()
        added = strength * word + written
        length = states.norm(dim=-1, keepdim=True)
        answer: Tensor = states + length * added
        return answer

    def _weights(self, states: Tensor, keys: Tensor, used: Tensor) -> Tensor:
        """Return how near each state is to each token of the answer: (R, T, D), (R, S, D), (R, S) -> (R, T, S)."""
        queries = self.query(states)
        wanted = self.key(keys)
        sharpness = queries.shape[-1] ** -0.5
        products = queries @ wanted.transpose(1, 2)
        logits = sharpness * products
        never = ~used[:, None]
        logits = logits.masked_fill(
            never,
            float("-inf"),
        )
        weights: Tensor = logits.softmax(-1)
        return weights


class SeracNetworks(nn.Module):
    """Both networks; the model itself stays frozen."""

    def __init__(self, width: int, entry_width: int, hparams: SeracHparams) -> None:
        super().__init__()
        self.scope = Scope(entry_width, hparams)
        self.counterfactual = Counterfactual(
            width,
            hparams.answer_dim,
        )
