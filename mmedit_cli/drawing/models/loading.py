"""From a text-to-image model that was found to one that draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmedit_cli import runtime
from mmedit_cli.catalog import ModelRef, find_model
from mmedit_cli.drawing.models.flow import FlowModel
from mmedit_cli.drawing.models.schedule import check_flow_scheduler, check_scheduler
from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion
from mmedit_cli.errors import ModelError
from mmedit_cli.identity import fingerprint, former_fingerprint
from mmedit_cli.model_folder import (
    check_parts,
    loading,
    pipeline_parts,
    read_config,
    read_settings,
)
from mmedit_cli.vocabulary import check_text_encoders


def load_stable_diffusion(
    model: str | ModelRef,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    low_memory: bool = False,
) -> StableDiffusion:
    """Return the text-to-image model for a name of the catalogue, a local folder or a hub id.

    With `low_memory`, see `StableDiffusion.save_memory`. Raises ModelError if the files cannot be used, or if they are
    no text-to-image model.
    """
    ref = find_model(model, revision=revision) if isinstance(model, str) else model
    check_draws(ref)
    runtime.quiet_libraries()
    _quiet()
    target = runtime.resolve_device(device)
    number = runtime.resolve_dtype(dtype, target)
    if ref.folder is None:
        from mmedit_cli.drawing.models import tiny

        pipe = tiny.build(ref.name).to(
            target, None if isinstance(number, str) else number
        )
        text = ref.fingerprint
    else:
        pipe = _from_folder(ref, number).to(target)
        check_text_encoders(pipe, ref.folder)
        text = _joined(fingerprint(part) for part in _text_encoders(ref.folder))[:32]
    flows = hasattr(pipe, "transformer")
    check = check_flow_scheduler if flows else check_scheduler
    check(pipe.scheduler, ref.name)
    cls = FlowModel if flows else StableDiffusion
    made = cls(
        ref.name,
        pipe,
        ref.fingerprint,
        text,
    )
    if ref.folder is not None:
        made.former = ref.former
        made.former_text = _joined(
            former_fingerprint(part) for part in _text_encoders(ref.folder)
        )[:16]
        made.guidance = float(read_settings(ref.folder).get("guidance", made.guidance))
    if low_memory:
        made.save_memory()
    return made


def _text_encoders(folder: Path) -> list[Path]:
    return [
        folder / part
        for part in pipeline_parts(folder)
        if part.startswith("text_encoder")
    ]


def _joined(fingerprints: Iterable[str]) -> str:
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def check_draws(ref: ModelRef) -> None:
    """Raise ModelError unless the model makes pictures from text."""
    if ref.family != StableDiffusion.family:
        raise ModelError(
            f"{ref.name}: a vision-language model ({ref.family}), it draws nothing",
            "take a text-to-image model such as tiny-sd, stable-diffusion-v1-5 or a folder of diffusers",
        )


def _from_folder(ref: ModelRef, dtype: Any) -> Any:
    import diffusers
    import torch

    assert ref.folder is not None
    config = read_config(ref.folder)
    kind = getattr(diffusers, config["_class_name"])
    denoiser = "transformer" if "transformer" in config else "unet"
    weights = list((ref.folder / denoiser).glob("*.safetensors"))
    half = [path for path in weights if ".fp16" in path.suffixes]
    options: dict[str, Any] = {}
    if half and len(half) == len(weights):  # no weights in full precision
        options["variant"] = "fp16"
    if "safety_checker" in config:
        options |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    if isinstance(dtype, str):
        dtype = torch.bfloat16 if denoiser == "transformer" else torch.float16
    check_parts(ref.folder)
    with loading(ref.folder):
        return kind.from_pretrained(
            ref.folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )


def _quiet() -> None:
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
