"""Checkpoints of one file, as A1111 and ComfyUI keep them, become folders of diffusers by diffusers' own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedit_cli.catalog import find_model
from mmedit_cli.drawing.models.loading import check_draws
from mmedit_cli.errors import DataError, UserError
from mmedit_cli.model_folder import loading, read_config
from mmedit_cli.reading import read_tensor_header
from mmedit_cli.storage import staged_folder

_UNET = "model.diffusion_model."
_XL = "conditioner.embedders.1."  # the second text encoder
_USUAL = {False: "stable-diffusion-v1-5", True: "sdxl-1.0"}
_CLASSES = {False: "StableDiffusionPipeline", True: "StableDiffusionXLPipeline"}


def convert_checkpoint(file: Path, to: Path, like: str | None = None) -> Path:
    """Write a checkpoint of one .safetensors file as a folder of diffusers, and return it.

    Configuration, vocabulary and scheduler are those of the model `like`, whose kind must be the same; without it,
    Stable Diffusion 1.5, or XL where the file has two text encoders. Nothing but that model is looked for elsewhere.
    Raises DataError for a file that is none or does not fit, ModelError for a model that cannot be found, UserError
    for a folder that is there.
    """
    import diffusers

    if to.exists():
        raise UserError(f"{to}: there already", "name a new folder")
    is_xl = _check(file)
    ref = find_model(like or _USUAL[is_xl])
    check_draws(ref)
    hint = "name a model of the same kind with --like, as a folder of diffusers"
    if ref.folder is None:
        raise DataError(f"--like {ref.name}: made by chance, it has no folder", hint)
    config = read_config(ref.folder)
    if config["_class_name"] != _CLASSES[is_xl]:
        raise DataError(
            f"{file}: a checkpoint for {_CLASSES[is_xl]}, and {ref.name} is a {config['_class_name']}",
            hint,
        )
    options: dict[str, Any] = {}
    if "safety_checker" in config:
        options |= {"safety_checker": None, "feature_extractor": None}
    kind = getattr(diffusers, _CLASSES[is_xl])
    with loading(file, hint=hint):
        pipe = kind.from_single_file(
            str(file),
            config=str(ref.folder),
            local_files_only=True,
            **options,
        )
    _check_whole(file, pipe, ref.name, hint)
    with staged_folder(to) as fresh:
        pipe.save_pretrained(fresh)
    return to


def _check(file: Path) -> bool:
    """Return whether a file is a checkpoint of SDXL; raise DataError unless it is one of Stable Diffusion."""
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    if file.suffix != ".safetensors":
        raise DataError(
            f"{file}: not a .safetensors file, and others are not opened: they may run code",
            "save it as .safetensors",
        )
    tensors, _ = read_tensor_header(file, error=DataError)
    names = list(tensors.values)
    if not any(name.startswith(_UNET) for name in names):
        raise DataError(
            f"{file}: not a checkpoint of Stable Diffusion: no tensor {_UNET}...",
            "a LoRA is given with `mmedit generate --lora FILE`",
        )
    return any(name.startswith(_XL) for name in names)


def _check_whole(file: Path, pipe: Any, name: str, hint: str) -> None:
    """Raise DataError if a part has weights that the file did not bring."""
    for part, module in pipe.components.items():
        if not hasattr(module, "named_parameters"):
            continue
        for path, parameter in module.named_parameters():
            if parameter.is_meta:
                raise DataError(f"{file}: no weights for {part}.{path} of {name}", hint)
