"""What mini-sd is made of: its recipe, its tokenizer, its parts, and its folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mini_training import BaseRecipe, Schedule, replacing_folder
from torch import nn

SIDE = 64  # pixels
LONGEST = 24  # tokens of a caption
START, END = (
    "<|startoftext|>",
    "<|endoftext|>",
)  # ids 0 and 1; the end pads too, as in CLIP
QUIET = -4.0  # logarithm of the variance of latents at the start
SUFFIX = "</w>"  # ends a token that ends a word


@dataclass(frozen=True)
class Stage(Schedule):
    """A schedule, and the share of pictures with two things beside each other."""

    pairs: float = 0.0


@dataclass(frozen=True)
class Recipe(BaseRecipe):
    """Everything a training run depends on but data and machine; `vae`, `text`, `unet` are parts of configs."""

    STAGES = ("vae", "diffusion", "scenes")
    STAGE = Stage

    vae: dict[str, Any]
    text: dict[str, int]
    unet: dict[str, Any]


def build_tokenizer(texts: Iterable[str]) -> Any:
    """Return a CLIPTokenizer that spells anything, and has one token for each word of `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    plain = CLIPTokenizer().backend_tokenizer  # cuts texts into words
    bpe = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    bpe.normalizer, bpe.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + SUFFIX for letter in letters]
    trainer = trainers.BpeTrainer(  # ends are named, so that their ids, and with them ties, are always the same
        vocab_size=100_000,
        end_of_word_suffix=SUFFIX,
        special_tokens=ends,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [START, END, *letters, *ends, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LONGEST)


def build(recipe: Recipe, tokenizer: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the untrained VAE, text encoder and UNet, seeded, in float32 on the CPU."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    levels = len(recipe.vae["block_out_channels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vae = AutoencoderKL(
            sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            **recipe.vae,
        )
        # latents start almost without noise: from a variance of one it takes long until anything comes through
        nn.init.constant_(vae.quant_conv.bias[recipe.vae["latent_channels"] :], QUIET)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=LONGEST,
                **recipe.text,
                **ends,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=SIDE >> (levels - 1),
            in_channels=recipe.vae["latent_channels"],
            out_channels=recipe.vae["latent_channels"],
            cross_attention_dim=recipe.text["hidden_size"],
            **recipe.unet,
        )
    return vae, text_encoder, unet


def scheduler() -> Any:
    """Return how noise is added and taken away: the betas of Stable Diffusion, ending in noise alone.

    With a last step of pure noise (Lin et al. 2024) and predicted velocities (Salimans and Ho 2022), the colour of a
    flat background comes from the caption, not from what noise lets through.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def pipeline(
    vae: nn.Module, text_encoder: nn.Module, tokenizer: Any, unet: nn.Module
) -> Any:
    """Return the parts as a StableDiffusionPipeline."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler(),
        None,
        None,
        requires_safety_checker=False,
    )


def export(pipe: Any, folder: Path, records: dict[str, Any]) -> None:
    """Write a pipeline in float16, and further JSON files by name; the folder is replaced as a whole."""
    from tokenizers import Tokenizer

    with replacing_folder(folder, records) as fresh:
        halves = {
            name: copy.deepcopy(getattr(pipe, name)).half()
            for name in ("vae", "text_encoder", "unet")
        }
        type(pipe)(
            **{**pipe.components, **halves}, requires_safety_checker=False
        ).save_pretrained(fresh)
        for file in fresh.glob("*/tokenizer.json"):  # without indents, half the size
            Tokenizer.from_file(str(file)).save(str(file), pretty=False)
        for config in fresh.glob(
            "*/config.json"
        ):  # diffusers writes where a part was loaded from
            values = json.loads(config.read_text(encoding="utf-8"))
            if values.pop("_name_or_path", None) is not None:
                config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        # transformers loads in the format that the config names, diffusers in float32: they must be the same
        config = fresh / "text_encoder" / "config.json"
        values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
