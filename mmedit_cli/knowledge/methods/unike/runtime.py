"""A model with UniKE's edits, on transformers alone: from_pretrained, forward, and generate with its cache.

    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

or, with this file beside your own, `EditedModel.from_pretrained(FOLDER)`. What comes back is the base model, from the
folder `base`, with hooks on its last layers that add the neurons and the knowledge of `edits.safetensors`. Which edit
a question is about is decided from its picture and its words (what follows the picture) when it is read first, and
holds for every token generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mmedit_cli.knowledge.methods.shared.exported_runtime import (
    Loader,
    Question,
    RoutedEdits,
)
from mmedit_cli.knowledge.methods.shared.neurons import Site
from mmedit_cli.knowledge.methods.unike.memory import Memories, Places, Route
from mmedit_cli.knowledge.methods.unike.networks import Scope, encoder

_PREFIX = "networks."


class Networks(nn.Module):
    """The networks that are asked when a question is answered, and the knowledge."""

    def __init__(self, tensors: Mapping[str, Tensor], settings: Any) -> None:
        super().__init__()
        layers, width = len(settings.attention), tensors["sem"].shape[1]
        self.semantic = nn.ModuleList(
            encoder(width, settings.encoder_dim, width) for _ in range(layers)
        )
        self.scope = Scope(width, settings.scope_dim, settings.heads)
        for name in ("sem", "pos", "rows"):
            self.register_buffer(name, tensors[_PREFIX + name])
        self.load_state_dict(
            {
                k.removeprefix(_PREFIX): v
                for k, v in tensors.items()
                if k.startswith(_PREFIX)
            }
        )
        self.eval().requires_grad_(False)


class Edits(RoutedEdits):
    """The neurons and the knowledge on one model."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        hp, self._size = self.settings, 1
        acts = [self.model.get_submodule(path) for path in hp.act]
        sites = [
            Site(tuple(paths), hp.gated, act, lambda: self._size)
            for paths, act in zip(hp.ffn, acts, strict=True)
        ]
        self.networks = Networks(self.tensors, hp)
        self.tensors = {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(_PREFIX)
        }
        self.memories = Memories(
            Places(hp.entered, hp.attention, sites), self.networks, hp
        )
        self.memories.attach(self.patch, lambda _: self.route)

    def to(self, device: torch.device) -> None:
        """Move edits, networks and knowledge; the routing stays in float32."""
        super().to(device)
        self.networks.to(device)

    def choose(self, hidden: Tensor, question: Question) -> Route | None:
        """Return what is added to the rows that are about an edit; as published, that of all edits to all rows."""
        edits = {
            name: tensor for name, tensor in self.tensors.items() if name != "hidden"
        }
        about = None
        self.weights = [dict.fromkeys(self.ids, 1.0) for _ in hidden]
        if self.memories.scoped:
            about = self.memories.about(
                hidden, question.prompt, question.image, edits, self.tensors["hidden"]
            )
            self.weights = [{} if i < 0 else {self.ids[i]: 1.0} for i in about.tolist()]
        return self.memories.choose(hidden, question.prompt, edits, about)

    def change(self, hidden: Tensor) -> None:
        """Change nothing here, but keep how many sequences are on their way."""
        self._size = len(hidden)


class EditedConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-unike"


class EditedModel(Loader):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = EditedConfig
    edits_class = Edits
