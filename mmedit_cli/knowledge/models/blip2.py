"""BLIP-2: a vision tower, a Q-Former whose query tokens come first in the sequence, and an OPT decoder."""

from __future__ import annotations

from mmedit_cli.knowledge.models.shared.qformer import QFormerModel


class Blip2(QFormerModel):
    """Blip2ForConditionalGeneration; the sequence is [query tokens | bos prompt answer] (Li et al. 2023, 3.3)."""

    family = "blip2"

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        # any id will do at the image positions: their embeddings are overwritten
        return [self.pad_id] * n_image + self.token_ids(text), 0


BACKBONE = Blip2
