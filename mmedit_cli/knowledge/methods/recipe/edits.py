"""What RECIPE keeps of an edit: a key, soft tokens, and whether it is about a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.methods.recipe.networks import RecipeNetworks
from mmedit_cli.knowledge.methods.shared.attention import first_valid, span
from mmedit_cli.knowledge.methods.shared.question_features import question_features
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.types import Query


@dataclass(frozen=True)
class Made:
    """What edits become: keys (N, K), soft tokens (N, P, D), and whether each has a picture (N,) bool."""

    keys: Tensor
    soft: Tensor
    sees: Tensor


def make(
    networks: RecipeNetworks,
    backbone: VisionLanguageModel,
    requests: Sequence[Query],
    most: int,
) -> Made:
    """Return what these requests become; raise DataError for an answer of more than `most` tokens."""
    batch = backbone.batch(requests)
    longest = int(batch.answer_mask.sum(1).max())
    if longest > most:
        raise DataError(
            f"an answer takes {longest} tokens; recipe reads {most}",
            f"--set answer_tokens={longest}",
        )
    with torch.no_grad():
        words = backbone.word_embeddings(batch.input_ids)
        answers, used = first_valid(*span(words, batch.answer_mask), most)
    found = question_features(backbone, batch)
    known = networks.read_edits(
        found,
        answers,
        used,
    )
    return Made(
        networks.key(known),
        networks.soft(known, answers, used),
        found.sees,
    )
