"""Tiny diffusion pipelines with random weights, built from configs in memory, with a CLIP tokenizer of their own."""

from __future__ import annotations

import json
from typing import Any

import torch

from mmedit_cli.knowledge.models.shared.tiny import spread

WORDS = """
a an the of in on with and photo good picture image drawing shown photograph dog cat toy teapot boot backpack
stuffed animal red blue green yellow snow beach jungle table forest background my sks is
""".split()  # noqa: SIM905
_START, _END, _SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
_TOKENS = 24  # the longest prompt
_LATENT = 8  # height and width of the latents
_CAPTION = 32  # width of the text encodings
_POOLED = 24  # width of the pooled encoding (SDXL)
_TIME = 8  # width of a time id (SDXL)


def tokenizer() -> Any:
    """Return a CLIPTokenizer that spells anything in letters and has one token for each of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    plain = CLIPTokenizer().backend_tokenizer  # for how it cuts texts into words
    bpe = Tokenizer(models.BPE(end_of_word_suffix=_SUFFIX))
    bpe.normalizer = plain.normalizer
    bpe.pre_tokenizer = plain.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + _SUFFIX for letter in letters]
    # Ends are named, so that their ids, and with them ties, are always the same.
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        end_of_word_suffix=_SUFFIX,
        special_tokens=ends,
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)], trainer)
    content = json.loads(bpe.to_str())
    merges: Any = [tuple(pair) for pair in content["model"]["merges"]]
    merged = [a + b for a, b in merges]
    tokens = dict.fromkeys([_START, _END, *letters, *ends, *merged])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=_TOKENS,
    )


def build(name: str, *, seed: int = 0) -> Any:
    """Return a pipeline such as `tiny-sd` with seeded random weights, on the CPU in float32."""
    builders = {"tiny-sdxl": _sdxl, "tiny-sd3": _sd3, "tiny-flux": _flux}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builders.get(name, _sd)()


def _sd() -> Any:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    words = tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text(CLIPTextModel, words, _CAPTION),
        tokenizer=words,
        unet=_unet(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME,
        projection_class_embeddings_input_dim=6 * _TIME + _POOLED,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text(CLIPTextModel, words, _CAPTION - _POOLED),
        text_encoder_2=_text(CLIPTextModelWithProjection, words, _POOLED),
        tokenizer=words,
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=_scheduler(),
        add_watermarker=False,
    )


def _sd3() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    transformer = SD3Transformer2DModel(
        sample_size=_LATENT,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=_CAPTION,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=_LATENT,
    )
    words = tokenizer()
    return StableDiffusion3Pipeline(
        transformer=_far_from_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=0.3, shift_factor=0.1),
        text_encoder=_text(CLIPTextModelWithProjection, words, 8),
        tokenizer=words,
        text_encoder_2=_text(CLIPTextModelWithProjection, words, 16),
        tokenizer_2=tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=letters(),
    )


def _flux() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_CAPTION,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    words = tokenizer()
    pipe = FluxPipeline(
        transformer=_far_from_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(scaling_factor=0.3, shift_factor=0.1),
        text_encoder=_text(CLIPTextModel, words, 16),
        tokenizer=words,
        text_encoder_2=_t5(),
        tokenizer_2=letters(),
    )
    pipe.default_sample_size = _LATENT
    return pipe


def letters() -> Any:
    """Return a tokenizer that spells everything out, with an end and without a start, as that of T5."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    signs = ["<pad>", "</s>", "<unk>", *(chr(i) for i in range(32, 127))]
    plain = Tokenizer(
        models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        model_max_length=2 * _TOKENS,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    made = T5EncoderModel(
        T5Config(
            vocab_size=98,
            d_model=_CAPTION,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
        )
    )
    return made.eval()


def _far_from_zero(transformer: Any) -> Any:
    """Return a transformer whose gates and output, which start at 0, are not: so that prompts and edits show."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return transformer.eval()


def _text(model: Any, words: Any, width: int) -> Any:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=_TOKENS,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    made = model(config)
    spread(made)
    return made.eval()


def _vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * _LATENT,
        **more,
    ).eval()


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=_LATENT,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_CAPTION,
        attention_head_dim=8,
        **more,
    ).eval()


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
