"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: as many image tokens as a picture needs, positions in time, height and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.models.base import Batch, VisionLanguageModel
from mmedit_cli.pictures import Picture, picture_size


class QwenVL(VisionLanguageModel):
    """Qwen2VL, Qwen2_5_VL and Qwen3VLForConditionalGeneration.

    A sequence is [vision start | image tokens | vision end, prompt, answer], with no token of its own in front. Image
    tokens count their positions in three axes (Wang et al. 2024, 2.1, M-RoPE). Qwen3-VL adds features of earlier
    layers of its vision tower behind the first decoder layers (Bai et al. 2025): they are further columns of
    `image_features`, so they are cached and served with the rest.
    """

    family = "qwen-vl"
    image_token = "<|image_pad|>"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config
        if "sliding_attention" in (
            getattr(config.get_text_config(), "layer_types", None) or ()
        ):
            raise ModelError(
                f"{self.name}: sliding-window attention is not supported",
                "use_sliding_window: false",
            )
        self.n_deepstack = len(
            getattr(config.vision_config, "deepstack_visual_indexes", ())
        )
        self._around = (
            config.vision_start_token_id,
            config.image_token_id,
            config.vision_end_token_id,
        )
        if (
            self.tokenizer.convert_tokens_to_ids(self.image_token)
            != config.image_token_id
        ):
            raise ModelError(
                f"{self.name}: the tokenizer has no {self.image_token} with id {config.image_token_id}"
            )
        self._grid = lru_cache(maxsize=1 << 16)(self._measure)

    @property
    def generator(self) -> Any:
        """The model itself."""
        return self.model

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The start and the end of vision."""
        start, _, end = self._around
        return [start], [end]

    def n_image_tokens(self, picture: Picture) -> int:
        """The patches of the picture at the size it is brought to, `merge_size` squared of them in one token."""
        height, width = self._grid(picture)
        return height * width // self.image_processor.merge_size**2

    def _measure(self, picture: Picture) -> tuple[int, int]:
        """Return (rows, columns) of patches that the image processor will cut the picture into."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            smart_resize,
        )

        processor = self.image_processor
        width, height = picture_size(picture)
        try:
            height, width = smart_resize(
                height,
                width,
                factor=processor.patch_size * processor.merge_size,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=processor.size["longest_edge"],
            )
        except ValueError as error:
            raise DataError(
                f"{picture.path}: {width} x {height} pixels cannot be used: {error}"
            ) from error
        return height // processor.patch_size, width // processor.patch_size

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        ids = self.token_ids(text)
        if not n_image:
            return ids, 0
        start, image, end = self._around
        if image in ids:  # a chat format has put it there
            at = ids.index(image)
            return [*ids[:at], *[image] * n_image, *ids[at + 1 :]], at
        return [start, *[image] * n_image, end, *ids], 1

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = self.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
        later = getattr(found, "deepstack_features", None) or ()
        return [
            torch.cat(parts, dim=-1)
            for parts in zip(found.pooler_output, *later, strict=True)
        ]

    def position_ids(self, batch: Batch) -> Tensor:
        """Positions in time, height and width, (3, B, T); behind a picture they go on from its longer side."""
        grids = [
            (1, *self._grid(batch.pictures[index]))
            for index in batch.picture_of
            if index is not None
        ]
        positions, _ = self.model.model.get_rope_index(
            batch.input_ids,
            batch.image_mask.int(),
            torch.tensor(grids, device=self.device) if grids else None,
            attention_mask=batch.attention_mask,
        )
        return positions  # type: ignore[no-any-return]


BACKBONE = QwenVL
