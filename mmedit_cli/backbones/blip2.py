"""BLIP-2: a vision tower, a Q-Former whose query tokens come first in the sequence, and an OPT decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmedit_cli.backbones.base import VisionLanguageModel


class Blip2(VisionLanguageModel):
    """Blip2ForConditionalGeneration; the sequence is [query tokens | bos prompt answer] (Li et al. 2023, 3.3)."""

    family = "blip2"

    @property
    def generator(self) -> Any:
        """The language model: the outer `generate` would encode the picture again."""
        return self.model.language_model

    def _prompt_ids(self, text: str, *, with_image: bool) -> tuple[list[int], int, int]:
        n_image = self.model.config.num_query_tokens if with_image else 0
        # any id will do at the image positions: their embeddings are overwritten
        return [self.pad_id] * n_image + self.tokenizer(text)["input_ids"], 0, n_image

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixels, return_dict=True).pooler_output


BACKBONE = Blip2
