"""LLaVA-1.5: a CLIP tower, a two-layer projector, and a Llama decoder with the picture in the place of `<image>`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmedit_cli.backbones.base import VisionLanguageModel
from mmedit_cli.errors import ModelError


class Llava(VisionLanguageModel):
    """LlavaForConditionalGeneration; a sequence is [bos | image tokens | newline prompt answer] (Liu et al. 2024)."""

    family = "llava"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config
        vision = config.vision_config
        self.n_image_tokens = (vision.image_size // vision.patch_size) ** 2
        if config.vision_feature_select_strategy == "full":
            self.n_image_tokens += 1
        self._image_id: int = config.image_token_id
        if self.tokenizer.convert_tokens_to_ids(self.image_token) != self._image_id:
            raise ModelError(f"{self.name}: the tokenizer has no {self.image_token} token with id {self._image_id}")

    @property
    def generator(self) -> Any:
        """The model itself."""
        return self.model

    def _prompt_ids(self, text: str, *, with_image: bool) -> tuple[list[int], int, int]:
        if not with_image:
            return self.tokenizer(text)["input_ids"], 0, 0
        placed = text if self.image_token in text else f"{self.image_token}\n{text}"
        ids = self.tokenizer(placed)["input_ids"]
        start = ids.index(self._image_id)
        return ids[:start] + [self._image_id] * self.n_image_tokens + ids[start + 1 :], start, self.n_image_tokens

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return torch.stack(list(self.model.get_image_features(pixels, return_dict=True).pooler_output))


BACKBONE = Llava
