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
from mmedit_cli.knowledge.methods.unike.networks import (
    MemoryNetworks,
    Scope,
    encoder,
)

_PREFIX = "networks."


class UnikeRuntimeNetworks(MemoryNetworks):
    """The networks that are asked when a question is answered, and the knowledge."""

    def __init__(self, tensors: Mapping[str, Tensor], settings: Any) -> None:
        super().__init__()
        hidden = settings.encoder_dim
        width = tensors["sem"].shape[1]
        layers = settings.attention
        semantic = [encoder(width, hidden, width) for _ in layers]
        self.semantic = nn.ModuleList(semantic)
        self.scope = Scope(
            width,
            settings.scope_dim,
            settings.heads,
        )
        own = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(_PREFIX)
        }
        for name in ("sem", "pos", "rows"):
            self.register_buffer(name, own[name])
        self.load_state_dict(own)
        self.eval().requires_grad_(False)


class UnikeEdits(RoutedEdits):
    """The neurons and the knowledge on one model."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._size = 1  # sequences of the pass under way
        settings = self.settings
        sites = [
            Site(
                paths=tuple(paths),
                gated=settings.gated,
                act=self.model.get_submodule(act),
                rows=lambda: self._size,
            )
            for paths, act in zip(settings.ffn, settings.act, strict=True)
        ]
        places = Places(settings.entered, settings.attention, sites)
        self.networks = UnikeRuntimeNetworks(self.tensors, settings)
        self.tensors = {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(_PREFIX)
        }
        self.memories = Memories(places, self.networks, settings)
        self.memories.attach(self.patch, lambda _: self.route)

    def to(self, device: torch.device) -> None:
        """Move edits, networks and knowledge; the routing stays in float32."""
        super().to(device)
        self.networks.to(device)

    def choose(self, hidden: Tensor, question: Question) -> Route | None:
        """Return what is added to the rows that are about an edit; in mode `reference`, all edits to all rows."""
        edits = dict(self.tensors)
        hidden_edits = edits.pop("hidden")
        if not self.memories.scoped:
            self.weights = [dict.fromkeys(self.ids, 1.0) for _ in hidden]
            return self.memories.choose(hidden, question.prompt, edits, None)
        about = self.memories.about(
            hidden,
            question.prompt,
            question.image,
            edits,
            hidden_edits,
        )
        self.weights = []
        for place in about.tolist():
            known = place >= 0
            self.weights.append({self.ids[place]: 1.0} if known else {})
        return self.memories.choose(hidden, question.prompt, edits, about)

    def change(self, hidden: Tensor) -> None:
        """Change nothing here, but note how many sequences the pass has."""
        self._size = len(hidden)


class UnikeExportConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-unike"


class UnikeExport(Loader):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = UnikeExportConfig
    edits_class = UnikeEdits


# the names that every export has
EditedConfig = UnikeExportConfig
EditedModel = UnikeExport
