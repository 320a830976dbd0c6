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
from typing import Any, cast

import torch
from torch import Tensor

from mmedit_cli.errors import ModelError
from mmedit_cli.model_folder import loading
from mmedit_cli.picture_editing.methods.mgie.modules import (
    N_TOKENS,
    MGIEEditHead,
    widened,
)
from mmedit_cli.picture_editing.methods.mgie.pipeline import MGIEPipeline
from mmedit_cli.picture_editing.methods.shared.loading import (
    load_pipeline,
)
from mmedit_cli.reading import read_json_object
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.storage import staged_folder

# the conversation that the published weights were trained with; <image> stands between its own two tokens
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: what will this image be like if '{instruction}'\n"
    "<im_start><image><im_end> ASSISTANT:"
)
_PATCH = "<im_patch>"
_START = "<im_start>"
_END = "<im_end>"
# names and prefixes of tensors in mllm.pt
_EMBED = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_EDIT_HEAD = "edit_head."
_VISUAL_EMBED = "emb"
_HEADS = 4  # of the edit head's attention, which the shapes do not show


@dataclass(frozen=True)
class PublishedMgie:
    """The five published parts: llava and vision are folders, mllm and unet files, diffusion a folder or hub id."""

    llava: Path
    vision: Path
    mllm: Path
    unet: Path
    diffusion: str = "instruct-pix2pix"


@dataclass(frozen=True)
class MllmFile:
    """The content of mllm.pt: both vocabulary matrices, the rows of the visual tokens, and the edit head's tensors."""

    embed: Tensor
    lm_head: Tensor
    visual_embed: Tensor
    visual_unembed: Tensor
    head: dict[str, Tensor]


