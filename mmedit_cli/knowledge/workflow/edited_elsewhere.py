"""A model that was edited elsewhere, as an editor whose first edit puts the other weights onto the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mmedit_cli.catalog import ModelRef, find_model
from mmedit_cli.errors import ModelError, UserError
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.loading import check_answers, load_backbone
from mmedit_cli.patch import Patch, bring_in
from mmedit_cli.types import Query

# of a config, what says where a model is from and how it is loaded
_NOT_THE_MODEL = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_ANOTHER_MODEL = "--model must name the model that was edited"


@dataclass(frozen=True)
class NoHparams:
    """How the edits were made is not known here."""


class EditedElsewhere(Editor):
    """Puts the weights in which another model differs onto the base, whatever is requested; the first edit does.

    `load_weights` comes first. State holds no weights: they are in the folder that they were read from.
    """

    name = "edited elsewhere"
    Hparams = NoHparams
    plain = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patch = Patch(self.backbone.model)
        self._weights: dict[str, Tensor] = {}
        paths = {}
        for path, module in self.backbone.model.named_modules():
            paths[module] = path
        self._paths = [paths[layer] for layer in self.backbone.layers]

    def load_weights(self, ref: ModelRef) -> int:
        """Read the other model and return how many of its weights differ from the base's.

        Raises ModelError for a model that is not the base with other weights.
        """
        self._weights = _other_weights(self.backbone, ref)
        return len(self._weights)

    @property
    def first_layer(self) -> int | None:
        """The lowest decoder layer with another weight; None if one lies below all of them."""
        lowest = self.backbone.n_layers - 1
        for name in self._weights:
            layer = self._layer_of(name)
            if layer is None:
                return None
            lowest = min(lowest, layer)
        return lowest

    def _layer_of(self, name: str) -> int | None:
        """Return the decoder layer that a weight belongs to, the last one for what comes behind all of them."""
        for layer, path in enumerate(self._paths):
            if name.startswith(f"{path}."):
                return layer
        behind = tuple(f"{path}." for path in self.backbone.anchors.tail)
        return self.backbone.n_layers - 1 if name.startswith(behind) else None

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        if not self.operations:
            self._put()
        return {}

    def _put(self) -> None:
        for name, weight in self._weights.items():
            self._patch.set_(name, weight)

    def _reset(self) -> None:
        self._patch.undo()

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if requests:
            self._put()


def find_edited(folder: Path, base: ModelRef) -> ModelRef:
    """Return the model in a folder, looked at but not loaded; raise UserError unless it is of the base's family."""
    if not folder.is_dir():
        raise UserError(f"--edited {folder}: no such folder", "name a model folder")
    # as a path of its own, it is never taken for a known name
    found = find_model(str(folder.resolve()))
    check_answers(found)
    if found.family != base.family:
        raise UserError(
            f"--edited {folder}: a model of the family {found.family}, {base.name} is of {base.family}",
            _ANOTHER_MODEL,
        )
    return found


def _other_weights(base: VisionLanguageModel, ref: ModelRef) -> dict[str, Tensor]:
    """Return by name, on the CPU, each weight of the other model that differs from the base's."""
    number = str(base.dtype).removeprefix("torch.")
    other = load_backbone(ref, device="cpu", dtype=number)
    _check_alike(base, other, ref)
    theirs = dict(other.model.named_parameters())
    different = {}
    for name, _ in list(base.model.named_parameters()):
        module, _, _ = name.rpartition(".")
        bring_in(base.model, module)
        ours = base.model.get_parameter(name)
        weight = theirs[name].detach()
        if not torch.equal(ours.detach().cpu(), weight):
            different[name] = weight
    return different


def _check_alike(
    base: VisionLanguageModel, other: VisionLanguageModel, ref: ModelRef
) -> None:
    """Raise ModelError unless two models differ in nothing but the values of their weights."""
    place = f"--edited {ref.folder}"
    if base.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ModelError(
            f"{place}: its tokenizer has another vocabulary than that of {base.name}",
            _ANOTHER_MODEL,
        )
    unlike = set(_settings(base)) ^ set(_settings(other))
    if unlike:
        named = ", ".join(sorted({key for key, _ in unlike}))
        raise ModelError(
            f"{place}: config.json is not that of {base.name}: {named}", _ANOTHER_MODEL
        )


def _settings(backbone: VisionLanguageModel) -> list[tuple[str, str]]:
    """Return the config of a model as (key, value), keys of its sections with dots."""
    return list(_flat("", backbone.model.config.to_dict()))


def _flat(prefix: str, section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if key in _NOT_THE_MODEL:
            continue
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            plain = list(value) if isinstance(value, tuple) else value
            yield f"{prefix}{key}", repr(plain)
