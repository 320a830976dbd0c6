"""LoRA files of others on a text-to-image model: those of kohya, of peft and of diffusers, old and new.

A LoRA adds `weight * alpha / rank * B A` to the matrices of linear layers and convolutions (Hu et al. 2022). The
formats differ in how they name a layer and its factors, and in where they say alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmedit_cli.errors import DataError
from mmedit_cli.patch import Patch
from mmedit_cli.reading import parse_json_object, read_json_object
from mmedit_cli.storage import read_tensors

_IN_FOLDER = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_CONFIG = "adapter_config.json"  # of peft, beside its file
_METADATA = "lora_adapter_metadata"  # of diffusers, in the file
_PEFT = "base_model.model."
# what stands behind the name of a layer, and which factor it is
_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_ENDINGS = {
    ".lora_A.weight": _DOWN,
    ".lora_B.weight": _UP,
    ".lora_A.default.weight": _DOWN,
    ".lora_B.default.weight": _UP,
    ".lora_down.weight": _DOWN,
    ".lora_up.weight": _UP,
    ".lora.down.weight": _DOWN,
    ".lora.up.weight": _UP,
    "_lora.down.weight": _DOWN,
    "_lora.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
    ".alpha": _ALPHA,
}
_OTHER_KINDS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoCon in Tucker form",
    ".diff": "whole differences of weights",
}
_HINT = "files of LoRA in the formats of kohya, peft and diffusers are read"


class DrawingModel(Protocol):
    """What is needed of a text-to-image model: its name, and its parts by name."""

    name: str
    model: nn.ModuleDict


@dataclass
class _Factors:
    """The factors of one layer as a file has them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None


def lora_file(path: Path) -> Path:
    """Return the file of a LoRA that is named by its file or folder; raise DataError where there is none."""
    if path.is_dir():
        for name in _IN_FOLDER:
            if (path / name).is_file():
                return path / name
        raise DataError(f"{path}: no LoRA in it ({', '.join(_IN_FOLDER)})", _HINT)
    if not path.is_file():
        raise DataError(f"--lora {path}: no such file")
    if path.suffix != ".safetensors":
        raise DataError(
            f"{path}: not a .safetensors file, and others are not opened: they may run code",
            "save it as .safetensors",
        )
    return path


def split_weight(text: str) -> tuple[Path, float]:
    """Return the file and the weight of FILE[:WEIGHT], 1 without it; raise DataError for what is no number."""
    name, mark, weight = text.rpartition(":")
    if not mark or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(name), float(weight)
    except ValueError as error:
        if "/" in weight or "\\" in weight:  # a drive of Windows
            return Path(text), 1.0
        raise DataError(
            f"--lora {text}: {weight!r} is no number",
            "e.g. --lora style.safetensors:0.8",
        ) from error


def read_lora(path: Path, model: DrawingModel) -> dict[str, Tensor]:
    """Return what a LoRA adds to each weight of a model, by the path of the weight, in float32.

    Raises DataError for a file of another kind, StateError for one that is damaged.
    """
    found: dict[str, Tensor] = {}
    for place, (down, up) in read_factors(path, model).items():
        weight = f"{place}.weight"
        shape = model.model.get_parameter(weight).shape
        product = up.flatten(1) @ down.flatten(1)
        found[weight] = product.reshape(shape)
    return found


