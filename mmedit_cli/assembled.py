"""A vision-language model put together of a language model, a vision tower, and a small file of what joins them.

The file holds some parameters whole, the projector among them, and a low-rank change of some linear layers, in eight
bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli.eight_bits import from_eight_bits, to_eight_bits
from mmedit_cli.errors import ModelError
from mmedit_cli.model_folder import loading

IMAGE_TOKEN = "<image>"
PROJECTOR = "model.multi_modal_projector"
_FIRST, _SECOND = ".lora_A", ".lora_B"


def build(language: Path, tower: Path) -> tuple[Any, Any, Any]:
    """Return (model, tokenizer, image processor): a LLaVA with an untrained projector, in float32 on the CPU.

    `language` is the folder of a decoder of the Llama kind, `tower` that of a LLaVA whose tower is taken. The image
    token is added behind the vocabulary. Raises ModelError for folders that cannot be read.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    with loading(language):
        tokenizer = AutoTokenizer.from_pretrained(
            language, local_files_only=True, trust_remote_code=False
        )
    with loading(tower):
        processor = AutoImageProcessor.from_pretrained(
            tower, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    reader = _loaded("AutoModelForCausalLM", language)
    seeing = _loaded("LlavaForConditionalGeneration", tower)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    _begin_with(tokenizer, tokenizer.unk_token or tokenizer.bos_token)
    _make_room(reader, len(tokenizer))
    model = _joined(reader, seeing, tokenizer)
    return model, tokenizer, processor


def _begin_with(tokenizer: Any, token: str) -> None:
    """Let every text begin with a token that says nothing.

    Language models attend to the first position whatever stands there, and read little of it (Xiao et al. 2024,
    attention sinks): a picture must not begin there. SmolLM2 adds no token of its own.
    """
    from tokenizers.processors import TemplateProcessing

    bare = tokenizer("a", add_special_tokens=False)
    if tokenizer("a")["input_ids"] != bare["input_ids"]:
        return
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))],
    )


@torch.no_grad()
def _make_room(reader: Any, count: int) -> None:
    """Give new tokens the mean of all embeddings."""
    table = reader.get_input_embeddings().weight
    known, mean = len(table), table.mean(0)
    if known >= count:
        return
    reader.resize_token_embeddings(count, mean_resizing=False)
    reader.get_input_embeddings().weight[known:] = mean
    reader.get_output_embeddings().weight[known:] = mean


def _loaded(kind: str, folder: Path) -> Any:
    import transformers

    auto = getattr(transformers, kind)
    with loading(folder):
        return auto.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )


def _joined(reader: Any, seeing: Any, tokenizer: Any) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=seeing.config.vision_config.to_dict(),
        text_config=reader.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_select_strategy=seeing.config.vision_feature_select_strategy,
        vision_feature_layer=seeing.config.vision_feature_layer,
        tie_word_embeddings=reader.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(reader.model.state_dict())
    model.lm_head.load_state_dict(reader.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    model.generation_config = reader.generation_config
    return model.eval()


# -- the file of what joins them ----------------------------------------------------------------------------------


def packed(
    whole: Mapping[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors of a file: parameters that are kept whole, and (A, B) of layers whose weight gains B A."""
    named = dict(whole)
    for path, (first, second) in pairs.items():
        named[path + _FIRST] = first
        named[path + _SECOND] = second
    return to_eight_bits(named)


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `packed` was given, under its names in the file, in float32."""
    values = from_eight_bits(tensors)
    return {name: value.float() for name, value in values.items()}


@torch.no_grad()
def put_in(model: nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Put what a file holds into a model that `build` has made; raise ModelError where it belongs to another one."""
    values = unpacked(tensors)
    try:
        for name, value in values.items():
            if name.endswith(_FIRST):
                path = name.removesuffix(_FIRST)
                weight = model.get_parameter(path + ".weight")
                second = values[path + _SECOND]
                weight.add_(second @ value)
            elif not name.endswith(_SECOND):
                model.get_parameter(name).copy_(value)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{origin}: made for another model ({error})", "download it again"
        ) from error


def write(model: Any, tokenizer: Any, processor: Any, folder: Path) -> None:
    """Write a model in float16 with everything that `load_backbone` and AutoProcessor need."""
    from transformers import LlavaProcessor

    config = model.config
    model.half().save_pretrained(folder)
    whole = LlavaProcessor(
        processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
    whole.save_pretrained(folder)
    processor.save_pretrained(folder)
