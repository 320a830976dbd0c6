"""The parts of MGIE put together: from a pipeline folder, from models to train, and from what a training left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmedit_cli import runtime
from mmedit_cli.catalog import find_model, own_image_editors
from mmedit_cli.errors import ModelError, StateError
from mmedit_cli.identity import same_model
from mmedit_cli.model_folder import CHECKPOINT, check_parts, loading
from mmedit_cli.picture_editing.methods.mgie.hparams import MgieHparams
from mmedit_cli.picture_editing.methods.mgie.modules import MGIEEditHead, widened
from mmedit_cli.picture_editing.methods.mgie.pipeline import MGIEPipeline
from mmedit_cli.picture_editing.methods.shared import tiny
from mmedit_cli.picture_editing.methods.shared.loading import (
    LoadOptions,
    content_of,
    digest,
    find_pipeline,
    load_pipeline,
    pipeline_class,
)
from mmedit_cli.reading import open_tensors, parse_json
from mmedit_cli.storage import sha256_of
from mmedit_cli.vocabulary import check_vocabulary

TINY = "tiny-mgie"
_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionInstructPix2PixPipeline")
_TRAINED = ("mllm", "edit_head", "unet")
_TINY_HPARAMS = MgieHparams(
    "tiny-ip2p", d_model=32, d_feedforward=64, layers=2, heads=2
)


def assemble(
    model: str, hparams: MgieHparams, options: LoadOptions, *, seed: int = 0
) -> MGIEPipeline:
    """Return the untrained parts: a LLaVA by name, the pipeline of `hparams.diffusion`, a fresh edit head.

    A denoiser of a text-to-image model gets the channels for the picture. Raises ModelError.
    """
    from diffusers import EulerAncestralDiscreteScheduler
    from transformers import LlavaProcessor

    from mmedit_cli.knowledge.models.shared.loading import load_backbone

    llava = load_backbone(
        model, device=options.device, dtype=options.dtype, revision=options.revision
    )
    if llava.family != "llava":
        raise ModelError(
            f"--model {model}: of the family {llava.family}; mgie is built on llava"
        )
    diffusion = load_pipeline(
        hparams.diffusion, _DIFFUSION, LoadOptions(options.device, options.dtype)
    ).pipeline
    unet, channels, scheduler = (
        diffusion.unet,
        2 * diffusion.vae.config.latent_channels,
        diffusion.scheduler,
    )
    if unet.config.in_channels != channels:
        scheduler = EulerAncestralDiscreteScheduler.from_config(
            scheduler.config
        )  # InstructPix2Pix's sampler
        unet.conv_in = widened(unet.conv_in, channels)
        unet.register_to_config(in_channels=channels)
    mllm, length = llava.model, diffusion.tokenizer.model_max_length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MGIEEditHead(
            llava.width, hparams.d_model, length, unet.config.cross_attention_dim, hparams.layers, hparams.heads,
            hparams.d_feedforward,
        )  # fmt: skip
    matrices = (mllm.get_input_embeddings().weight, mllm.get_output_embeddings().weight)
    head.to(unet.device).tokens.start_from(*matrices, runtime.generator(seed))
    processor = LlavaProcessor(llava.image_processor, llava.tokenizer)
    parts = (mllm, processor, head.to(unet.dtype), unet, diffusion.vae, scheduler)
    return MGIEPipeline(*parts, hparams.prompt)


def load_whole(model: str, options: LoadOptions) -> tuple[MGIEPipeline, str, str]:
    """Return (pipeline, name, fingerprint) of a folder or hub id of MGIEPipeline; raise ModelError if it is none."""
    from transformers import LlavaProcessor

    if model == TINY:
        return (
            assemble("tiny-llava", _TINY_HPARAMS, options),
            TINY,
            f"{TINY}/{tiny.VERSION}",
        )
    runtime.quiet_libraries()
    name, folder = find_pipeline(model, revision=options.revision)
    if (kind := pipeline_class(folder)) != MGIEPipeline.__name__:
        raise ModelError(
            f"--model {model}: a {kind}, where MGIEPipeline is needed",
            "name another editor",
        )
    device = runtime.resolve_device(options.device)
    number = runtime.resolve_dtype(options.dtype, device)
    more = {} if isinstance(number, str) else {"dtype": number}
    check_parts(folder)
    with loading(folder):
        # by itself the pipeline would open the parts of its processor without saying that no code of others is run
        processor = LlavaProcessor.from_pretrained(
            folder / "processor",
            local_files_only=True,
            trust_remote_code=False,
            backend="pil",
        )
        pipeline = MGIEPipeline.from_pretrained(
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
    pipeline: MGIEPipeline, hparams: MgieHparams, *, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Mark what `hparams` trains, adding LoRA where it says so, and return it by name; all else is frozen.

    What is trained is float32 from here on.
    """
    for name in (*_TRAINED, "vae"):
        getattr(pipeline, name).requires_grad_(False)
    mllm, unet = pipeline.mllm, pipeline.unet
    chosen: list[nn.Parameter] = [*pipeline.edit_head.parameters()]
    if hparams.train_lm == "reference":
        chosen += [
            mllm.get_input_embeddings().weight,
            mllm.get_output_embeddings().weight,
        ]
    if hparams.train_lm in ("lora", "two_phase"):
        chosen += _with_lora(
            mllm, hparams.lora_rank, r".*language_model.*\.(q_proj|v_proj)", seed
        )
    if hparams.train_unet == "lora":
        chosen += _with_lora(
            unet, hparams.unet_lora_rank, r".*\.(to_q|to_k|to_v|to_out\.0)", seed
        )
        chosen += unet.conv_in.parameters()
    elif hparams.train_unet == "full":
        chosen += unet.parameters()
    for parameter in chosen:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return {
        f"{part}.{name}": parameter
        for part in _TRAINED
        for name, parameter in getattr(pipeline, part).named_parameters()
        if parameter.requires_grad
    }


