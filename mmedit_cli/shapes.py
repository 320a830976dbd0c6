"""The shape of a model as its config says it, and the hyper-parameters that were found for models of that shape.

The name of a folder says nothing: the same files may lie in `llava-1.5-7b` and in `llava-1.5-7b-hf`. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmedit_cli import registry
from mmedit_cli.catalog import ModelRef
from mmedit_cli.errors import HparamsError, ModelError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.model_folder import INDEX, config_file, read_object
from mmedit_cli.reading import read_yaml

T = TypeVar("T")


class Shape(NamedTuple):
    """The kind of a model (`model_type`, or the class of a pipeline), how many layers it has, and how wide it is.

    Of a text-to-image pipeline the depth counts the levels of its denoiser, and the width is that of a text encoding.
    """

    kind: str
    depth: int
    width: int


SHAPES = {  # of the models that hparams/*.yaml has variants for
    "blip2-opt-2.7b": Shape("blip-2", 32, 2560),
    "llava-1.5-7b": Shape("llava", 32, 4096),
    "minigpt4-7b": Shape("minigpt4", 32, 4096),
    "mini-blip2": Shape("blip-2", 6, 192),
    "mini-llava": Shape("llava", 6, 192),
    "mini-smol": Shape("llava", 30, 576),
    "smollm2-135m": Shape("llama", 30, 576),
    "mini-sd": Shape("StableDiffusionPipeline", 2, 128),
    "tiny-blip2": Shape("blip-2", 6, 48),
    "tiny-blip2-t5": Shape("blip-2", 4, 48),
    "tiny-llava": Shape("llava", 6, 48),
    "tiny-minigpt4": Shape("minigpt4", 6, 48),
    "tiny-qwen2-vl": Shape("qwen2_vl", 6, 48),
    "tiny-qwen2.5-vl": Shape("qwen2_5_vl", 6, 48),
    "tiny-qwen3-vl": Shape("qwen3_vl", 6, 48),
    "tiny-llama-lm": Shape("llama", 6, 48),
    "tiny-qwen2-lm": Shape("qwen2", 6, 48),
    "tiny-opt-lm": Shape("opt", 6, 48),
    "tiny-gpt2-lm": Shape("gpt2", 6, 48),
    "tiny-idefics3": Shape("idefics3", 6, 48),
    "tiny-gemma3": Shape("gemma3", 6, 48),
    "tiny-paligemma": Shape("paligemma", 6, 48),
    "tiny-onevision": Shape("llava_onevision", 6, 48),
    "tiny-internvl": Shape("internvl", 6, 48),
    "tiny-qwen3.5": Shape("qwen3_5", 6, 48),
    "tiny-sd": Shape("StableDiffusionPipeline", 2, 32),
    "tiny-sdxl": Shape("StableDiffusionXLPipeline", 2, 32),
    "tiny-sd3": Shape("StableDiffusion3Pipeline", 2, 32),
    "tiny-flux": Shape("FluxPipeline", 1, 32),
}


def shape_of(ref: ModelRef) -> Shape | None:
    """Return the shape of a model that was found, None where its config does not say it; raise ModelError."""
    if ref.folder is None:
        return SHAPES.get(ref.name)
    path = config_file(ref.folder)
    assert path is not None, "a model that was found has a config"
    config = read_object(path)
    if path.name == INDEX and "transformer" in config:
        flow = read_object(ref.folder / "transformer" / "config.json")
        kind = config.get("_class_name")
        return _shape(kind, flow.get("num_layers"), flow.get("joint_attention_dim"))
    if path.name == INDEX:
        unet = read_object(ref.folder / "unet" / "config.json")
        levels = unet.get("block_out_channels")
        depth = len(levels) if isinstance(levels, list) else None
        return _shape(config.get("_class_name"), depth, unet.get("cross_attention_dim"))
    text = config.get("text_config", config)  # some are flat
    if not isinstance(text, Mapping):
        raise ModelError(
            f"{path}: text_config is not an object with keys", "copy it again"
        )
    depth, width = (_value(text, key) for key in ("num_hidden_layers", "hidden_size"))
    return _shape(config.get("model_type"), depth, width)


def shape_of_config(config: Any) -> Shape | None:
    """Return the shape that a config of transformers says."""
    text = config.get_text_config()
    return _shape(config.model_type, text.num_hidden_layers, text.hidden_size)


def pick_variant(file: Path, shape: Shape | None, name: str) -> str | None:
    """Return which variant of a file of hyper-parameters is for a model, None for the values above all of them.

    One that bears the name of a model whose shape is known is for that shape. Any other is the user's own and is for
    the model that was named so.
    """
    names = _variants(file)
    for variant in names:
        if variant in SHAPES and SHAPES[variant] == shape:
            return variant
    return name if name in names and name not in SHAPES else None


def hparams_for(
    editor: str,
    cls: type[T],
    ref: ModelRef,
    file: Path | None = None,
    **over: Any,
) -> tuple[T, str | None]:
    """Return the hyper-parameters of a method for a model, and the variant of the file that they are of.

    They are those of `file`, else of hparams/EDITOR.yaml. `over` goes to `load_hparams`, whose errors it raises.
    """
    found = file or registry.hparams_file(editor)
    shape = shape_of(ref)
    variant = pick_variant(found, shape, ref.name)
    return load_hparams(found, cls, variant=variant, **over), variant


def told(editor: str, variant: str | None) -> str:
    """Return a line that says which variant of an editor's hyper-parameters was taken."""
    return f"hyper-parameters of {editor}: " + (
        f"variant {variant}" if variant else "no variant for this model"
    )


def _variants(file: Path) -> list[str]:
    """Return the names of the variants in a file; whatever is wrong with it is said when it is read as a whole."""
    with suppress(HparamsError):
        content = read_yaml(file, error=HparamsError)
        variants = content.get("variants") if isinstance(content, dict) else None
        return list(variants) if isinstance(variants, dict) else []
    return []


def _value(text: Mapping[str, Any], key: str) -> Any:
    """Return a value of a language model's config; what is not written there is the default of its kind."""
    if key in text:
        return text[key]
    from transformers import CONFIG_MAPPING

    kind = text.get("model_type")
    if kind is None or kind not in CONFIG_MAPPING:
        return None
    default = CONFIG_MAPPING[kind]()
    # GPT-2 calls its depth n_layer
    own_name = default.attribute_map.get(key, key)
    return text.get(own_name, getattr(default, key, None))


def _shape(kind: Any, depth: Any, width: Any) -> Shape | None:
    fits = isinstance(kind, str) and isinstance(depth, int) and isinstance(width, int)
    return Shape(kind, depth, width) if fits else None
