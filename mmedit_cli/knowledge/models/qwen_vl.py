"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: as many image tokens as a picture needs, positions in time, height and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch
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
        layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
        if "sliding_attention" in layer_types:
            raise ModelError(
                f"{self.name}: sliding-window attention is not supported",
                "use_sliding_window: false",
            )
        deepstack = getattr(config.vision_config, "deepstack_visual_indexes", ())
        self.n_deepstack = len(deepstack)
        self._start_id: int = config.vision_start_token_id
        self._image_id: int = config.image_token_id
        self._end_id: int = config.vision_end_token_id
        known = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if known != self._image_id:
            raise ModelError(
                f"{self.name}: the tokenizer has no {self.image_token} with id {self._image_id}"
            )
        self._grid = lru_cache(maxsize=1 << 16)(self._measure)

    @property
    def generator(self) -> Any:
        """The model itself."""
        return self.model

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The start and the end of vision."""
        return [self._start_id], [self._end_id]

    def n_image_tokens(self, picture: Picture) -> int:
        """The patches of the picture at the size it is brought to, `merge_size` squared of them in one token."""
        rows, columns = self._grid(picture)
        merge_size: int = self.image_processor.merge_size
        return rows * columns // merge_size**2

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
        image_ids = [self._image_id] * n_image
        if self._image_id in ids:  # a chat format has put it there
            at = ids.index(self._image_id)
            return [*ids[:at], *image_ids, *ids[at + 1 :]], at
        return [self._start_id, *image_ids, self._end_id, *ids], 1

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = self.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
        later = getattr(found, "deepstack_features", None) or ()
        by_picture = zip(found.pooler_output, *later, strict=True)
        return [torch.cat(parts, dim=-1) for parts in by_picture]

    def position_ids(self, batch: Batch) -> Tensor:
        """Positions in time, height and width, (3, B, T); behind a picture they go on from its longer side."""
        shapes = []  # (time, height, width) in patches
        for index in batch.picture_of:
            if index is not None:
                shapes.append((1, *self._grid(batch.pictures[index])))
        grids = torch.tensor(shapes, device=self.device) if shapes else None
        positions: Tensor
        positions, _ = self.model.model.get_rope_index(
            batch.input_ids,
            batch.image_mask.int(),
            grids,
            attention_mask=batch.attention_mask,
        )
        return positions


BACKBONE = QwenVL
