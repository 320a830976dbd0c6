"""LLaVA: a vision tower, a two-layer projector, and a decoder with the picture in the place of the image token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.pictures import Picture, picture_size


class Llava(VisionLanguageModel):
    """LlavaForConditionalGeneration; a sequence is [bos | image tokens | newline prompt answer] (Liu et al. 2024).

    How many tokens a picture takes is asked of the tower (CLIP in LLaVA-1.5, also SigLIP or Pixtral). What ends the
    rows of a Pixtral tower's patches ([IMG_BREAK], [IMG_END]) counts as part of the picture.
    """

    family = "llava"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._image_id: int = self.model.config.image_token_id
        token = None
        if self._image_id < len(self.tokenizer):
            token = self.tokenizer.convert_ids_to_tokens(self._image_id)
        if token is None or token not in self.tokenizer.get_added_vocab():
            raise ModelError(
                f"{self.name}: the tokenizer has no image token with id {self._image_id}"
            )
        self.image_token = token
        image = Image.new("RGB", (64, 64))
        inputs = self.image_processor(images=[image], return_tensors="pt")
        # a Pixtral tower: as many tokens as the picture has patches
        self._any_size = "image_sizes" in inputs
        self._row_ends = self._find_row_ends() if self._any_size else None
        self._measure_once = lru_cache(maxsize=1 << 16)(self._measure)

    def _find_row_ends(self) -> list[int] | None:
        """Return the ids of the tokens behind each row of patches and behind the last one, None without them."""
        names = ("[IMG_BREAK]", "[IMG_END]")
        added = self.tokenizer.get_added_vocab()
        if not all(name in added for name in names):
            return None
        return [added[name] for name in names]

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
        """The number of patches the tower has for it, and of the tokens that end their rows, if there are any."""
        if not self._any_size:
            return self._n_patches
        rows, columns = self._measure_once(*picture_size(picture))
        return rows * columns + (rows if self._row_ends else 0)

    @cached_property
    def _n_patches(self) -> int:
        """The tokens of every picture, counted once: towers differ in what they add to the patches or leave out."""
        with torch.no_grad():
            (tokens,) = self.encode_images([Image.new("RGB", (64, 64))])
        return len(tokens)

    def _measure(self, width: int, height: int) -> tuple[int, int]:
        """Return (rows, columns) of patches of a picture of some size."""
        image = Image.new("RGB", (width, height))
        inputs = self.image_processor(
            images=[image],
            return_tensors="pt",
        )
        patch: int = self.model.config.vision_config.patch_size
        height, width = inputs["image_sizes"][0]
        rows = int(height) // patch
        columns = int(width) // patch
        return rows, columns

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        if not n_image:
            return self.token_ids(text), 0
        placed = text if self.image_token in text else f"{self.image_token}\n{text}"
        ids = self.token_ids(placed)
        start = ids.index(self._image_id)
        before = ids[:start]
        behind = ids[start + 1 :]
        image_ids = [self._image_id] * n_image
        return [*before, *image_ids, *behind], start

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        options = {"image_sizes": inputs["image_sizes"]} if self._any_size else {}
        output = self.model.get_image_features(
            inputs["pixel_values"], **options, return_dict=True
        )
        features: Sequence[Tensor] = output.pooler_output
        if self._row_ends is None:
            return features
        patch: int = self.model.config.vision_config.patch_size
        found = []
        for tokens, (height, _) in zip(features, inputs["image_sizes"], strict=True):
            found.append(self._with_row_ends(tokens, int(height) // patch))
        return found

    def _with_row_ends(self, tokens: Tensor, rows: int) -> Tensor:
        """Return the tokens of a picture (h * w, D) with those that end its rows: (h * (w + 1), D)."""
        ids = torch.tensor(self._row_ends, device=self.device)
        within, last = self.word_embeddings(ids).to(tokens)
        ends = [within] * (rows - 1)
        ends.append(last)
        column = torch.stack(ends)
        _, width = tokens.shape
        grid = tokens.view(rows, -1, width)
        with_ends = torch.cat([grid, column[:, None]], dim=1)
        return with_ends.flatten(0, 1)


BACKBONE = Llava
