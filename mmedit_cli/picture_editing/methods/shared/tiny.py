"""Tiny pipelines with random weights, built from a config in memory: every command runs on them with no download."""

from __future__ import annotations

from typing import Any

import torch

VERSION = 1  # raise it when a tiny pipeline changes: old results are then not taken for new ones
NAMES = ("tiny-ip2p", "tiny-flux-kontext")
SIDE, WIDTH, LONGEST = 32, 32, 77  # pixels, width of the condition, tokens


def build(name: str, *, seed: int = 0) -> Any:
    """Return the pipeline `name` with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _flux_kontext() if name == "tiny-flux-kontext" else _ip2p()


def _ip2p() -> Any:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return StableDiffusionInstructPix2PixPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flux_kontext() -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    encoder = AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.3,
    )
    words = T5EncoderModel(
        T5Config(
            vocab_size=514,
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=1,
        )
    )
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=encoder.eval(),
        text_encoder=text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=words.eval(),
        tokenizer_2=clip_tokenizer(),
        transformer=transformer.eval(),
    )


def unet(channels: int = 8) -> Any:
    """Return a denoiser of two levels; its output is scaled up, so that it is far from 0."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        attention_head_dim=2,
    ).eval()


def vae() -> Any:
    """Return an autoencoder with two pixels to a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def scheduler() -> Any:
    """Return InstructPix2Pix's sampler, Euler with ancestral noise."""
    from diffusers import EulerAncestralDiscreteScheduler

    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


def text_encoder() -> Any:
    """Return a CLIP text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


def clip_tokenizer() -> Any:
    """Return a CLIP tokenizer that spells everything out."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{letter}</w>" for letter in letters),
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        model_max_length=LONGEST,
    )
