"""LLaVA-1.5: a CLIP tower, a two-layer projector, and a Llama decoder with the picture in the place of `<image>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmedit_cli.backbones.base import VisionLanguageModel
from mmedit_cli.errors import ModelError
from mmedit_cli.pictures import Picture


class Llava(VisionLanguageModel):
    """LlavaForConditionalGeneration; a sequence is [bos | image tokens | newline prompt answer] (Liu et al. 2024)."""

    family = "llava"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config
        vision = config.vision_config
        self._n_patches = (vision.image_size // vision.patch_size) ** 2
        if config.vision_feature_select_strategy == "full":
            self._n_patches += 1
        self._image_id: int = config.image_token_id
        if self.tokenizer.convert_tokens_to_ids(self.image_token) != self._image_id:
            raise ModelError(f"{self.name}: the tokenizer has no {self.image_token} token with id {self._image_id}")

    @property
    def generator(self) -> Any:
        """The model itself."""
        return self.model

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The newline behind the picture."""
        ids = self.tokenizer(f"{self.image_token}\n")["input_ids"]
        return [], ids[ids.index(self._image_id) + 1 :]

    def n_image_tokens(self, picture: Picture) -> int:
        """The number of patches, the same for every picture."""
        return self._n_patches

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        if not n_image:
            return self.tokenizer(text)["input_ids"], 0
        placed = text if self.image_token in text else f"{self.image_token}\n{text}"
        ids = self.tokenizer(placed)["input_ids"]
        start = ids.index(self._image_id)
        return ids[:start] + [self._image_id] * n_image + ids[start + 1 :], start

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return self.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output


BACKBONE = Llava
