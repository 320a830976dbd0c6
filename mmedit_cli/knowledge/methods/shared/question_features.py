"""What a question is about, from what enters the language model anyway: words and picture, never an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch


@dataclass(frozen=True)
class QuestionFeatures:
    """Of each query the mean embedding of its words and of its picture, (B, E) each, and whether it has one, (B,)."""

    words: Tensor
    pictures: Tensor
    sees: Tensor


@torch.no_grad()
def question_features(backbone: VisionLanguageModel, batch: Batch) -> QuestionFeatures:
    """Return the features of a batch, of the tokens between picture and answer; a text has the picture 0."""
    words = backbone.word_embeddings(batch.input_ids).float()
    pictures = torch.zeros_like(words[:, 0])
    if batch.pictures:
        pictures = backbone.mean_image_tokens(batch).float()
    asked = batch.prompt_mask[..., None]
    counted = words * asked
    total = counted.sum(1)
    count = asked.sum(1).clamp(min=1)
    return QuestionFeatures(
        total / count,
        pictures,
        batch.image_mask.any(1),
    )