def convert(
    parts: PublishedMgie, out: Path, note: Callable[[str], None] = lambda text: None
) -> Path:
    """Write the pipeline to the folder `out` and return it; every tensor keeps its dtype.

    Raises ModelError if `out` exists, or if a part cannot be read, lacks a tensor or does not fit the others; then no
    files are left behind.
    """
    if out.exists():
        raise ModelError(f"{out}: exists already", "name a folder that does not")
    note(f"reading {parts.mllm}, {parts.unet}")
    guidance = read_mllm(read_tensors(parts.mllm), str(parts.mllm))
    note(f"reading {parts.llava}")
    mllm, processor = _llava(parts, guidance)
    pipelines = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionPipeline")
    diffusion = load_pipeline(
        parts.diffusion, pipelines, LoadOptions(device="cpu")
    ).pipeline
    unet = _unet(diffusion.unet, read_tensors(parts.unet), str(parts.unet))
    head = _edit_head(guidance, str(parts.mllm))
    pipeline: Any = MGIEPipeline(
        mllm=mllm,
        processor=processor,
        edit_head=head,
        unet=unet,
        vae=diffusion.vae,
        scheduler=diffusion.scheduler,
        prompt=PROMPT,
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
        files = sorted(path.glob("*.safetensors"))
        if not files:
            files = sorted(path.glob("pytorch_model*.bin"))
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
                for name, value in content.items():
                    if isinstance(value, Tensor):
                        found[name] = value
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


def read_mllm(tensors: Mapping[str, Tensor], place: str) -> MllmFile:
    """Return the content of mllm.pt; `emb` may be missing, as the published script for own checkpoints omits it.

    Then it is the last eight rows of the embeddings. Raises ModelError for tensors that are missing or unknown.
    """
    head = {}
    unknown = []
    for name, value in tensors.items():
        if name.startswith(_EDIT_HEAD):
            head[name.removeprefix(_EDIT_HEAD)] = value
        elif name not in (_EMBED, _LM_HEAD, _VISUAL_EMBED):
            unknown.append(name)
    problems = []
    for name in (_EMBED, _LM_HEAD):
        if name not in tensors:
            problems.append(f"{place}: no tensor {name}")
    if not head:
        problems.append(f"{place}: no tensor {_EDIT_HEAD}...")
    for name in sorted(unknown):
        problems.append(f"{place}: unknown tensor {name}")
    if problems:
        raise ModelError(problems[:10], "is it mllm.pt of MGIE?")
    embed = tensors[_EMBED]
    lm_head = tensors[_LM_HEAD]
    visual_embed = embed[-N_TOKENS:]
    if _VISUAL_EMBED in tensors:
        visual_embed = tensors[_VISUAL_EMBED].reshape(N_TOKENS, -1)
    return MllmFile(
        embed=embed[:-N_TOKENS],
        lm_head=lm_head[:-N_TOKENS],
        visual_embed=visual_embed,
        visual_unembed=lm_head[-N_TOKENS:],
        head=head,
    )


def _edit_head(guidance: MllmFile, place: str) -> MGIEEditHead:
    head = guidance.head
    need = (
        "llm2hid.weight",
        "query",
        "hid2feat.weight",
        "mapper.encoder.layers.0.linear1.weight",
    )
    missing = [name for name in need if name not in head]
    if missing:
        raise ModelError(
            [f"{place}: no tensor {_EDIT_HEAD}{name}" for name in missing],
            "is it mllm.pt of MGIE?",
        )
    d_model, d_llm = head["llm2hid.weight"].shape
    layers = set()
    for name in head:
        if name.startswith("mapper.encoder.layers."):
            layers.add(name.split(".")[3])
    module: Any = MGIEEditHead(
        d_llm=d_llm,
        d_model=d_model,
        n_queries=head["query"].shape[1],
        d_context=head["hid2feat.weight"].shape[0],
        layers=len(layers),
        heads=_HEADS,
        d_feedforward=head["mapper.encoder.layers.0.linear1.weight"].shape[0],
    )
    tokens = {
        "tokens.embed": guidance.visual_embed,
        "tokens.unembed": guidance.visual_unembed,
    }
    _load(module, head | tokens, place)
    module.eval()
    return cast(MGIEEditHead, module)


def _unet(unet: Any, tensors: Mapping[str, Tensor], place: str) -> Any:
    first = tensors.get("conv_in.weight")
    if first is not None and unet.config.in_channels != first.shape[1]:
        channels = first.shape[1]
        unet.conv_in = widened(unet.conv_in, channels)
        unet.register_to_config(in_channels=channels)
    _load(unet, tensors, place)
    return unet


def _load(module: torch.nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    """Fill a module strictly; raise ModelError naming what is missing, unknown or of another shape."""
    own = module.state_dict()
    problems = []
    for name in sorted(own.keys() - tensors.keys()):
        problems.append(f"{place}: no tensor {name}")
    for name in sorted(tensors.keys() - own.keys()):
        problems.append(f"{place}: unknown tensor {name}")
    for name in sorted(own.keys() & tensors.keys()):
        found = tuple(tensors[name].shape)
        expected = tuple(own[name].shape)
        if found != expected:
            problems.append(f"{place}: {name} has the shape {found}, not {expected}")
    if problems:
        raise ModelError(problems[:10], "is it the published file for this part?")
    module.load_state_dict(dict(tensors), assign=True)


def _llava(parts: PublishedMgie, guidance: MllmFile) -> tuple[Any, Any]:
    """Return (LlavaForConditionalGeneration, processor) for LLaVA in its first layout.

    Its projector is one matrix. The present model has two and an activation: the matrix becomes the first, the
    activation is linear, and the second is the identity.
    """
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        CLIPVisionModel,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    local: dict[str, Any] = {"local_files_only": True}
    with loading(
        f"{parts.llava} or {parts.vision}",
        problem="cannot be read",
        hint="are they complete?",
    ):
        published_config = read_json_object(
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
    image_token_id: Any = tokenizer.convert_tokens_to_ids(_PATCH)
    config = _llava_config(
        published_config,
        tower.config.to_dict(),
        vocab_size=len(guidance.embed),
        image_token_id=image_token_id,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    tensors = _llava_tensors(parts, guidance, config.text_config.hidden_size)
    for name, value in tower.state_dict().items():
        tensors[f"model.vision_tower.{name}"] = value
    _load(model, tensors, str(parts.llava))
    return model, LlavaProcessor(image_processor, tokenizer)


def _llava_config(
    published: Mapping[str, Any],
    vision: dict[str, Any],
    *,
    vocab_size: int,
    image_token_id: int,
) -> Any:
    """Return the LlavaConfig for the published config of LLaVA in its first layout."""
    from transformers import LlamaConfig, LlavaConfig

    not_settings = {"model_type", "architectures", "transformers_version"}
    known = LlamaConfig().to_dict().keys() - not_settings
    values = {key: value for key, value in published.items() if key in known}
    values["vocab_size"] = vocab_size
    text = LlamaConfig(**values)
    build: Any = LlavaConfig
    return build(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=image_token_id,
        vision_feature_select_strategy="default",
        vision_feature_layer=int(published.get("mm_vision_select_layer", -2)),
        projector_hidden_act="linear",
        tie_word_embeddings=False,
    )


def _llava_tensors(
    parts: PublishedMgie, guidance: MllmFile, width: int
) -> dict[str, Tensor]:
    """Return the tensors of the language model and the projector under their present names."""
    published = read_tensors(parts.llava)
    if "model.mm_projector.weight" not in published:
        raise ModelError(
            f"{parts.llava}: no tensor model.mm_projector.weight",
            "is it LLaVA-7B-v1 in its first layout?",
        )
    dtype = guidance.embed.dtype
    projector = "model.multi_modal_projector"
    tensors = {
        "model.language_model.embed_tokens.weight": guidance.embed,
        "lm_head.weight": guidance.lm_head,
        f"{projector}.linear_2.weight": torch.eye(width, dtype=dtype),
        f"{projector}.linear_2.bias": torch.zeros(width, dtype=dtype),
    }
    for name, value in published.items():
        inner = name.removeprefix("model.")
        if name.startswith("model.mm_projector."):
            renamed = name.replace("model.mm_projector", f"{projector}.linear_1")
            tensors[renamed] = value
        elif name.endswith("rotary_emb.inv_freq"):
            continue
        elif name.startswith(("model.layers.", "model.norm.")):
            tensors[f"model.language_model.{inner}"] = value
    return tensors
