"""Folders of models with random weights in the shape of published ones: they say nonsense at the published cost.

Weights are written tensor by tensor, so building needs no more memory than the largest of them. Tokenizers are those
of the tiny models, with spare tokens up to the published size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SHARD = 2 << 30  # bytes in a file of weights
_FORMAT = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True)
class Shape:
    """A published model whose shape is built: `kind` is vlm, sd or ip2p."""

    name: str
    kind: str
    build: Callable[[Path], None]
    largest_gib: float  # anonymous memory that no step may pass


def write_weights(
    model: nn.Module, folder: Path, stem: str, *, shard: int = _SHARD
) -> int:
    """Write random weights for a model on the meta device, in bfloat16; return their bytes.

    A file holds `shard` bytes at most, or one tensor. Matrices are scaled by their fan-in, norms are 1 and biases 0. A
    tensor that is tied to another is left out.
    """
    tensors = list(_own_tensors(model))
    shards = list(_shards(tensors, shard))
    places = {}
    total = 0
    generator = torch.Generator().manual_seed(0)
    for number, part in enumerate(shards, 1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / name, part, generator)
        places.update(dict.fromkeys((key for key, _, _ in part), name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=1)
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return total


_Named = tuple[str, Tensor, bool]  # name, tensor on the meta device, is it of a norm


def _own_tensors(model: nn.Module) -> Iterator[_Named]:
    norms = {
        name
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
    }
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield name, tensor, name.rpartition(".")[0] in norms


def _shards(tensors: list[_Named], most: int) -> Iterator[list[_Named]]:
    shard: list[_Named] = []
    size = 0
    for entry in tensors:
        _, tensor, _ = entry
        if shard and size + _bytes(tensor) > most:
            yield shard
            shard = []
            size = 0
        shard.append(entry)
        size += _bytes(tensor)
    yield shard


def _number(tensor: Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.is_floating_point() else tensor.dtype


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * _number(tensor).itemsize


def _write_shard(path: Path, shard: list[_Named], generator: torch.Generator) -> int:
    """Write one file as the format of safetensors has it: the length of a header, the header, all bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor, _ in shard:
        start = end
        end += _bytes(tensor)
        header[name] = {
            "dtype": _FORMAT[_number(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for _, tensor, of_norm in shard:
            value = _random(tensor, of_norm, generator)
            file.write(value.reshape(-1).view(torch.uint8).numpy())
    return end


def _random(tensor: Tensor, of_norm: bool, generator: torch.Generator) -> Tensor:
    number = _number(tensor)
    if not tensor.is_floating_point():
        rows = torch.arange(tensor.shape[-1], dtype=number)
        return rows.expand(tensor.shape).contiguous()
    if tensor.dim() < 2:
        fill = 1.0 if of_norm and tensor.dim() == 1 else 0.0
        return torch.full(tensor.shape, fill, dtype=number)
    value = torch.empty(tensor.shape, dtype=number)
    fan_in = tensor[0].numel()
    return value.normal_(std=fan_in**-0.5, generator=generator)


# -- vision-language models --------------------------------------------------------------------------------------


def _padded(words: Any, size: int) -> Any:
    """Return a tokenizer with spare tokens up to a size: in its vocabulary, but no text is cut into them."""
    from tokenizers import Tokenizer

    content = json.loads(words.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for token in range(len(words), size):
        vocabulary[f"<spare {token}>"] = token
    kind = type(words)
    return kind(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token=words.bos_token,
        eos_token=words.eos_token,
        pad_token=words.pad_token,
        extra_special_tokens={"image_token": "<image>"},
    )


def _write(folder: Path, kind: str, config: Any, words: Any, images: Any) -> None:
    import transformers

    config.architectures = [kind]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    folder.mkdir(parents=True, exist_ok=True)
    words.save_pretrained(folder)
    images.save_pretrained(folder)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.save_pretrained(folder)
    write_weights(model, folder, "model")
    config.save_pretrained(folder)


def _blip2(folder: Path) -> None:
    from transformers import Blip2Config
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    from mmedit_cli.knowledge.models.shared import tiny

    words = _padded(tiny.tokenizer(), 50304)
    text = {
        "model_type": "opt",
        "vocab_size": 50304,
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # tower (EVA-CLIP g/14) and Q-Former are the defaults of transformers
    config = Blip2Config(
        text_config=text,
        num_query_tokens=32,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    images = BlipImageProcessorPil(size={"height": 224, "width": 224})
    _write(folder, "Blip2ForConditionalGeneration", config, words, images)


def _llava(folder: Path) -> None:
    from transformers import LlavaConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from mmedit_cli.knowledge.models.shared import tiny

    words = _padded(tiny.tokenizer(), 32064)
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    _write(folder, "LlavaForConditionalGeneration", config, words, images)


def _qwen(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    from mmedit_cli.knowledge.models.shared import tiny

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = _padded(tiny.tokenizer(*names, "<|endoftext|>", bos=False), 151936)
    start, end, image, video = words.convert_tokens_to_ids(list(names))
    text = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    }
    tower = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 14 * 14 * 4 * 1280},
        patch_size=14,
        merge_size=2,
    )
    _write(folder, "Qwen2_5_VLForConditionalGeneration", config, words, images)


# -- text to image -----------------------------------------------------------------------------------------------


def _clip_words() -> Any:
    from transformers import CLIPTokenizer

    from mmedit_cli.drawing.models import tiny

    words = tiny.tokenizer()
    content = json.loads(words.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for token in range(len(vocabulary), 49408):
        vocabulary[f"<spare {token}>"] = token
    merges: Any = [tuple(pair) for pair in content["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _pipeline(folder: Path, kind: str, channels: int, scheduler: Any) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = _clip_words()
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        projection_dim=768,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    text.architectures = ["CLIPTextModel"]
    with torch.device("meta"):
        encoder = CLIPTextModel(text)
        unet = UNet2DConditionModel(
            sample_size=64, in_channels=channels, cross_attention_dim=768
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
    parts = {"text_encoder": encoder, "unet": unet, "vae": vae}
    index: dict[str, Any] = {"_class_name": kind, "requires_safety_checker": False}
    for name, part in parts.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        library = "transformers" if part is encoder else "diffusers"
        index[name] = [library, type(part).__name__]
        stem = "model" if part is encoder else "diffusion_pytorch_model"
        write_weights(part, place, stem)
        if part is encoder:
            text.save_pretrained(place)
        else:
            part.save_config(place)
    words.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["safety_checker"] = [None, None]
    index["feature_extractor"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def _sd(folder: Path) -> None:
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    _pipeline(folder, "StableDiffusionPipeline", 4, scheduler)


def _ip2p(folder: Path) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    scheduler = EulerAncestralDiscreteScheduler(**_BETAS)
    _pipeline(folder, "StableDiffusionInstructPix2PixPipeline", 8, scheduler)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("blip2-opt-2.7b", "vlm", _blip2, 16),
        Shape("llava-1.5-7b", "vlm", _llava, 22),
        Shape("qwen2.5-vl-3b", "vlm", _qwen, 16),
        Shape("stable-diffusion-v1-5", "sd", _sd, 16),
        Shape("instruct-pix2pix", "ip2p", _ip2p, 16),
    )
}
