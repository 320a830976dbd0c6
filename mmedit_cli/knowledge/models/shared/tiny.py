"""Tiny models with random weights, built from a config in memory: every command runs on them with no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

_WORDS = """
what is this in the picture shown here which colour does it have name of object where how many can you see
a red blue green yellow circle square triangle star house cat dog boat tree apple moon sun question answer
the capital of peru lima paris france kenya nairobi japan tokyo is called one two three four five
""".split()  # noqa: SIM905
_LAYERS = 6
_WIDTH = 48
_HEADS = 4
_SIDE = 32
_PATCH = 8


def tokenizer(
    *more: str, bos: bool = True, names: Mapping[str, str] | None = None
) -> Any:
    """Return a byte-level BPE tokenizer that can spell anything: `<s>` in front, `</s>` as the end, `more` tokens.

    `names` are attributes by which a processor asks for some of them.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>", *more]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # every word begins one of the texts
    texts = [" ".join(_WORDS[i:] + _WORDS[:i]) for i in range(len(_WORDS))]
    bpe.train_from_iterator(texts, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", **(names or {})},
    )


def build(name: str, *, seed: int = 0) -> tuple[nn.Module, Any, Any]:
    """Return (model, tokenizer, image processor) for `tiny-...`, with seeded random weights.

    A language model has None for an image processor.
    """
    words = tokenizer()
    if "qwen" in name:
        more = (_QWEN_END,) if name.endswith("-lm") else _QWEN
        words = tokenizer(*more, bos=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = _BUILD[name](words)
        spread(model)
    model.generation_config.eos_token_id = words.eos_token_id
    return model, words, processor


def _blip2(words: Any) -> tuple[nn.Module, Any]:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = _opt(words)
    return _with_qformer(Blip2ForConditionalGeneration, Blip2Config, text, words)


def _blip2_t5(words: Any) -> tuple[nn.Module, Any]:
    from tokenizers import processors
    from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

    # as T5's own: nothing in front, the end token behind
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.eos_token_id)]
    )
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "d_model": _WIDTH,
        "d_kv": _WIDTH // _HEADS,
        "d_ff": 2 * _WIDTH,
        "num_layers": 4,
        "num_heads": _HEADS,
        "n_positions": 128,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": words.eos_token_id,
        "decoder_start_token_id": 0,
    }
    text: Any = T5Config(**sizes)
    model, images = _with_qformer(
        Blip2ForConditionalGeneration, Blip2Config, text, words
    )
    writer: Any = model
    for part in (writer, writer.language_model):
        part.generation_config.decoder_start_token_id = text.decoder_start_token_id
    return model, images


def _opt(words: Any) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        ffn_dim=2 * _WIDTH,
        num_attention_heads=_HEADS,
        word_embed_proj_dim=_WIDTH,
        max_position_embeddings=128,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _minigpt4(words: Any) -> tuple[nn.Module, Any]:
    from mmedit_cli.knowledge.models.shared.minigpt4_model import (
        MiniGPT4Config,
        MiniGPT4ForConditionalGeneration,
    )

    return _with_qformer(
        MiniGPT4ForConditionalGeneration, MiniGPT4Config, _llama(words), words
    )


def _with_qformer(
    model: Any, config: Any, text: Any, words: Any
) -> tuple[nn.Module, Any]:
    from transformers import Blip2QFormerConfig, Blip2VisionConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    vision = Blip2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=_SIDE,
        patch_size=_PATCH,
        initializer_range=0.02,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=32,
        max_position_embeddings=8,
    )
    sizes = config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=8,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return model(sizes), BlipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})


def _llama(words: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        intermediate_size=2 * _WIDTH,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _llama_lm(words: Any) -> tuple[nn.Module, None]:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(_llama(words)), None


def _qwen2_lm(words: Any) -> tuple[nn.Module, None]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        intermediate_size=2 * _WIDTH,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS // 2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config), None


def _opt_lm(words: Any) -> tuple[nn.Module, None]:
    from transformers import OPTForCausalLM

    return OPTForCausalLM(_opt(words)), None


def _gpt2_lm(words: Any) -> tuple[nn.Module, None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(words),
        n_embd=_WIDTH,
        n_layer=_LAYERS,
        n_head=_HEADS,
        n_inner=2 * _WIDTH,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config), None


def _llava(words: Any) -> tuple[nn.Module, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=_SIDE,
        patch_size=_PATCH,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=_llama(words).to_dict(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE}
    )
    return LlavaForConditionalGeneration(config), processor


def _qwen_vl(words: Any, name: str) -> tuple[nn.Module, Any]:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    start, end, image, video = words.convert_tokens_to_ids(_QWEN)
    text = {
        "vocab_size": len(words),
        "hidden_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "intermediate_size": 2 * _WIDTH,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "head_dim": _WIDTH // _HEADS,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 2, 2],
        },
    }
    vision = {
        "depth": 2,
        "num_heads": 4,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **_QWEN_VISION[name],
    }
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": _SIDE**2, "longest_edge": 4 * _SIDE**2},
        patch_size=_PATCH,
        merge_size=2,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


# of the vision tower, what one generation has and the others have not
_QWEN_VISION: dict[str, dict[str, Any]] = {
    "Qwen2VL": {
        "embed_dim": 32,
        "hidden_size": _WIDTH,
        "mlp_ratio": 2,
    },
    "Qwen2_5_VL": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": _WIDTH,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    },
    "Qwen3VL": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": _WIDTH,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_END = (
    "<|endoftext|>"  # transformers adds it to what it takes for a tokenizer of Qwen2
)
_BUILD: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "tiny-blip2": _blip2,
    "tiny-blip2-t5": _blip2_t5,
    "tiny-gpt2-lm": _gpt2_lm,
    "tiny-llama-lm": _llama_lm,
    "tiny-llava": _llava,
    "tiny-minigpt4": _minigpt4,
    "tiny-opt-lm": _opt_lm,
    "tiny-qwen2-lm": _qwen2_lm,
    "tiny-qwen2-vl": partial(_qwen_vl, name="Qwen2VL"),
    "tiny-qwen2.5-vl": partial(_qwen_vl, name="Qwen2_5_VL"),
    "tiny-qwen3-vl": partial(_qwen_vl, name="Qwen3VL"),
}


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Scale every matrix by its fan-in, so that different inputs really give different outputs."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
