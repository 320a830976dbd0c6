"""From the published files of MGIE to a folder of MGIEPipeline.

There are five: LLaVA-7B-v1 in its first layout, the CLIP tower it looks through, mllm.pt (vocabulary matrices and edit
head), unet.pt, and the InstructPix2Pix pipeline whose VAE and scheduler it samples with. Files that are pickles are
read for their tensors alone: nothing in them is executed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import ModelError
from mmedit_cli.model_folder import loading
from mmedit_cli.picture_editing.methods.mgie.modules import N_TOKENS, MGIEEditHead
from mmedit_cli.picture_editing.methods.mgie.pipeline import MGIEPipeline
from mmedit_cli.picture_editing.methods.shared.loading import LoadOptions, load_pipeline
from mmedit_cli.reading import read_json_object
from mmedit_cli.storage import staged_folder

# the conversation that the published weights were trained with; <image> stands between its own two tokens
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: what will this image be like if '{instruction}'\n"
    "<im_start><image><im_end> ASSISTANT:"
)
_PATCH, _START, _END = "<im_patch>", "<im_start>", "<im_end>"
_EMBED, _LM_HEAD, _HEAD, _EMB = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "edit_head.",
    "emb",
)
_HEADS = 4  # of the edit head's attention: shapes do not tell


@dataclass(frozen=True)
class Published:
    """Where the five parts lie: llava and vision are folders, mllm and unet files, diffusion a folder or hub id."""

    llava: Path
    vision: Path
    mllm: Path
    unet: Path
    diffusion: str = "instruct-pix2pix"


@dataclass(frozen=True)
class Guidance:
    """What mllm.pt holds: both vocabulary matrices without the visual tokens, those, and the edit head's tensors."""

    embed: Tensor
    lm_head: Tensor
    visual_embed: Tensor
    visual_unembed: Tensor
    head: dict[str, Tensor]


def convert(
    parts: Published, out: Path, note: Callable[[str], None] = lambda text: None
) -> Path:
    """Write the pipeline to the folder `out` and return it; every tensor keeps its number format.

    Raises ModelError if `out` exists, or if a part cannot be read, lacks a tensor or does not fit the others; then
    nothing is left behind.
    """
    if out.exists():
        raise ModelError(f"{out}: exists already", "name a folder that does not")
    note(f"reading {parts.mllm}, {parts.unet}")
    guidance = read_guidance(read_tensors(parts.mllm), str(parts.mllm))
    note(f"reading {parts.llava}")
    mllm, processor = _llava(parts, guidance)
    pipelines = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionPipeline")
    diffusion = load_pipeline(parts.diffusion, pipelines, LoadOptions("cpu")).pipeline
    unet = _unet(diffusion.unet, read_tensors(parts.unet), str(parts.unet))
    head = _edit_head(guidance, str(parts.mllm))
    pipeline = MGIEPipeline(
        mllm, processor, head, unet, diffusion.vae, diffusion.scheduler, PROMPT
    )
    note(f"writing {out}")
    with staged_folder(out) as fresh:
        pipeline.save_pretrained(fresh)
    return out


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a published file, or of all weight files of a folder, by name; raise ModelError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(
            path.glob("pytorch_model*.bin")
        )
    if not files or not files[0].is_file():
        raise ModelError(
            f"{path}: no weights there",
            "see `mmedit convert mgie --help` for where to get them",
        )
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                found |= load_file(file)
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
                found |= {
                    name: value
                    for name, value in content.items()
                    if isinstance(value, Tensor)
                }
        except (
            pickle.UnpicklingError,
            SafetensorError,
            RuntimeError,
            EOFError,
            OSError,
            ValueError,
            AttributeError,
        ) as error:
            reason = str(error).strip().partition("\n")[0][:120]
            raise ModelError(
                f"{file}: not a file of tensors ({reason})",
                "get the published file again",
            ) from error
    return found


def read_guidance(tensors: Mapping[str, Tensor], place: str) -> Guidance:
    """Take mllm.pt apart; `emb` may be missing, as the published script for own checkpoints leaves it out.

    Then it is the last eight rows of the embeddings. Raises ModelError for tensors that are missing or unknown.
    """
    head = {
        name.removeprefix(_HEAD): value
        for name, value in tensors.items()
        if name.startswith(_HEAD)
    }
    problems = [
        f"{place}: no tensor {name}"
        for name in (_EMBED, _LM_HEAD)
        if name not in tensors
    ]
    problems += [] if head else [f"{place}: no tensor {_HEAD}..."]
    known = {_EMBED, _LM_HEAD, _EMB, *(_HEAD + name for name in head)}
    problems += [
        f"{place}: unknown tensor {name}" for name in sorted(tensors.keys() - known)
    ]
    if problems:
        raise ModelError(problems[:10], "is it mllm.pt of MGIE?")
    embed, lm_head = tensors[_EMBED], tensors[_LM_HEAD]
    visual = (
        tensors[_EMB].reshape(N_TOKENS, -1) if _EMB in tensors else embed[-N_TOKENS:]
    )
    return Guidance(
        embed[:-N_TOKENS], lm_head[:-N_TOKENS], visual, lm_head[-N_TOKENS:], head
    )


