"""BLIP-2: a vision tower, a Q-Former whose query tokens come first in the sequence, and an OPT decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmedit_cli.backbones.base import VisionLanguageModel
from mmedit_cli.pictures import Picture


class Blip2(VisionLanguageModel):
    """Blip2ForConditionalGeneration; the sequence is [query tokens | bos prompt answer] (Li et al. 2023, 3.3)."""

    family = "blip2"

    @property
    def generator(self) -> Any:
        """The language model: the outer `generate` would encode the picture again."""
        return self.model.language_model

    def n_image_tokens(self, picture: Picture) -> int:
        """The number of query tokens, the same for every picture."""
        return self.model.config.num_query_tokens  # type: ignore[no-any-return]

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        # any id will do at the image positions: their embeddings are overwritten
        return [self.pad_id] * n_image + self.tokenizer(text)["input_ids"], 0

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return self.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output


BACKBONE = Blip2
