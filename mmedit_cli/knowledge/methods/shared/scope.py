"""Which edit a question is about, if any: a trained comparison of words and pictures (Mitchell et al. 2022).

R queries, N edits, E width of what enters the model, C values of a code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmedit_cli.knowledge.methods.shared.question_features import question_features
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch

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

    def __init__(
        self, entry_width: int, hidden_dim: int, prompt_dim: int, detail_dim: int
    ) -> None:
        super().__init__()
        self.parts = [prompt_dim, entry_width, entry_width, detail_dim, 1]
        self.norm = nn.LayerNorm(entry_width)
        self.reads = nn.Linear(entry_width, hidden_dim)
        self.prompt = nn.Linear(
            hidden_dim,
            prompt_dim,
        )
        self.detail = nn.Linear(
            entry_width,
            detail_dim,
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


def codes(scope: Scope, backbone: VisionLanguageModel, batch: Batch) -> Tensor:
    """Return the codes of a batch, of what enters the language model between picture and answer: (B, C)."""
    found = question_features(backbone, batch)
    return scope.code(
        found.words,
        found.pictures,
        found.sees,
    )


def about(
    scope: Scope, queries: Tensor, edits: Tensor, hidden: Tensor, threshold: float
) -> Tensor:
    """Return which edit each query is about, -1 for none: codes (R, C), (N, C), (N,) bool of those hidden -> (R,)."""
    score = scope(queries, edits)
    score = score.masked_fill(
        hidden.to(score.device),
        float("-inf"),
    )
    best, place = score.max(1)
    return torch.where(best > threshold, place, -1)