def _with_lora(
    model: nn.Module, rank: int, pattern: str, seed: int
) -> list[nn.Parameter]:
    """Put LoRA at the modules whose name matches, and return its parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), model
        )
    return [
        parameter for name, parameter in model.named_parameters() if "lora_" in name
    ]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold LoRA into the weights it stands beside, so that the model is a plain one again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[operator]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def load_trained(folder: Path, options: LoadOptions) -> tuple[MGIEPipeline, str, str]:
    """Return (pipeline, name, fingerprint) for what a training left in a folder; the frozen parts come from its base.

    Raises StateError if the file is damaged or does not fit.
    """
    from safetensors import SafetensorError

    path = folder / CHECKPOINT
    try:
        with open_tensors(
            path, error=StateError, hint="train again with --force"
        ) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = parse_json(
                (file.metadata() or {})["mgie"], f"{path}: mgie", error=StateError
            )
            values = about["hparams"]
            hparams = MgieHparams(
                **{k: v for k, v in values.items() if k != "training"}
            )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"{path}: not what a training of mgie left ({error})",
            "train again with --force",
        ) from error
    known = about["fingerprint"]
    base = find_model(about["model"])
    if known and not same_model(known, base.fingerprint, base.former):
        raise StateError(
            f"{path}: {about['model']} is not the model it was trained for",
            "give it back, or train again",
        )
    known = about.get("diffusion", "")
    if known and not same_model(
        known, content_of(hparams.diffusion), content_of(hparams.diffusion, former=True)
    ):
        raise StateError(
            f"{path}: {hparams.diffusion} is not the pipeline it was trained from",
            "train again",
        )
    pipeline = assemble(about["model"], hparams, options)
    restore(make_trainable(pipeline, hparams), tensors, str(path))
    device = runtime.resolve_device(options.device)
    number = runtime.resolve_dtype(options.dtype, device)
    for part in ("mllm", "unet"):
        merge_lora(getattr(pipeline, part))
    for part in _TRAINED:
        getattr(pipeline, part).requires_grad_(False).eval()
        if not isinstance(number, str):
            getattr(pipeline, part).to(number)
    comes_along = folder.resolve() in [
        own.resolve() for own in own_image_editors().values()
    ]
    name = folder.name if comes_along else f"mgie on {about['model']}"
    return pipeline, name, sha256_of(path)[:16]


def restore(
    trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], place: str
) -> None:
    """Put trained tensors back by name; raise StateError unless names and shapes are those of what is trained."""
    problems = [
        f"{place}: {name} is missing" for name in trained.keys() - tensors.keys()
    ]
    problems += [
        f"{place}: {name} is not part of the model"
        for name in tensors.keys() - trained.keys()
    ]
    problems += [
        f"{place}: {name} has the shape {tuple(tensors[name].shape)}, not {tuple(trained[name].shape)}"
        for name in trained.keys() & tensors.keys()
        if tensors[name].shape != trained[name].shape
    ]
    if problems:
        raise StateError(sorted(problems)[:10], "was it trained for another model?")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
