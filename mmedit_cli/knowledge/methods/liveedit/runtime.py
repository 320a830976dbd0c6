"""A model with LiveEdit's edits, on transformers alone: from_pretrained, forward, and generate with its cache.

    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

or, with this file beside your own, `EditedModel.from_pretrained(FOLDER)`. What comes back is the base model, from the
folder `base`, with hooks that add the experts of `edits.safetensors`. Which experts a question uses is decided from
its picture and its words (what follows the picture) when it is read first, and holds for every token generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mmedit_cli.knowledge.methods.liveedit.experts import ExpertBank, Routing, choose
from mmedit_cli.knowledge.methods.liveedit.networks import Asking, Scalar, WholePicture
from mmedit_cli.knowledge.methods.shared.attention import Extractor
from mmedit_cli.knowledge.methods.shared.exported_runtime import (
    Loader,
    Question,
    RoutedEdits,
)

_EXPERT = ("u", "v", "vision", "prompt")


class Networks(Asking, nn.Module):
    """The networks that route a question."""

    def __init__(self, tensors: Mapping[str, Tensor], settings: Any) -> None:
        super().__init__()
        self.hparams = hp = settings
        width = tensors["networks.stream_norm.weight"].shape[0]
        shape = (width, hp.module_dim, hp.heads, hp.feature_vectors, hp.sentinel_tokens)
        self.input_extractor, self.stream_norm = Extractor(*shape), nn.LayerNorm(width)
        if not self.published:
            self.vision_sharpness, self.prompt_sharpness = Scalar(0.0), Scalar(0.0)
        if self.whole_picture:
            self.picture = WholePicture(
                hp.feature_vectors * hp.module_dim, hp.detail_dim
            )
        self.load_state_dict(
            {
                k.removeprefix("networks."): v
                for k, v in tensors.items()
                if k.startswith("networks.")
            }
        )
        self.eval().requires_grad_(False)


class Edits(RoutedEdits):
    """The experts on one model; a route is the rows that have a picture, and which experts they use."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.networks = Networks(self.tensors, self.settings)
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move the networks and the experts; the routing stays in float32."""
        super().to(device)
        self.networks.to(device)
        experts = {name: self.tensors[name] for name in _EXPERT}
        self.bank = ExpertBank(
            {name: tuple(rows.shape[1:]) for name, rows in experts.items()}, device
        )
        self.bank.add(experts)
        for position in self.tensors["hidden"].nonzero()[:, 0].tolist():
            self.bank.hide(position, True)

    def choose(self, hidden: Tensor, question: Question) -> tuple[Tensor, Routing]:
        """Return the rows (R,) that have a picture, and which experts they use."""
        bank, networks, hp = self.bank, self.networks, self.settings
        rows = question.image.any(1).nonzero()[:, 0]
        self.weights = [{} for _ in hidden]
        if not len(rows):
            nothing = torch.zeros(0, 0, device=rows.device)
            return rows, Routing(nothing.long(), nothing)
        mean = torch.stack(
            [question.embeds[row, question.image[row]].mean(0) for row in rows.tolist()]
        )
        vision, asked, against = networks.ask(
            hidden[rows], question.prompt[rows], question.image[rows], mean
        )
        margin = bank.compare("vision", partial(networks.similarity, vision)) - against
        score = networks.score(
            bank.compare("prompt", partial(networks.similarity, asked)), margin
        )
        keep = ((margin if networks.published else score) > hp.margin) & bank.visible
        routing = choose(keep, score, hp.top_k, gated=networks.published)
        for row, index, weight in zip(
            rows.tolist(), routing.index.tolist(), routing.weight.tolist(), strict=True
        ):
            self.weights[row] = {
                self.ids[i]: w for i, w in zip(index, weight, strict=True) if w > 0
            }
        return rows, routing

    def change(self, hidden: Tensor) -> Tensor | None:
        """Return the stream with the experts added, at every position."""
        rows, routing = self.route
        if not bool(routing.used.any()):
            return None
        stream = hidden[rows]
        normed = self.networks.stream_norm(stream.float())
        return hidden.index_copy(0, rows, self.bank.apply(stream, normed, routing))


class EditedConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-liveedit"


class EditedModel(Loader):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = EditedConfig
    edits_class = Edits
