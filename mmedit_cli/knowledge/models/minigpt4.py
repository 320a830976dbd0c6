"""MiniGPT-4: the vision tower and Q-Former of BLIP-2, one linear layer, and a Vicuna (Llama) decoder."""

from __future__ import annotations

# imported so that transformers learns to load it
from mmedit_cli.knowledge.models.shared import minigpt4_model as minigpt4_model
from mmedit_cli.knowledge.models.shared.qformer import QFormerModel


class MiniGPT4(QFormerModel):
    """MiniGPT4ForConditionalGeneration; a sequence is [bos | query tokens | newline prompt answer].

    That is the prompt "<ImageHere>\\n..." of LiveEdit's evaluation, without the "###Human" frame of Zhu et al. 2023.
    """

    family = "minigpt4"
    image_token = "<ImageHere>"

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The newline behind the picture."""
        return [], self.tokenizer("\n", add_special_tokens=False)["input_ids"]

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        if not n_image:
            return self.token_ids(text), 0
        before = self.tokenizer("")["input_ids"]
        behind = self.token_ids(f"\n{text}", add_special_tokens=False)
        # any id will do at the image positions: their embeddings are overwritten
        image_ids = [self.pad_id] * n_image
        return [*before, *image_ids, *behind], len(before)


BACKBONE = MiniGPT4
