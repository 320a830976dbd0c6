"""From the published files of MiniGPT-4 to a folder as save_pretrained writes it.

There are four: the vision tower and the Q-Former (LAVIS), the linear layer (MiniGPT-4), and Vicuna in the layout of
transformers. The first three are pickles: nothing but tensors and plain containers is read from them.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import ModelError
from mmedit_cli.model_folder import loading, read_config
from mmedit_cli.storage import staged_folder

_VISION_LAYERS = 39  # the published code leaves the last block of EVA ViT-g out
_VISION_HEAD, _QFORMER_HEAD = 88, 64  # channels of an attention head
_VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)
_QFORMER_NAMES = (
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"Qformer\.bert\.", "qformer."),
    (r"attention\.self\.", "attention.attention."),
    (r"ln_vision\.", "vision_model.post_layernorm."),
)


@dataclass(frozen=True)
class PublishedMiniGPT4:
    """Where the four parts lie.

    vision: eva_vit_g.pth; qformer: blip2_pretrained_flant5xxl.pth; projection: prerained_minigpt4_7b.pth; llm: the
    folder of Vicuna, with its tokenizer.
    """

    vision: Path
    qformer: Path
    projection: Path
    llm: Path


def convert(
    parts: PublishedMiniGPT4, out: Path, note: Callable[[str], None] = lambda text: None
) -> Path:
    """Write the model to the folder `out` and return it; every tensor keeps its number format.

    Raises ModelError if `out` exists, or if a part cannot be read, lacks a tensor, or does not fit the others; then
    nothing is left behind.
    """
    if out.exists():
        raise ModelError(f"{out}: exists already", "name a folder that does not")
    note(f"reading {parts.vision}, {parts.qformer}, {parts.projection}")
    vision = _read(parts.vision)
    qformer = _read(parts.qformer)
    projection = _read(parts.projection)
    tensors = _vision_tensors(vision, parts.vision) | _renamed(qformer, _QFORMER_NAMES)
    for end in ("weight", "bias"):
        tensors[f"language_projection.{end}"] = _need(
            projection, f"llama_proj.{end}", parts.projection
        )
    note(f"reading {parts.llm}")
    llm, tokenizer = _language_model(parts.llm)
    tensors |= {
        f"language_model.{name}": tensor for name, tensor in llm.state_dict().items()
    }
    model = _assemble(
        _vision_config(vision, parts.vision),
        _qformer_config(qformer, parts.qformer),
        llm.config,
        tensors,
    )
    note(f"writing {out}")
    with staged_folder(out) as fresh:
        _write(model, tokenizer, fresh, llm.dtype)
    return out


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a published .pth by name, without executing anything in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: no such file",
            "see `mmedit convert minigpt4 --help` for where to get it",
        ) from error
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
    ) as error:
        reason = str(error).strip().partition("\n")[0][:120]
        raise ModelError(
            f"{path}: not a file of tensors ({reason})", "get the published file again"
        ) from error
    content = content.get("model", content) if isinstance(content, dict) else content
    tensors = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in tensors if isinstance(value, Tensor)}


def _need(tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in tensors:
        raise ModelError(
            f"{path}: no tensor {name}", "is it the published file for this part?"
        )
    return tensors[name]


def _renamed(
    tensors: Mapping[str, Tensor], names: Iterable[tuple[str, str]]
) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for old, new in names:
            name = re.sub(old, new, name)
        found[name] = tensor
    return found


def _vision_tensors(raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tower's tensors under their new names; the keys have no bias in the published layout."""
    tensors = {}
    for name, tensor in raw.items():
        if not re.search(r"\.[qv]_bias$", name):
            tensors[name] = tensor
    for i in range(_count(raw, r"blocks\.(\d+)\.")):
        attention = f"blocks.{i}.attn"
        query = _need(raw, f"{attention}.q_bias", path)
        value = _need(raw, f"{attention}.v_bias", path)
        key = torch.zeros_like(value)
        tensors[f"{attention}.qkv.bias"] = torch.cat((query, key, value))
    return {
        f"vision_model.{name}": tensor
        for name, tensor in _renamed(tensors, _VISION_NAMES).items()
    }


def _count(tensors: Iterable[str], numbered: str) -> int:
    """Return how many blocks there are, from the largest number in the names."""
    count = 0
    for name in tensors:
        found = re.match(numbered, name)
        if found is not None:
            count = max(count, int(found[1]) + 1)
    return count


def _vision_config(raw: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    width, _, patch, _ = _need(raw, "patch_embed.proj.weight", path).shape
    side = math.isqrt(_need(raw, "pos_embed", path).shape[1] - 1)
    return {
        "hidden_size": width,
        "intermediate_size": _need(raw, "blocks.0.mlp.fc1.weight", path).shape[0],
        "num_hidden_layers": min(_VISION_LAYERS, _count(raw, r"blocks\.(\d+)\.")),
        "num_attention_heads": width // _VISION_HEAD,
        "image_size": side * patch,
        "patch_size": patch,
    }


def _qformer_config(raw: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    _, _, width = _need(raw, "query_tokens", path).shape
    first = "Qformer.bert.encoder.layer.0."
    return {
        "hidden_size": width,
        "intermediate_size": _need(
            raw, first + "intermediate_query.dense.weight", path
        ).shape[0],
        "num_hidden_layers": _count(raw, r"Qformer\.bert\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": width // _QFORMER_HEAD,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": _need(
            raw, first + "crossattention.self.key.weight", path
        ).shape[1],
    }


def _language_model(folder: Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a Llama folder; pickled weights are read as tensors only, as transformers does."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    kind = read_config(folder).get("model_type")
    if kind != "llama":
        raise ModelError(
            f"{folder}: model_type {kind!r}, MiniGPT-4 needs a llama",
            "give the folder of Vicuna",
        )
    with loading(folder):
        # with `output_loading_info` it returns a pair, which its annotation does not say
        loaded: Any = LlamaForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{folder}: tensors are missing, {min(info['missing_keys'])} first",
            "copy it again",
        )
    return model, tokenizer


def _assemble(
    vision: dict[str, Any],
    qformer: dict[str, Any],
    text: Any,
    tensors: dict[str, Tensor],
) -> Any:
    """Return the model with these tensors in it; raise ModelError for those that are absent or of another shape."""
    from mmedit_cli.knowledge.models.shared.minigpt4_model import (
        MiniGPT4Config,
        MiniGPT4ForConditionalGeneration,
    )

    config = MiniGPT4Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text.to_dict(),
        num_query_tokens=tensors["query_tokens"].shape[1],
    )
    with torch.device("meta"):
        model = MiniGPT4ForConditionalGeneration(config)
    wanted = model.state_dict()
    problems = [f"no tensor for {name}" for name in wanted if name not in tensors]
    for name, tensor in wanted.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            given = tuple(tensors[name].shape)
            needed = tuple(tensor.shape)
            problems.append(f"{name}: shape {given} where {needed} is needed")
    if problems:
        raise ModelError(problems[:10], "do the files belong to the same MiniGPT-4?")
    model.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
    return model


def _write(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    model.save_pretrained(folder)
    model.config.dtype = dtype  # that of the language model, by far the largest part
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = model.config.vision_config.image_size
    BlipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
