"""From a model that was found to a backbone that answers."""

from __future__ import annotations

import hashlib
import json
from copy import copy
from pathlib import Path
from typing import Any

import torch

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, family_for, find_model, kind_of
from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.wide_products import widen
from mmedit_cli.model_folder import loading, read_config, weight_files
from mmedit_cli.reading import read_json_object
from mmedit_cli.shapes import shape_of, shape_of_config
from mmedit_cli.vocabulary import check_vocabulary


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
    ref = find_model(model, revision=revision) if isinstance(model, str) else model
    runtime.quiet_libraries()
    target = runtime.resolve_device(device)
    number = runtime.resolve_dtype(dtype, target)
    check_answers(ref)
    backbone = _opened(ref, target, number, device_map)
    if backbone.checked:
        from mmedit_cli.knowledge.models.shared.self_check import require_sound

        require_sound(backbone)
    return backbone


def open_unchecked(ref: ModelRef) -> VisionLanguageModel:
    """Return the backbone for a model that was found, without asking whether it is understood; raise ModelError."""
    runtime.quiet_libraries()
    check_answers(ref)
    device = runtime.resolve_device("auto")
    return _opened(ref, device, runtime.resolve_dtype("auto", device), None)


def _opened(
    ref: ModelRef, target: Any, number: Any, device_map: Any
) -> VisionLanguageModel:
    family = registry.backbones.get(ref.family)
    if ref.folder is None:
        module, tokenizer, processor = family.build_tiny(ref.name)
        module.to(target, None if isinstance(number, str) else number)
    else:
        module = _from_folder(ref, family.auto_class, number, device_map)
        if device_map is None:
            module.to(target)
        tokenizer = _tokenizer(ref.folder)
        processor = _image_processor(ref.folder) if family.sees else None
        if family.whole_processor:
            processor = _whole_processor(ref.folder, module, tokenizer, processor)
        check_vocabulary(
            tokenizer, module.get_input_embeddings().weight.shape[0], ref.folder
        )
    widen(module)
    backbone: VisionLanguageModel = family(
        ref.name, module, tokenizer, processor, ref.fingerprint
    )
    backbone.former = ref.former
    return backbone


def wrapped(model: Any, processor: Any, same_as: str | None) -> VisionLanguageModel:
    """Return the backbone for a model of transformers that is loaded, and its processor; see `load_backbone`."""
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ModelError(
            f"a {kind} is no model of transformers that generates",
            "load it with AutoModelForImageTextToText or AutoModelForCausalLM",
        )
    name = Path(str(model.name_or_path or "")).name or kind
    sees = getattr(model.config, "vision_config", None) is not None
    called = kind_of(model.config.to_dict())
    found = family_for(called, [kind], name, sees=sees)
    family = registry.backbones.get(found)
    tokenizer, images = _parts_of(processor, name, sees=family.sees)
    if family.whole_processor:
        images = processor
    embedding: Any = model.get_input_embeddings()
    check_vocabulary(tokenizer, len(embedding.weight), name)
    if same_as is None:
        ref = ModelRef(name, family.family, None, _digest(model))
    else:
        ref = find_model(same_as)
        _check_shape(ref, model.config)
    backbone: VisionLanguageModel = family(
        ref.name, model, tokenizer, images, ref.fingerprint
    )
    backbone.former = ref.former
    if family.checked:
        from mmedit_cli.knowledge.models.shared.self_check import require_sound

        require_sound(backbone)
    return backbone


def _parts_of(processor: Any, name: str, *, sees: bool) -> tuple[Any, Any]:
    """Return (tokenizer, image processor) of a processor; raise ModelError without one that is needed."""
    tokenizer = getattr(processor, "tokenizer", processor)
    images = getattr(processor, "image_processor", None)
    wanted = "processor (AutoProcessor)" if sees else "tokenizer (AutoTokenizer)"
    if not callable(tokenizer) or (sees and images is None):
        raise ModelError(
            f"{name}: a model that is loaded needs its {wanted}",
            "load_backbone(model, processor)",
        )
    template = getattr(processor, "chat_template", None)
    if template and not tokenizer.chat_template:
        # the processor goes on as it was
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer, images


def _digest(model: Any) -> str:
    """Return what stands for a model in memory: a digest of its config and of every weight it would save."""
    config = model.config.to_dict()
    for key in _NOT_THE_MODEL:
        config.pop(key, None)
    text = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    for name, weight in sorted(model.state_dict().items()):
        if weight.is_meta:
            raise ModelError(
                f"{name} is not in memory", "same_as says which model it is"
            )
        digest.update(f"{name}:{weight.dtype}:{tuple(weight.shape)};".encode())
        flat = weight.detach().cpu().contiguous().reshape(-1)
        values = flat.view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()[:32]


def _check_shape(ref: ModelRef, config: Any) -> None:
    """Raise ModelError unless a config is of a model with the depth and width of the one that was found."""
    if shape_of(ref) != shape_of_config(config):
        raise ModelError(f"same_as={ref.name}: the model is of another shape")


def check_answers(ref: ModelRef) -> None:
    """Raise ModelError for a model that draws pictures and answers no questions."""
    if ref.family in registry.drawing_models.names():
        raise ModelError(
            f"{ref.name}: draws pictures ({ref.family}), it answers nothing",
            "draw: mmedit generate",
        )


def _from_folder(ref: ModelRef, auto_class: str, dtype: Any, device_map: Any) -> Any:
    import transformers

    auto = getattr(transformers, auto_class)
    assert ref.folder is not None
    weight_files(ref.folder)
    _check_sections(ref.folder)
    with loading(ref.folder):
        # with `output_loading_info` it returns a pair, which its annotation does not say
        loaded: Any = auto.from_pretrained(
            ref.folder,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{ref.folder}: {len(missing)} tensors are missing, {missing[0]} first",
            "copy it again",
        )
    return model


def _check_sections(folder: Path) -> None:
    """Raise ModelError for a part of the config that is null: transformers would build its default, a model of 7B."""
    sections = ("text_config", "vision_config", "qformer_config")
    for key, value in read_config(folder).items():
        if key in sections and not isinstance(value, dict):
            raise ModelError(
                f"{folder / 'config.json'}: {key} is not an object with keys",
                "copy it again",
            )


_HINT = "copy its files there too"
# of a config in memory: where it was loaded from, and by what
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with loading(folder, problem="no usable tokenizer", hint=_HINT):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # a null in its config fails here and not in the middle of a run
        tokenizer("What is this?")
    if not tokenizer.chat_template:
        tokenizer.chat_template = _chat_template(folder)
    return tokenizer


def _image_processor(folder: Path) -> Any:
    from PIL import Image
    from transformers import AutoImageProcessor

    with loading(folder, problem="no usable image processor", hint=_HINT):
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
        # as above
        processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    return processor


def _whole_processor(folder: Path, model: Any, tokenizer: Any, images: Any) -> Any:
    """Return the processor of a model, made of its parts, and of what its files say beside them."""
    from mmedit_cli.knowledge.models.shared.processors import (
        make_processor,
        processor_settings,
    )

    settings = processor_settings(folder)
    with loading(folder, problem="no usable processor", hint=_HINT):
        return make_processor(model.config, images, tokenizer, settings)


def _chat_template(folder: Path) -> str | None:
    """Return the chat template that is kept for the processor, which some models have alone; None without one."""
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_json_object(
                folder / name, error=ModelError, hint="copy it again"
            )
            if content.values.get("chat_template"):
                return content.text("chat_template")
    return None
