"""Language models without pictures: decoders of AutoModelForCausalLM that are built like Llama, Qwen, OPT or GPT-2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.models.base import WRITTEN, VisionLanguageModel
from mmedit_cli.pictures import Picture
from mmedit_cli.types import Query

# what is compared: resumed from the middle, a model must say what its own forward pass says
_TRIED = "The capital of France is Paris, and its largest river is the Seine."
_FURTHEST = {torch.float32: 1e-3}  # of its logits; other formats round more
_ROUNDED = 0.5


class CausalLM(VisionLanguageModel):
    """A text-only decoder; a sequence is [prompt answer], with the token in front that its tokenizer puts there.

    Everything else is as in the other families, but a question with a picture is a DataError. A model whose structure
    is another one is a ModelError: no decoder layers are found, its layers do not all see the same, or its logits are
    not those of its last layer, norm and head.
    """

    family = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    sees = False
    image_token = WRITTEN  # nothing that is written stands for a picture

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config
        types = getattr(config, "layer_types", None)
        kinds = sorted(set(types or ()))
        if len(kinds) > 1 or "sliding_attention" in kinds:
            listed = ", ".join(kinds)
            raise ModelError(
                f"{self.name}: its layers attend in different ways ({listed})",
                "supported are models whose layers all see the whole text",
            )
        self._try_out()

    @property
    def generator(self) -> Any:
        """The model itself."""
        return self.model

    def n_image_tokens(self, picture: Picture) -> int:
        """Raise DataError: the model reads text alone."""
        raise DataError(
            f"{picture.path}: {self.name} is a language model and sees no pictures",
            "leave the picture out, or name a vision-language model",
        )

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        return self.token_ids(text), 0

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        raise DataError(f"{self.name} is a language model and sees no pictures")

    def _message(self, prompt: str, *, with_image: bool) -> Any:
        """The text itself: templates of language models know no parts."""
        return prompt

    @torch.no_grad()
    def _try_out(self) -> None:
        """Raise ModelError unless the parts that were found are the whole model."""
        batch = self.batch([Query(_TRIED)], with_answer=False)
        middle = self.prefix(batch, self.n_layers // 2)
        parts = self.resume(middle).float()
        whole = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits.float()
        away = float((parts - whole).abs().max())
        if away > _FURTHEST.get(self.dtype, _ROUNDED):
            raise ModelError(
                f"{self.name}: {type(self.model).__name__} does more than its layers, norm and head "
                f"(logits are {away:.3g} away)",
                "supported are models built like Llama, Qwen, OPT and GPT-2",
            )


BACKBONE = CausalLM
