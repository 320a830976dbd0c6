"""An alignment loss for the edit head of MGIE: its output is compared with the text encodings of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli.picture_editing.methods.shared.loading import load_text_encoder


class TextEncodings:
    """The encodings of instructions by the text encoder of a pipeline, each computed once.

    `distance` compares the output of the edit head with them (GILL, Koh et al. 2023, section 3.2).
    """

    def __init__(self, diffusion: str, device: str | torch.device) -> None:
        self._tokenizer, encoder = load_text_encoder(diffusion)
        encoder.to(device)
        encoder.requires_grad_(False)
        self._encoder = encoder
        self._cache: dict[str, Tensor] = {}
        empty = self.of([""])[0]
        self._variance = float(empty.var())

    @torch.no_grad()
    def of(self, texts: Sequence[str]) -> Tensor:
        """Return encodings (B, T, D); a text that is too long is cut."""
        for text in texts:
            if text not in self._cache:
                self._cache[text] = self._encode(text)
        return torch.stack([self._cache[text] for text in texts])

    def _encode(self, text: str) -> Tensor:
        inputs = self._tokenizer(
            text,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"].to(self._encoder.device)
        hidden: Tensor = self._encoder(ids)[0]
        return hidden[0]

    def distance(self, condition: Tensor, head: Any, texts: Sequence[str]) -> Tensor:
        """Return the mean squared distance of conditions (B, T, D), and of the null one, in units of the variance."""
        null = head.null(1)
        predicted = torch.cat([condition, null])
        target = self.of([*texts, ""])
        error = nn.functional.mse_loss(predicted, target)
        return error / self._variance
