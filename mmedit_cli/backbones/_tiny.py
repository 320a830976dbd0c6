"""Tiny models with random weights, built from a config in memory: every command runs on them with no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_WORDS = """
what is this in the picture shown here which colour does it have name of object where how many can you see
a red blue green yellow circle square triangle star house cat dog boat tree apple moon sun question answer
the capital of peru lima paris france kenya nairobi japan tokyo is called one two three four five
""".split()  # noqa: SIM905
_LAYERS, _WIDTH, _HEADS, _SIDE, _PATCH = 6, 48, 4, 32, 8


def tokenizer() -> Any:
    """Return a byte-level BPE tokenizer that can spell anything: `<s>` in front, `</s>` as the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=448, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(_WORDS[i:] + _WORDS[:i]) for i in range(len(_WORDS))], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def build(family: str, *, seed: int = 0) -> tuple[nn.Module, Any, Any]:
    """Return (model, tokenizer, image processor) of a family with seeded random weights."""
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = (_blip2 if family == "blip2" else _llava)(words)
        _spread(model)
    model.generation_config.eos_token_id = words.eos_token_id
    return model, words, processor


def _blip2(words: Any) -> tuple[nn.Module, Any]:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=_SIDE,
            patch_size=_PATCH, initializer_range=0.02,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            encoder_hidden_size=32, max_position_embeddings=8,
        ).to_dict(),
        text_config=OPTConfig(
            vocab_size=len(words), hidden_size=_WIDTH, num_hidden_layers=_LAYERS, ffn_dim=2 * _WIDTH,
            num_attention_heads=_HEADS, word_embed_proj_dim=_WIDTH, max_position_embeddings=128, dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ).to_dict(),
        num_query_tokens=8,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return Blip2ForConditionalGeneration(config), BlipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})


def _llava(words: Any) -> tuple[nn.Module, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=_SIDE,
            patch_size=_PATCH, projection_dim=32,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=len(words), hidden_size=_WIDTH, num_hidden_layers=_LAYERS, intermediate_size=2 * _WIDTH,
            num_attention_heads=_HEADS, num_key_value_heads=_HEADS, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ).to_dict(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )  # fmt: skip
    processor = CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE})
    return LlavaForConditionalGeneration(config), processor


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Scale every matrix by its fan-in, so that different inputs really give different outputs."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
