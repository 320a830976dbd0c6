"""MiniGPT-4 as a model of transformers: importing this file lets the Auto classes load its folders."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
)


class MiniGPT4Config(Blip2Config):
    """The sizes of a MiniGPT-4: those of a BLIP-2 whose `text_config` is a Llama."""

    model_type = "minigpt4"


class MiniGPT4ForConditionalGeneration(Blip2ForConditionalGeneration):
    """Blip2VisionModel, Blip2QFormerModel, nn.Linear and LlamaForCausalLM, put together by the class of BLIP-2.

    MiniGPT-4 has no class in transformers; it differs from BLIP-2 in its decoder, which BLIP-2's class takes from the
    config, and in the epsilon of the norm behind the vision tower (1e-5 in the published code, 1e-6 in its blocks).
    """

    config_class = MiniGPT4Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_model.post_layernorm.eps = 1e-5


AutoConfig.register(MiniGPT4Config.model_type, MiniGPT4Config, exist_ok=True)
AutoModelForImageTextToText.register(
    MiniGPT4Config, MiniGPT4ForConditionalGeneration, exist_ok=True
)
# this file is saved beside the weights, for users without mmedit
MiniGPT4Config.register_for_auto_class()  # type: ignore[no-untyped-call]
MiniGPT4ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")  # type: ignore[no-untyped-call]
