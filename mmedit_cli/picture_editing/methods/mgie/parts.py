"""Build MGIE from its parts: from a pipeline folder, from models to train, and from the checkpoint of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli import runtime
from mmedit_cli.catalog import find_model, own_image_editors
from mmedit_cli.errors import ModelError, StateError
from mmedit_cli.identity import same_model
from mmedit_cli.model_folder import CHECKPOINT, check_parts, loading
from mmedit_cli.picture_editing.methods.mgie.components import (
    PIPELINE,
    MGIEComponents,
)
from mmedit_cli.picture_editing.methods.mgie.hparams import MgieHparams
from mmedit_cli.picture_editing.methods.mgie.modules import MGIEEditHead, widened
from mmedit_cli.picture_editing.methods.shared import tiny
from mmedit_cli.picture_editing.methods.shared.loading import (
    content_of,
    digest,
    find_pipeline,
    load_pipeline,
    pipeline_class,
)
from mmedit_cli.reading import open_tensors, parse_json
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.storage import sha256_of
from mmedit_cli.vocabulary import check_vocabulary

TINY = "tiny-mgie"
_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionInstructPix2PixPipeline")
_TRAINED = ("mllm", "edit_head", "unet")
_LM_TARGETS = r".*language_model.*\.(q_proj|v_proj)"
_UNET_TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0)"
_TINY_HPARAMS = MgieHparams(
    "tiny-ip2p",
    d_model=32,
    d_feedforward=64,
    layers=2,
    heads=2,
)


def assemble(
    model: str, hparams: MgieHparams, options: LoadOptions, *, seed: int = 0
) -> MGIEComponents:
    """Return the untrained parts: a LLaVA by name, the pipeline of `hparams.diffusion`, a new edit head.

    The denoiser of a text-to-image model gets input channels for the picture. Raises ModelError.
    """
    from transformers import LlavaProcessor

    from mmedit_cli.knowledge.models.shared.loading import load_backbone

    llava = load_backbone(
        model,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
    )
    if llava.family != "llava":
        raise ModelError(
            f"--model {model}: of the family {llava.family}; mgie is built on llava"
        )
    of_pipeline = LoadOptions(device=options.device, dtype=options.dtype)
    diffusion = load_pipeline(hparams.diffusion, _DIFFUSION, of_pipeline).pipeline
    unet, scheduler = _with_picture_channels(diffusion)
    mllm = llava.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head: Any = MGIEEditHead(
            d_llm=llava.width,
            d_model=hparams.d_model,
            n_queries=diffusion.tokenizer.model_max_length,
            d_context=unet.config.cross_attention_dim,
            layers=hparams.layers,
            heads=hparams.heads,
            d_feedforward=hparams.d_feedforward,
        )
    head.to(unet.device)
    head.tokens.start_from(
        mllm.get_input_embeddings().weight,
        mllm.get_output_embeddings().weight,
        runtime.generator(seed),
    )
    return MGIEComponents(
        mllm=mllm,
        processor=LlavaProcessor(llava.image_processor, llava.tokenizer),
        edit_head=head.to(unet.dtype),
        unet=unet,
        vae=diffusion.vae,
        scheduler=scheduler,
        prompt=hparams.prompt,
    )


def _with_picture_channels(diffusion: Any) -> tuple[Any, Any]:
    """Return the denoiser and the sampler of a pipeline, adapted to pictures if it is a text-to-image model."""
    from diffusers import EulerAncestralDiscreteScheduler

    unet, scheduler = diffusion.unet, diffusion.scheduler
    channels = 2 * diffusion.vae.config.latent_channels
    if unet.config.in_channels != channels:
        # the sampler of InstructPix2Pix
        scheduler = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
        unet.conv_in = widened(unet.conv_in, channels)
        unet.register_to_config(in_channels=channels)
    return unet, scheduler


def load_whole(model: str, options: LoadOptions) -> tuple[MGIEComponents, str, str]:
    """Return (parts, name, fingerprint) of a folder or hub id of MGIEPipeline; raise ModelError if it is none."""
    from transformers import LlavaProcessor

    if model == TINY:
        untrained = assemble("tiny-llava", _TINY_HPARAMS, options)
        return untrained, TINY, f"{TINY}/{tiny.VERSION}"
    runtime.quiet_libraries()
    name, folder = find_pipeline(model, revision=options.revision)
    kind = pipeline_class(folder)
    if kind not in (PIPELINE, MGIEComponents.__name__):
        raise ModelError(
            f"--model {model}: a {kind}, where {PIPELINE} is needed",
            "name another editor",
        )
    device = runtime.resolve_device(options.device)
    dtype = runtime.resolve_dtype(options.dtype, device)
    more = {} if isinstance(dtype, str) else {"dtype": dtype}
    check_parts(folder)
    with loading(folder):
        # The pipeline itself would open its processor without `trust_remote_code=False`.
        processor = LlavaProcessor.from_pretrained(
            folder / "processor",
            local_files_only=True,
            trust_remote_code=False,
            backend="pil",
        )
        pipeline: Any = MGIEComponents.from_pretrained(
            folder,
            processor=processor,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **more,
        )
    rows = pipeline.mllm.get_input_embeddings().weight.shape[0]
    check_vocabulary(processor.tokenizer, rows, folder / "processor")
    return pipeline.to(device), name, digest(folder)


# -- training ---------------------------------------------------------------------------------------------------


def make_trainable(
    pipeline: MGIEComponents, hparams: MgieHparams, *, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Return the parameters that `hparams` trains by name, with LoRA added where it says so; all others are frozen.

    Trained parameters are converted to float32.
    """
    for part in (*_TRAINED, "vae"):
        getattr(pipeline, part).requires_grad_(False)
    mllm, unet = pipeline.mllm, pipeline.unet
    chosen: list[nn.Parameter] = list(pipeline.edit_head.parameters())
    if hparams.train_lm == "reference":
        chosen.append(mllm.get_input_embeddings().weight)
        chosen.append(mllm.get_output_embeddings().weight)
    if hparams.train_lm in ("lora", "two_phase"):
        chosen += _add_lora(mllm, hparams.lora_rank, _LM_TARGETS, seed)
    if hparams.train_unet == "lora":
        chosen += _add_lora(
            unet,
            hparams.unet_lora_rank,
            _UNET_TARGETS,
            seed,
        )
        chosen += unet.conv_in.parameters()
    elif hparams.train_unet == "full":
        chosen += unet.parameters()
    for parameter in chosen:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    trained = {}
    for part in _TRAINED:
        for name, parameter in getattr(pipeline, part).named_parameters():
            if parameter.requires_grad:
                trained[f"{part}.{name}"] = parameter
    return trained