def read_factors(path: Path, model: DrawingModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors A (r, in, ...) and B (out, r, ...) of a LoRA by the path of their layer, in float32.

    Those of a convolution have its kernel; B holds the scale. Raises what `read_lora` does.
    """
    file = lora_file(path)
    tensors, facts = read_tensors(file)
    alphas = _alphas_of(file, facts)
    layers = _by_layer(file, tensors)
    paths = _paths_by_name(model)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, factors in layers.items():
        place = _place_of(name, paths)
        if place is None:
            raise DataError(
                f"{file}: {name}: no such layer in {model.name}",
                "it was made for a model of another kind, or changes a part that is not read here",
            )
        parameter = model.model.get_parameter(f"{place}.weight")
        alpha = factors.alpha
        if alpha is None:
            alpha = alphas.of(name)
        found[place] = _fitting(
            f"{file}: {name}",
            factors,
            alphas,
            alpha,
            parameter.shape,
        )
    return found


def put(patch: Patch, many: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
    """Add several LoRAs, each with its weight, to the weights of a model; each weight is rounded once."""
    total: dict[str, Tensor] = {}
    for changes, weight in many:
        for path, change in changes.items():
            scaled = weight * change
            total[path] = total[path] + scaled if path in total else scaled
    for path, change in total.items():
        parameter = patch.parameter(path)
        changed = parameter.detach().float() + change.to(parameter.device)
        patch.set_(path, changed.to(parameter.dtype))


# -- what a file says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Alphas:
    """Alphas that stand beside the tensors: by part of the model, by pattern of a layer's name."""

    by_part: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def of(self, name: str) -> float | None:
        """Return the alpha of a layer, None where nothing says it: then it is the rank."""
        for pattern, alpha in self.patterns.items():
            if name.endswith(pattern):
                return alpha
        part, _, _ = name.partition(".")
        return self.by_part.get(part, self.by_part.get(""))

    def scale(self, alpha: float | None, rank: int) -> float:
        """Return what the product of the factors is multiplied by."""
        if alpha is None:
            return 1.0
        divisor = rank**0.5 if self.rank_stabilized else rank
        return alpha / divisor


def _alphas_of(file: Path, facts: Mapping[str, str]) -> _Alphas:
    """Return what the metadata of diffusers, or the config of peft, say of alpha."""
    if _METADATA in facts:
        said = parse_json_object(facts[_METADATA], f"{file}: {_METADATA}").values
        by_part: dict[str, float] = {}
        patterns: dict[str, float] = {}
        for key, value in said.items():
            part, _, name = key.partition(".")
            if name == "lora_alpha":
                by_part[part] = float(value)
            elif name == "alpha_pattern" and isinstance(value, dict):
                patterns |= value
        return _Alphas(by_part, patterns)
    config = file.parent / _CONFIG
    if not config.is_file():
        return _Alphas()
    record = read_json_object(config)
    if record.values.get("use_dora"):
        raise DataError(f"{config}: a DoRA, which is not read here", _HINT)
    return _Alphas(
        {"": record.number("lora_alpha", 8)},
        dict(record.mapping("alpha_pattern", {})),
        bool(record.values.get("use_rslora")),
    )


def _by_layer(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, _Factors]:
    """Return the factors by the name that the file gives their layer; raise DataError for what is no LoRA."""
    layers: dict[str, _Factors] = {}
    for key, tensor in tensors.items():
        for part, kind in _OTHER_KINDS.items():
            if part in key:
                raise DataError(
                    f"{file}: {kind} ({key}), which is not read here",
                    _HINT,
                )
        ending = next((end for end in _ENDINGS if key.endswith(end)), None)
        if ending is None:
            raise DataError(
                f"{file}: {key}: not the name of a tensor of a LoRA",
                _HINT,
            )
        whole = key.removesuffix(ending)
        name = whole.removeprefix(_PEFT)
        factors = layers.setdefault(name, _Factors())
        role = _ENDINGS[ending]
        if role == _ALPHA:
            factors.alpha = float(tensor)
        else:
            factors.tensors[role] = tensor
    if not layers:
        raise DataError(f"{file}: no tensors in it", _HINT)
    return layers


def _fitting(
    place: str,
    factors: _Factors,
    alphas: _Alphas,
    alpha: float | None,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the factors of a layer's weight of a shape, scaled; raise DataError unless they fit it."""
    missing = [role for role in (_DOWN, _UP) if role not in factors.tensors]
    if missing:
        raise DataError(f"{place}: its factor {missing[0]} is missing", _HINT)
    # a convolution is a matrix of all that a pixel reads
    down = factors.tensors[_DOWN].float().flatten(1)
    up = factors.tensors[_UP].float().flatten(1)
    rank = len(down)
    width = torch.Size(shape).numel() // shape[0]
    if down.shape[1] != width or up.shape != (shape[0], rank):
        sizes = " and ".join(str(tuple(part.shape)) for part in (down, up))
        raise DataError(
            f"{place}: factors of {sizes} do not fit a weight of {tuple(shape)}",
            "it was made for a model of another size",
        )
    scaled = alphas.scale(alpha, rank) * up
    if not (scaled @ down).isfinite().all():
        raise DataError(
            f"{place}: has numbers that are not finite", "copy the file again"
        )
    kernel = shape[2:]
    single = [1] * len(kernel)
    return (
        down.reshape(rank, shape[1], *kernel),
        scaled.reshape(shape[0], rank, *single),
    )


# -- names of layers ------------------------------------------------------------------------------------------------


def _place_of(name: str, paths: Mapping[str, str]) -> str | None:
    """Return the path of the layer of a name, None if there is none."""
    plain = name.replace(".processor", "")
    for candidate in (name, plain, f"{plain}.0"):
        if candidate in paths:
            return paths[candidate]
    return None


def _paths_by_name(model: DrawingModel) -> dict[str, str]:
    """Return the paths of all layers that a LoRA may change, by every name that a format gives them."""
    found: dict[str, str] = {}
    for path, module in model.model.named_modules():
        part, _, inside = path.partition(".")
        layer = isinstance(module, (nn.Linear, nn.Conv2d))
        if not layer or part == "vae":
            continue
        for name in _names(model, part, inside):
            found.setdefault(name, path)
    return found


def _names(model: DrawingModel, part: str, inside: str) -> Iterator[str]:
    """Yield the names of a layer inside a part of a model: those with dots, and those of kohya."""
    if part == "unet":
        yield from (f"unet.{inside}", inside)
        yield _kohya("lora_unet", inside)
        per_block = int(_config(model, "unet").layers_per_block)
        if ".attentions." in inside:
            ldm = ldm_key(inside, per_block).removeprefix(f"{_LDM}.")
            yield _kohya("lora_unet", ldm)
        return
    if (
        part == "transformer"
    ):  # of Stable Diffusion 3.x and FLUX, by the names of diffusers
        yield from (f"transformer.{inside}", inside)
        return
    below = inside.removeprefix("text_model.")
    several = "text_encoder_2" in model.model
    number = "2" if part.endswith("_2") else "1" if several else ""
    for name in (below, f"text_model.{below}"):
        yield from (f"{part}.{name}", name)
        yield _kohya(f"lora_te{number}", name)


def _kohya(start: str, path: str) -> str:
    return f"{start}_{path.replace('.', '_')}"


def _config(model: DrawingModel, part: str) -> Any:
    module: Any = model.model[part]
    return module.config


_LDM = "model.diffusion_model"


def ldm_key(path: str, per_block: int) -> str:
    """Return how a checkpoint of one file names something in an attention of a UNet of diffusers.

    `per_block` is `layers_per_block` of the UNet: a block down has so many layers and one that halves the size, a
    block up has one layer more. Raises ValueError for what lies elsewhere.
    """
    middle = re.fullmatch(r"mid_block\.attentions\.(\d+)\.(.+)", path)
    if middle:
        return f"{_LDM}.middle_block.{2 * int(middle[1]) + 1}.{middle[2]}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", path)
    if found is None:
        raise ValueError(f"{path}: not in an attention of a UNet")
    place = (per_block + 1) * int(found[2]) + int(found[3])
    if found[1] == "down":
        return f"{_LDM}.input_blocks.{place + 1}.1.{found[4]}"
    return f"{_LDM}.output_blocks.{place}.1.{found[4]}"
