"""The common part of the files that exported edits run on: loading, reading questions, and the time of routing.

A question is routed when it is first read, by its picture and its words (what follows the picture). Every generated
token is routed as its question was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.hub import cached_file

from mmedit_cli.patch import Patch

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass(frozen=True)
class Question:
    """What enters the language model: token ids and 0 for padding (B, T), embeddings (B, T, E).

    image, prompt: (B, T) bool, where the picture is, and what follows it.
    """

    ids: Tensor
    mask: Tensor
    embeds: Tensor
    image: Tensor
    prompt: Tensor


class RoutedEdits:
    """The edits on one model; `weights` says after a forward pass which took part: one dict a row, by id.

    A method overrides `choose`, which routes what enters the module `entered`, and `change`, which changes it. It may
    add hooks of its own with `patch`.
    """

    def __init__(
        self, model: Any, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.tensors = dict(tensors)
        self.settings: Any = SimpleNamespace(**settings)
        self.ids: list[int] = self.tensors.pop("ids").tolist()
        self.weights: list[dict[int, float]] = []
        self.route: Any = None
        self.patch = Patch(model)
        self._device = torch.device("cpu")
        self._reading: Tensor | None = None  # the token ids that were embedded last
        # ids, mask and embeddings of a question that is not routed yet
        self._question: tuple[Tensor, Tensor, Tensor] | None = None
        self._aside = False
        self._generating = False
        self._begun = False
        for module in model.modules():
            # the model, and in BLIP-2 the language model inside
            if isinstance(module, GenerationMixin):
                module.generate = self._generate_with(module.generate)
        model.get_input_embeddings().register_forward_pre_hook(self._embed)
        stack = model.get_submodule(self.settings.stack)
        stack.register_forward_pre_hook(
            self._begin,
            with_kwargs=True,
        )
        self.patch.hook_input(self.settings.entered, self._enter)

    # -- what a method has to say -------------------------------------------------------------------------------

    def to(self, device: torch.device) -> None:
        """Move everything to where the model computes."""
        self.tensors = {
            name: tensor.to(device) for name, tensor in self.tensors.items()
        }

    def choose(self, hidden: Tensor, question: Question) -> Any:
        """Return the route of questions that enter the module, (B, T, D), and set `weights`."""
        raise NotImplementedError

    def change(self, hidden: Tensor) -> Tensor | None:
        """Return the changed hidden states under the present route; None leaves them as they are."""
        return None

    # -- when it is routed --------------------------------------------------------------------------------------

    def _generate_with(self, generate: Any) -> Any:
        @wraps(generate)
        def generating(*args: Any, **kwargs: Any) -> Any:
            if self._generating:
                return generate(*args, **kwargs)
            self._generating = True
            self._begun = False
            try:
                return generate(*args, **kwargs)
            finally:
                self._generating = False

        return generating

    def _embed(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._reading = args[0]

    def _begin(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._aside or self._goes_on(kwargs):
            return
        embeds = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        if embeds is None:  # a language model that is asked past the model around it
            embeds = self.model.get_input_embeddings()(kwargs["input_ids"])
        ids = self._reading
        if ids is None or ids.shape[1] != embeds.shape[1]:
            raise ValueError(
                "the edits are found by the tokens of the question: give input_ids, not inputs_embeds"
            )
        if mask is None:
            mask = torch.ones_like(ids)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(
                "the edits need an attention_mask of shape (batch, tokens)"
            )
        self._question = (ids, mask, embeds)
        self._reading = None
        self.route = None
        self._begun = True

    def _goes_on(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether the input continues a question that has been read, as a part of the answer."""
        # the name before transformers 5.24 was past_key_values
        past = kwargs.get("cache") or kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            return True
        # without a cache the whole question is read again for each token
        return self._generating and self._begun

    def _enter(self, hidden: Tensor) -> Tensor | None:
        if self._aside:
            return None
        if self._question is not None:
            if self._device != hidden.device:
                self._device = hidden.device
                self.to(hidden.device)
            self._aside = True  # what is read to route a question is not routed
            try:
                with torch.no_grad():
                    self.route = self.choose(hidden, self._read(hidden))
            finally:
                self._aside, self._question = False, None
        return self.change(hidden)

    def _read(self, hidden: Tensor) -> Question:
        """Return the question that enters, a row for each of hidden (B, T, D)."""
        assert self._question is not None
        ids, mask, embeds = (_beams(x, hidden) for x in self._question)
        mask = mask.bool()
        image = ids == self.settings.image_token_id
        images_to_come = image.flip(1).cumsum(1).flip(1)
        behind = images_to_come == 0
        # tokens that part the rows or tiles of a picture belong to it
        image = (image.cumsum(1) > 0) & ~behind
        return Question(
            ids=ids,
            mask=mask,
            embeds=embeds,
            image=image,
            prompt=behind & mask,
        )


def _beams(rows: Tensor, hidden: Tensor) -> Tensor:
    """Return a row for each of hidden (B, T, D): beams are rows of the same question."""
    beams = len(hidden) // len(rows)
    rows = rows.to(hidden.device)
    return rows.repeat_interleave(beams, 0)


class Loader(PreTrainedModel):
    """Loads the base model and puts the edits on it; there are no instances."""

    edits_class: type[RoutedEdits]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # returns the base model, not an instance
        cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Return the base model of a folder or hub repository with its edits on it; arguments as for the base."""
        for name in ("adapter_kwargs", "code_revision"):
            kwargs.pop(name, None)
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        # a base may have code that comes with the export
        trusted = kwargs.pop("trust_remote_code", False)
        path = cached_file(folder, "edits.safetensors", **hub)
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            settings = json.loads(file.metadata()["settings"])
        auto = getattr(transformers, settings["auto_class"])
        model: Any = auto.from_pretrained(
            folder,
            *args,
            subfolder="base",
            trust_remote_code=trusted,
            **kwargs,
        )
        model.edits = cls.edits_class(model, tensors, settings)
        return model
