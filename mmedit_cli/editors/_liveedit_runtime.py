"""A model with LiveEdit's edits, on transformers alone: from_pretrained, forward, and generate with its cache.

    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

or, with this file beside your own, `EditedModel.from_pretrained(FOLDER)`. What comes back is the base model, from the
folder `base`, with hooks that add the experts of `edits.safetensors`. Which experts a question uses is decided from
its picture and its words (what follows the picture) when it is read first, and holds for every token generated.
"""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from mmedit_cli.editors._experts import (  # noqa: F401
    _GATHERED,
    BLOCK,
    ExpertBank,
    Routing,
    _grown,
    adapt,
    choose,
    soft_weights,
)
from mmedit_cli.editors._liveedit_networks import (  # noqa: F401
    Asking,
    CrossAttention,
    Extractor,
    Scalar,
    WholePicture,
    _normal,
    span,
)

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class EditedConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-liveedit"


class EditedModel(PreTrainedModel):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = EditedConfig

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Return the base model of a folder or hub repository with its edits on it; arguments as for the base."""
        for name in ("trust_remote_code", "adapter_kwargs", "code_revision"):
            kwargs.pop(name, None)
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        model = AutoModelForImageTextToText.from_pretrained(folder, *args, subfolder="base", **kwargs)
        with safe_open(cached_file(folder, "edits.safetensors", **hub), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            model.edits = Edits(model, tensors, json.loads(file.metadata()["settings"]))
        return model


class Networks(Asking, nn.Module):
    """The networks that route a question."""

    def __init__(self, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        super().__init__()
        self.hparams = hp = SimpleNamespace(**settings)
        width = tensors["networks.stream_norm.weight"].shape[0]
        shape = (width, hp.module_dim, hp.heads, hp.feature_vectors, hp.sentinel_tokens)
        self.input_extractor, self.stream_norm = Extractor(*shape), nn.LayerNorm(width)
        if not self.published:
            self.vision_sharpness, self.prompt_sharpness = Scalar(0.0), Scalar(0.0)
        if self.whole_picture:
            self.picture = WholePicture(hp.feature_vectors * hp.module_dim, hp.detail_dim)
        self.load_state_dict({k.removeprefix("networks."): v for k, v in tensors.items() if k.startswith("networks.")})
        self.eval().requires_grad_(False)


class Edits:
    """The experts on one model; `weights` says after a forward pass which edits took part: one dict a row, by id."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        self.settings, self.networks = settings, Networks(tensors, settings)
        self.ids: list[int] = tensors["ids"].tolist()
        self._tensors = {name: tensors[name] for name in ("u", "v", "vision", "prompt")}
        self._hidden = tensors["hidden"].nonzero()[:, 0].tolist()
        self._bank: ExpertBank | None = None
        self._read: Tensor | None = None  # the token ids that were embedded last
        self._question: tuple[Tensor, ...] | None = (
            None  # (ids, mask, embeddings) of a question that is not routed yet
        )
        self._routed: tuple[Tensor, Routing] | None = None
        self.weights: list[dict[int, float]] = []
        model.get_input_embeddings().register_forward_pre_hook(self._embedding)  # type: ignore[operator]
        stack, entered = (model.get_submodule(settings[name]) for name in ("stack", "entered"))
        stack.register_forward_pre_hook(self._beginning, with_kwargs=True)
        entered.register_forward_pre_hook(self._adapt, with_kwargs=True)

    def _embedding(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._read = args[0]

    def _beginning(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            return  # a part of an answer: it goes where its question went
        mask, ids = kwargs.get("attention_mask"), self._read
        if ids is None:
            raise ValueError("the edits are found by the tokens of the question: give input_ids, not inputs_embeds")
        if mask is None:
            mask = torch.ones_like(ids)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError("the edits need an attention_mask of shape (batch, tokens)")
        self._question, self._routed, self._read = (ids, mask, kwargs["inputs_embeds"]), None, None

    def _adapt(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._question is not None:
            self._routed, self._question = self._route(hidden, *self._question), None
        if self._routed is None or not bool(self._routed[1].used.any()):
            return None
        rows, routing = self._routed
        stream = hidden[rows]
        normed = self.networks.stream_norm(stream.float())
        changed = hidden.index_copy(0, rows, self._bank.apply(stream, normed, routing))  # type: ignore[union-attr]
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    @torch.no_grad()
    def _route(self, hidden: Tensor, ids: Tensor, mask: Tensor, embeds: Tensor) -> tuple[Tensor, Routing]:
        """Return the rows that have a picture, and which experts they use."""
        bank, networks, hp = self._on(hidden.device), self.networks, self.networks.hparams
        ids, mask, embeds = (
            x.to(hidden.device).repeat_interleave(len(hidden) // len(x), 0) for x in (ids, mask, embeds)
        )  # beams of a question
        image = ids == hp.image_token_id
        behind = image.flip(1).cumsum(1).flip(1) == 0
        rows = image.any(1).nonzero()[:, 0]
        self.weights = [{} for _ in ids]
        if not len(rows):
            nothing = torch.zeros(0, 0, device=rows.device)
            return rows, Routing(nothing.long(), nothing)
        prompt = behind & mask.bool()
        mean = torch.stack([embeds[row, image[row]].mean(0) for row in rows.tolist()])
        vision, asked, against = networks.ask(hidden[rows], prompt[rows], image[rows], mean)
        margin = bank.compare("vision", partial(networks.similarity, vision)) - against
        score = networks.score(bank.compare("prompt", partial(networks.similarity, asked)), margin)
        keep = ((margin if networks.published else score) > hp.margin) & bank.visible
        routing = choose(keep, score, hp.top_k, gated=networks.published)
        for row, index, weight in zip(rows.tolist(), routing.index.tolist(), routing.weight.tolist(), strict=True):
            self.weights[row] = {self.ids[i]: w for i, w in zip(index, weight, strict=True) if w > 0}
        return rows, routing

    def _on(self, device: torch.device) -> ExpertBank:
        """Return the experts where the model computes; the routing stays in float32."""
        if self._bank is None:
            self.networks.to(device)
            self._bank = ExpertBank({name: tuple(rows.shape[1:]) for name, rows in self._tensors.items()}, device)
            self._bank.add(self._tensors)
            for position in self._hidden:
                self._bank.hide(position, True)
            self._tensors = {}
        return self._bank
