"""From a model that was found to a backbone that answers."""

from __future__ import annotations

from typing import Any

from mmedit_cli import registry, runtime
from mmedit_cli.backbones.base import VisionLanguageModel
from mmedit_cli.catalog import ModelRef, find_model, weight_files
from mmedit_cli.errors import ModelError


def load_backbone(
    model: str | ModelRef,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
) -> VisionLanguageModel:
    """Return the backbone for a name of the catalogue, a local folder or a hub id.

    `device_map` is passed on to transformers and wins over `device`. Raises ModelError if the files cannot be used.
    """
    from mmedit_cli.backbones import _tiny

    ref = find_model(model, revision=revision) if isinstance(model, str) else model
    runtime.quiet_libraries()
    target = runtime.resolve_device(device)
    number = runtime.resolve_dtype(dtype, target)
    check_answers(ref)
    family = registry.backbones.get(ref.family)
    if ref.folder is None:
        module, tokenizer, processor = _tiny.build(ref.name)
        module.to(target, None if isinstance(number, str) else number)
    else:
        module = _from_folder(ref, number, device_map)
        if device_map is None:
            module.to(target)
        tokenizer, processor = _processors(ref)
    return family(ref.name, module, tokenizer, processor, ref.fingerprint)  # type: ignore[no-any-return]


def check_answers(ref: ModelRef) -> None:
    """Raise ModelError for a model that answers nothing."""
    if not issubclass(registry.backbones.get(ref.family), VisionLanguageModel):
        raise ModelError(f"{ref.name}: draws pictures ({ref.family}), it answers nothing", "draw: mmedit generate")


def _from_folder(ref: ModelRef, dtype: Any, device_map: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    assert ref.folder is not None
    weight_files(ref.folder)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            ref.folder,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{ref.folder}: cannot be loaded: {_first_line(error)}", "is the folder complete?") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{ref.folder}: {len(missing)} tensors are missing, {missing[0]} first", "copy it again")
    return model


def _processors(ref: ModelRef) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(ref.folder, local_files_only=True)
        return tokenizer, AutoImageProcessor.from_pretrained(ref.folder, local_files_only=True, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{ref.folder}: no usable tokenizer or image processor: {_first_line(error)}", "copy their files there too"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
