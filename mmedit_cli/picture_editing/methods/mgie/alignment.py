"""What the edit head of MGIE may be drawn towards: the text encodings that its denoiser was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli.picture_editing.methods.shared.loading import load_text_encoder


class TextEncodings:
    """What the text encoder of a pipeline says of instructions, each computed once; the empty one is always last.

    `distance` compares with it what the edit head makes of them (GILL, Koh et al. 2023, section 3.2).
    """

    def __init__(self, diffusion: str, device: str | torch.device) -> None:
        self._tokenizer, encoder = load_text_encoder(diffusion)
        self._encoder = encoder.to(device).requires_grad_(False)
        self._known: dict[str, Tensor] = {}
        self._spread = float(self.of([""])[0].var())

    @torch.no_grad()
    def of(self, texts: Sequence[str]) -> Tensor:
        """Return encodings (B, T, D); what is too long is cut."""
        for text in texts:
            if text not in self._known:
                ids = self._tokenizer(
                    text, padding="max_length", truncation=True, return_tensors="pt"
                )["input_ids"]
                self._known[text] = self._encoder(ids.to(self._encoder.device))[0][0]
        return torch.stack([self._known[text] for text in texts])

    def distance(self, condition: Tensor, head: Any, texts: Sequence[str]) -> Tensor:
        """Return the mean squared distance of conditions (B, T, D), and of the null one, in units of the variance."""
        found = torch.cat([condition, head.null(1)])
        return nn.functional.mse_loss(found, self.of([*texts, ""])) / self._spread
