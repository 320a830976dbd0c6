"""A model with LiveEdit's edits, on transformers alone: from_pretrained, forward, and generate with its cache.

    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

or, with this file beside your own, `EditedModel.from_pretrained(FOLDER)`. What comes back is the base model, from the
folder `base`, with hooks that add the experts of `edits.safetensors`. Which experts a question uses is decided from
its picture and its words (what follows the picture) when it is read first, and holds for every token generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mmedit_cli.knowledge.methods.liveedit.experts import ExpertBank, Routing
from mmedit_cli.knowledge.methods.liveedit.names import spoken
from mmedit_cli.knowledge.methods.liveedit.networks import Asking, Scalar, WholePicture
from mmedit_cli.knowledge.methods.shared.attention import Extractor
from mmedit_cli.knowledge.methods.shared.exported_runtime import (
    Loader,
    Question,
    RoutedEdits,
)

_EXPERT = ("u", "v", "vision", "prompt")
_PREFIX = "networks."


class LiveEditRuntimeNetworks(Asking, nn.Module):
    """The networks that route a question."""

    def __init__(self, tensors: Mapping[str, Tensor], settings: Any) -> None:
        super().__init__()
        hp = settings
        self.hparams = settings
        own = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(_PREFIX)
        }
        width = own["stream_norm.weight"].shape[0]
        self.input_extractor = Extractor(
            width,
            hp.module_dim,
            hp.heads,
            hp.feature_vectors,
            hp.sentinel_tokens,
        )
        self.stream_norm = nn.LayerNorm(width)
        if not self.published:
            self.vision_sharpness = Scalar(0.0)
            self.prompt_sharpness = Scalar(0.0)
        if self.whole_picture:
            values = hp.feature_vectors * hp.module_dim
            self.picture = WholePicture(values, hp.detail_dim)
        if hp.naming is not None:
            self.name_weight = Scalar(0.0)
        self.load_state_dict(own)
        self.eval().requires_grad_(False)


class LiveEditEdits(RoutedEdits):
    """The experts on one model; a route is the rows that have a picture, and which experts they use."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.networks = LiveEditRuntimeNetworks(self.tensors, self.settings)
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move the networks and the experts; the routing stays in float32."""
        super().to(device)
        self.networks.to(device)
        kept = [name for name in (*_EXPERT, "names") if name in self.tensors]
        experts = {name: self.tensors[name] for name in kept}
        shapes = {name: tuple(rows.shape[1:]) for name, rows in experts.items()}
        self.bank = ExpertBank(shapes, device)
        self.bank.add(experts)
        hidden = self.tensors["hidden"].nonzero()[:, 0]
        for position in hidden.tolist():
            self.bank.hide(position, True)

    def choose(self, hidden: Tensor, question: Question) -> tuple[Tensor, Routing]:
        """Return the rows (R,) that have a picture, and which experts they use."""
        self.weights = [{} for _ in hidden]
        rows = question.image.any(1).nonzero()[:, 0]
        if not len(rows):
            nothing = torch.zeros(0, 0, device=rows.device)
            return rows, Routing(nothing.long(), nothing)
        hp = self.settings
        networks = self.networks
        pictures = [
            question.embeds[row, question.image[row]]  # the image tokens
            for row in rows.tolist()
        ]
        mean = torch.stack([picture.mean(0) for picture in pictures])
        asked = networks.ask(
            hidden[rows],
            question.prompt[rows],
            question.image[rows],
            mean,
        )
        names = None if hp.naming is None else self.names_of(pictures)
        routing = networks.routing(
            self.bank,
            asked,
            names,
            hp,
        )
        for row, used in zip(rows.tolist(), routing.by_expert(), strict=True):
            self.weights[row] = {self.ids[i]: weight for i, weight in used.items()}
        return rows, routing

    def names_of(self, pictures: list[Tensor]) -> Tensor:
        """Return the names the base model gives to pictures, by their image tokens (N_v, E): (R, n, 1 + 2 L)."""
        names = [self._name_of(tokens) for tokens in pictures]
        self._reading = None  # what was embedded for it is no question
        every = torch.cat(names)
        return every.to(pictures[0].device)

    def _name_of(self, picture: Tensor) -> Tensor:
        hp = self.settings
        before, behind = hp.naming
        parts = (self._embedded(before), picture, self._embedded(behind))
        question = torch.cat(parts)

        def following(said: list[int]) -> Tensor:
            embeds = torch.cat((question, self._embedded(said)))
            return self._behind(embeds[None])

        return spoken(following, hp.stops, hp.end)

    def _embedded(self, ids: list[int]) -> Tensor:
        """Return the input embeddings of token ids: (n, E)."""
        tokens = torch.tensor(
            ids,
            dtype=torch.long,
            device=self._device,
        )
        embeddings: Tensor = self.model.get_input_embeddings()(tokens)
        return embeddings

    def _behind(self, embeds: Tensor) -> Tensor:
        """Return the logits (V,) of what follows a sequence (1, T, E)."""
        stack = self.model.get_submodule(self.settings.stack)
        head = self.model.get_submodule(self.settings.head)
        mask = torch.ones(
            embeds.shape[:2],
            dtype=torch.long,
            device=embeds.device,
        )
        output = stack(
            inputs_embeds=embeds,
            attention_mask=mask,
            use_cache=False,
        )
        last = output.last_hidden_state[0, -1]
        logits: Tensor = head(last)
        return logits

    def change(self, hidden: Tensor) -> Tensor | None:
        """Return the stream with the experts added, at every position."""
        rows, routing = self.route
        if not bool(routing.used.any()):
            return None
        stream = hidden[rows]
        normed = self.networks.stream_norm(stream.float())
        adapted = self.bank.apply(stream, normed, routing)
        return hidden.index_copy(0, rows, adapted)


class LiveEditExportConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-liveedit"


class LiveEditExport(Loader):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = LiveEditExportConfig
    edits_class = LiveEditEdits


# the names that every export has
EditedConfig = LiveEditExportConfig
EditedModel = LiveEditExport
