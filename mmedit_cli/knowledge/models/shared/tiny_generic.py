"""Tiny models with random weights of families that no file of their own is written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmedit_cli.knowledge.models.shared import tiny
from mmedit_cli.knowledge.models.shared.processors import make_processor

_WIDTH = 48
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_PLACES = (
    1024 + 128
)  # tokens of places and outlines that the processor of PaliGemma adds
_DECODER = {
    "hidden_size": _WIDTH,
    "num_hidden_layers": 6,
    "intermediate_size": 2 * _WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name: str, *, seed: int = 0) -> tuple[nn.Module, Any, Any]:
    """Return (model, tokenizer, processor) for one of `NAMES`, with seeded random weights."""
    import transformers

    kind, words, config, images, settings = _BUILD[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        tiny.spread(model)
    model.generation_config.eos_token_id = words.eos_token_id
    processor = make_processor(config, images, words, settings)
    return model, words, processor


_Parts = tuple[str, Any, Any, Any, dict[str, Any]]


def _llama(words: Any) -> dict[str, Any]:
    return {**_DECODER, "model_type": "llama", "vocab_size": len(words)}


def _qwen2(words: Any) -> dict[str, Any]:
    return {**_DECODER, "model_type": "qwen2", "vocab_size": len(words)}


def _siglip() -> dict[str, Any]:
    return {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}


def _idefics3() -> _Parts:
    """Pictures in tiles, with tokens that part them: SmolVLM is built alike."""
    from transformers import Idefics3Config
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    tiles = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    more = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    words = tiny.tokenizer(*more, *tiles)
    config = Idefics3Config(
        vision_config=_TOWER,
        text_config=_llama(words),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return "Idefics3", words, config, images, {"image_seq_len": 4}


def _gemma3() -> _Parts:
    """Windows in some layers, and attention in both directions among image tokens."""
    from transformers import Gemma3Config
    from transformers.models.gemma3.image_processing_pil_gemma3 import (
        Gemma3ImageProcessorPil,
    )

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tiny.tokenizer(*named.values(), names=named)
    text = {
        **_DECODER,
        "model_type": "gemma3_text",
        "vocab_size": len(words),
        "head_dim": 12,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
    config = Gemma3Config(
        vision_config=_siglip(),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return "Gemma3", words, config, images, {"image_seq_length": 4}


def _paligemma() -> _Parts:
    """A question that is read in both directions, and an answer behind a newline."""
    from transformers import PaliGemmaConfig
    from transformers.models.siglip.image_processing_pil_siglip import (
        SiglipImageProcessorPil,
    )

    words = tiny.tokenizer()
    config = PaliGemmaConfig(
        vision_config={**_siglip(), "projection_dim": _WIDTH},
        text_config={
            **_DECODER,
            "model_type": "gemma",
            "vocab_size": len(words) + _PLACES,
            "head_dim": 12,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=_WIDTH,
    )
    images = SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, image_seq_length=16
    )
    return "PaliGemma", words, config, images, {}


def _onevision() -> _Parts:
    """As many tiles as the shape of the picture asks for, and a newline behind each row of patches."""
    from transformers import LlavaOnevisionConfig
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    words = tiny.tokenizer("<video>")
    shapes = [[32, 32], [32, 64], [64, 32]]
    config = LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_qwen2(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=shapes,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=shapes
    )
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return "LlavaOnevision", words, config, images, settings


def _internvl() -> _Parts:
    """Tiles of one size and a small picture of the whole, between two tokens of their own."""
    from transformers import InternVLConfig
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tiny.tokenizer(*named.values(), names=named)
    config = InternVLConfig(
        vision_config={**_TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=_qwen2(words),
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4
    )
    return "InternVL", words, config, images, {"image_seq_length": 4}


def _qwen3_5() -> _Parts:
    """Layers without attention between those with it, and positions on three axes."""
    from transformers import Qwen3_5Config
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    # transformers adds the last to what it takes for a tokenizer of Qwen2
    words = tiny.tokenizer(*named.values(), "<|endoftext|>", bos=False, names=named)
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    text = {
        **_DECODER,
        "vocab_size": len(words),
        "bos_token_id": None,
        "head_dim": 16,
        "layer_types": kinds * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": _WIDTH,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
    }
    ids = words.convert_tokens_to_ids(list(named.values()))
    config = Qwen3_5Config(
        vision_config=vision,
        text_config=text,
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32**2, "longest_edge": 64**2},
        patch_size=8,
        merge_size=2,
    )
    return "Qwen3_5", words, config, images, {}


_BUILD: dict[str, Callable[[], _Parts]] = {
    "tiny-idefics3": _idefics3,
    "tiny-gemma3": _gemma3,
    "tiny-paligemma": _paligemma,
    "tiny-onevision": _onevision,
    "tiny-internvl": _internvl,
    "tiny-qwen3.5": _qwen3_5,
}
NAMES = tuple(_BUILD)