def _edit_head(guidance: Guidance, place: str) -> MGIEEditHead:
    head = guidance.head
    need = (
        "llm2hid.weight",
        "query",
        "hid2feat.weight",
        "mapper.encoder.layers.0.linear1.weight",
    )
    if missing := [name for name in need if name not in head]:
        raise ModelError(
            [f"{place}: no tensor {_HEAD}{name}" for name in missing],
            "is it mllm.pt of MGIE?",
        )
    d_model, d_llm = head["llm2hid.weight"].shape
    layers = len(
        {
            name.split(".")[3]
            for name in head
            if name.startswith("mapper.encoder.layers.")
        }
    )
    width = head["mapper.encoder.layers.0.linear1.weight"].shape[0]
    module = MGIEEditHead(
        d_llm,
        d_model,
        head["query"].shape[1],
        head["hid2feat.weight"].shape[0],
        layers,
        _HEADS,
        width,
    )
    tokens = {
        "tokens.embed": guidance.visual_embed,
        "tokens.unembed": guidance.visual_unembed,
    }
    _load(module, head | tokens, place)
    return module.eval()


def _unet(unet: Any, tensors: Mapping[str, Tensor], place: str) -> Any:
    from mmedit_cli.picture_editing.methods.mgie.modules import widened

    channels = tensors["conv_in.weight"].shape[1] if "conv_in.weight" in tensors else 0
    if channels and unet.config.in_channels != channels:
        unet.conv_in = widened(unet.conv_in, channels)
        unet.register_to_config(in_channels=channels)
    _load(unet, tensors, place)
    return unet


def _load(module: torch.nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    """Fill a module strictly; raise ModelError naming what is missing, unknown or of another shape."""
    own = module.state_dict()
    problems = [
        f"{place}: no tensor {name}" for name in sorted(own.keys() - tensors.keys())
    ]
    problems += [
        f"{place}: unknown tensor {name}"
        for name in sorted(tensors.keys() - own.keys())
    ]
    problems += [
        f"{place}: {name} has the shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise ModelError(problems[:10], "is it the published file for this part?")
    module.load_state_dict(dict(tensors), assign=True)


def _llava(parts: Published, guidance: Guidance) -> tuple[Any, Any]:
    """Return (LlavaForConditionalGeneration, processor) for LLaVA in its first layout.

    Its projector is one matrix: in today's model of two that is the first, the activation none, the second identity.
    """
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        CLIPVisionModel,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )  # fmt: skip

    local: dict[str, Any] = {"local_files_only": True}
    with loading(
        f"{parts.llava} or {parts.vision}",
        problem="cannot be read",
        hint="are they complete?",
    ):
        told = read_json_object(
            parts.llava / "config.json", error=ModelError, hint="is it complete?"
        ).values
        tokenizer = AutoTokenizer.from_pretrained(
            parts.llava, trust_remote_code=False, **local
        )
        tower = CLIPVisionModel.from_pretrained(
            parts.vision, trust_remote_code=False, dtype=guidance.embed.dtype, **local
        )
        image_processor = AutoImageProcessor.from_pretrained(
            parts.vision, trust_remote_code=False, backend="pil", **local
        )
    tokenizer.add_tokens([_PATCH, _START, _END], special_tokens=True)
    known = LlamaConfig().to_dict().keys() - {
        "model_type",
        "architectures",
        "transformers_version",
    }
    text = LlamaConfig(
        **{k: v for k, v in told.items() if k in known}
        | {"vocab_size": len(guidance.embed)}
    )
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(_PATCH),
        vision_feature_select_strategy="default",
        vision_feature_layer=int(told.get("mm_vision_select_layer", -2)),
        projector_hidden_act="linear",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    width, dtype = text.hidden_size, guidance.embed.dtype
    published = read_tensors(parts.llava)
    if "model.mm_projector.weight" not in published:
        raise ModelError(
            f"{parts.llava}: no tensor model.mm_projector.weight",
            "is it LLaVA-7B-v1 in its first layout?",
        )
    tensors = {
        f"model.language_model.{name.removeprefix('model.')}": value
        for name, value in published.items()
        if name.startswith(("model.layers.", "model.norm."))
        and not name.endswith("rotary_emb.inv_freq")
    }
    tensors |= {
        name.replace(
            "model.mm_projector", "model.multi_modal_projector.linear_1"
        ): value
        for name, value in published.items()
        if name.startswith("model.mm_projector.")
    }
    tensors |= {
        "model.language_model.embed_tokens.weight": guidance.embed,
        "lm_head.weight": guidance.lm_head,
        "model.multi_modal_projector.linear_2.weight": torch.eye(width, dtype=dtype),
        "model.multi_modal_projector.linear_2.bias": torch.zeros(width, dtype=dtype),
    }
    tensors |= {
        f"model.vision_tower.{name}": value
        for name, value in tower.state_dict().items()
    }
    _load(model, tensors, str(parts.llava))
    return model, LlavaProcessor(image_processor, tokenizer)
