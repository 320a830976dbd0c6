"""A base class for families whose Q-Former turns every picture into the same number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.pictures import Picture


class QFormerModel(VisionLanguageModel):
    """A Blip2ForConditionalGeneration around a decoder-only language model; a family says where the picture stands."""

    @property
    def generator(self) -> Any:
        """The language model: the outer `generate` would encode the picture again."""
        return self.model.language_model

    def n_image_tokens(self, picture: Picture) -> int:
        """The number of query tokens, the same for every picture."""
        count: int = self.model.config.num_query_tokens
        return count

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        output = self.model.get_image_features(inputs["pixel_values"], return_dict=True)
        features: Sequence[Tensor] = output.pooler_output
        return features
