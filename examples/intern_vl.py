"""InternVL, for pictures of one tile: a vision tower, a projector, and a decoder of Qwen2 or Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared import tiny
from mmedit_cli.pictures import Picture


class InternVL(VisionLanguageModel):
    """InternVLForConditionalGeneration; a sequence is [<img> | image tokens | </img> newline prompt answer]."""

    family = "intern-vl"
    model_types = ("internvl",)
    tiny_models = ("tiny-intern-vl",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._image_id: int = self.model.config.image_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self._image_id)

    @property
    def generator(self) -> Any:
        """The model itself."""
        return self.model

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """`<img>` before the picture, `</img>` and a newline behind it."""
        ids = self.tokenizer(f"<img>{self.image_token}</img>\n")["input_ids"]
        start = ids.index(self._image_id)
        return ids[start - 1 : start], ids[start + 1 :]

    def n_image_tokens(self, picture: Picture) -> int:
        """The same number for every picture: each is scaled to one tile."""
        return int(self.model.config.image_seq_length)

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        if not n_image:
            return self.token_ids(text), 0
        placed = text
        if self.image_token not in text:
            placed = f"<img>{self.image_token}</img>\n{text}"
        ids = self.token_ids(placed)
        start = ids.index(self._image_id)
        image = [self._image_id] * n_image
        return [*ids[:start], *image, *ids[start + 1 :]], start

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = self.model.get_image_features(inputs["pixel_values"], return_dict=True)
        return found.pooler_output

    @classmethod
    def build_tiny(cls, name: str) -> tuple[nn.Module, Any, Any]:
        """Return six layers of width 48 with random weights, for tests."""
        from transformers import (
            InternVLConfig,
            InternVLForConditionalGeneration,
            InternVLVisionConfig,
            Qwen2Config,
        )
        from transformers.models.clip.image_processing_pil_clip import (
            CLIPImageProcessorPil,
        )

        words = tiny.tokenizer("<img>", "</img>")
        vision = InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=[32, 32],
            patch_size=[8, 8],
        )
        text = Qwen2Config(
            vocab_size=len(words),
            hidden_size=48,
            num_hidden_layers=6,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        config = InternVLConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_id=words.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
            downsample_ratio=0.5,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = InternVLForConditionalGeneration(config)
            tiny.spread(model)
        model.generation_config.eos_token_id = words.eos_token_id
        size = {"height": 32, "width": 32}
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
        return model, words, processor


BACKBONE = InternVL