def _add_lora(
    model: nn.Module, rank: int, pattern: str, seed: int
) -> list[nn.Parameter]:
    """Put LoRA at the modules whose name matches, and return its parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=pattern,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    parameters = model.named_parameters()
    return [parameter for name, parameter in parameters if "lora_" in name]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add LoRA to the weights it belongs to, so that the model is a plain one again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                child,
                layer.get_base_layer(),
            )


def load_trained(folder: Path, options: LoadOptions) -> tuple[MGIEComponents, str, str]:
    """Return (parts, name, fingerprint) of the checkpoint of a training; the frozen parts come from its base model.

    Raises StateError if the file is damaged or does not fit.
    """
    path = folder / CHECKPOINT
    tensors, about, hparams = _read_checkpoint(path)
    _check_bases(about, hparams, path)
    pipeline = assemble(about["model"], hparams, options)
    restore(make_trainable(pipeline, hparams), tensors, str(path))
    device = runtime.resolve_device(options.device)
    dtype = runtime.resolve_dtype(options.dtype, device)
    merge_lora(pipeline.mllm)
    merge_lora(pipeline.unet)
    for part in _TRAINED:
        module = getattr(pipeline, part)
        module.requires_grad_(False).eval()
        if not isinstance(dtype, str):
            module.to(dtype)
    bundled_folders = [own.resolve() for own in own_image_editors().values()]
    name = f"mgie on {about['model']}"
    if folder.resolve() in bundled_folders:
        name = folder.name
    return pipeline, name, sha256_of(path)[:16]


def _read_checkpoint(
    path: Path,
) -> tuple[dict[str, Tensor], dict[str, Any], MgieHparams]:
    """Return the tensors of a checkpoint, its description and hyper-parameters; raise StateError if it is damaged."""
    from safetensors import SafetensorError

    hint = "train again with --force"
    try:
        with open_tensors(path, error=StateError, hint=hint) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {})["mgie"]
        about = parse_json(
            text,
            f"{path}: mgie",
            error=StateError,
        )
        values = dict(about["hparams"])
        values.pop("training", None)
        hparams = MgieHparams(**values)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"{path}: not what a training of mgie left ({error})", hint
        ) from error
    return tensors, about, hparams


def _check_bases(about: dict[str, Any], hparams: MgieHparams, path: Path) -> None:
    """Raise StateError unless the models that a checkpoint was trained from are the same as then."""
    known = about["fingerprint"]
    base = find_model(about["model"])
    if known and not same_model(known, base.fingerprint, base.former):
        raise StateError(
            f"{path}: {about['model']} is not the model it was trained for",
            "give it back, or train again",
        )
    known = about.get("diffusion", "")
    if not known:
        return
    content = content_of(hparams.diffusion)
    former = content_of(hparams.diffusion, former=True)
    if not same_model(known, content, former):
        raise StateError(
            f"{path}: {hparams.diffusion} is not the pipeline it was trained from",
            "train again",
        )


def restore(
    trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], place: str
) -> None:
    """Put trained tensors back by name; raise StateError unless names and shapes are those of the parameters."""
    problems = []
    for name in trained.keys() - tensors.keys():
        problems.append(f"{place}: {name} is missing")
    for name in tensors.keys() - trained.keys():
        problems.append(f"{place}: {name} is not part of the model")
    for name in trained.keys() & tensors.keys():
        found = tuple(tensors[name].shape)
        expected = tuple(trained[name].shape)
        if found != expected:
            problems.append(f"{place}: {name} has the shape {found}, not {expected}")
    if problems:
        raise StateError(sorted(problems)[:10], "was it trained for another model?")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
