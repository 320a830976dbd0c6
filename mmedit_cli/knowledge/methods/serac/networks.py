"""The two networks of SERAC: the scope classifier and the counterfactual model (Mitchell et al. 2022, section 3).

R queries, T tokens, S tokens of an answer, D width of the model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmedit_cli.knowledge.methods.serac.hparams import SeracHparams
from mmedit_cli.knowledge.methods.shared.scope import Scope


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
        self.scope = Scope(
            entry_width,
            hparams.hidden_dim,
            hparams.prompt_dim,
            hparams.detail_dim,
        )
        self.counterfactual = Counterfactual(
            width,
            hparams.answer_dim,
        )
