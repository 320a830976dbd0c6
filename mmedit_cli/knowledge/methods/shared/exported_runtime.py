"""What the files have in common that exported edits run on: loading, reading questions, and when they are routed.

A question is routed when it is read first, by its picture and its words (what follows the picture), and every token
that is generated goes where its question went.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.utils import cached_file

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

    A method says how what enters the module `entered` is routed (`choose`), what it changes there (`change`), and
    hooks whatever else it needs with `patch`.
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
        self._question: tuple[Tensor, Tensor, Tensor] | None = (
            None  # ids, mask and embeddings, not routed yet
        )
        self._aside = self._generating = self._begun = False
        for module in model.modules():
            if isinstance(
                module, GenerationMixin
            ):  # the model, and in BLIP-2 the language model inside
                module.generate = self._generate_with(module.generate)  # type: ignore[method-assign]
        model.get_input_embeddings().register_forward_pre_hook(self._embed)
        model.get_submodule(self.settings.stack).register_forward_pre_hook(
            self._begin, with_kwargs=True
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
        """Return what goes on from here under the present route; None: as it came."""
        return None

    # -- when it is routed --------------------------------------------------------------------------------------

    def _generate_with(self, generate: Any) -> Any:
        @wraps(generate)
        def generating(*args: Any, **kwargs: Any) -> Any:
            if self._generating:
                return generate(*args, **kwargs)
            self._generating, self._begun = True, False
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
        past = kwargs.get("cache") or kwargs.get(
            "past_key_values"
        )  # the name before transformers 5.24
        # a part of an answer; without a cache the question is read again before each
        follows = (past is not None and past.get_seq_length() > 0) or (
            self._generating and self._begun
        )
        if self._aside or follows:
            return
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
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
        self._question, self.route, self._reading, self._begun = (
            (ids, mask, embeds),
            None,
            None,
            True,
        )

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
        ids, mask, embeds = (  # beams are rows of the same question
            x.to(hidden.device).repeat_interleave(len(hidden) // len(x), 0)
            for x in self._question
        )
        image = ids == self.settings.image_token_id
        behind = image.flip(1).cumsum(1).flip(1) == 0
        return Question(ids, mask.bool(), embeds, image, behind & mask.bool())


class Loader(PreTrainedModel):
    """Loads the base model and puts the edits on it; there are no instances."""

    edits_class: type[RoutedEdits]

    @classmethod
    def from_pretrained(
        cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Return the base model of a folder or hub repository with its edits on it; arguments as for the base."""
        for name in ("adapter_kwargs", "code_revision"):
            kwargs.pop(name, None)
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        trusted = kwargs.pop(
            "trust_remote_code", False
        )  # a base may have code that comes with the export
        model = AutoModelForImageTextToText.from_pretrained(
            folder, *args, subfolder="base", trust_remote_code=trusted, **kwargs
        )
        with safe_open(
            cached_file(folder, "edits.safetensors", **hub), framework="pt"
        ) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            model.edits = cls.edits_class(
                model, tensors, json.loads(file.metadata()["settings"])
            )
        return model
