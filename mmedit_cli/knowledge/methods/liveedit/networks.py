"""The networks of LiveEdit: what reads a sequence to route it, and what writes an expert.

Sections are those of Chen et al., CVPR 2025; all of this is their section 4.

B sequences, L tokens of a span, D width of the model, k feature vectors of width m, r the rank of an expert;
F = k * m values of a feature, V = F, or d + E where whole pictures are compared.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmedit_cli.knowledge.methods.liveedit.experts import ExpertBank, Routing, choose
from mmedit_cli.knowledge.methods.liveedit.hparams import LiveEditHparams
from mmedit_cli.knowledge.methods.liveedit.names import agreement
from mmedit_cli.knowledge.methods.shared.attention import (
    CrossAttention,
    Extractor,
    first_valid,
    initial_values,
    span,
)
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix


class ExpertGenerator(nn.Module):
    """Writes one matrix of an expert from the picture, the prompt and the answer of a request (LowRankGenerator).

    With `slots`, the vector of slot j is added to row j, through a linear map that starts as a scaled identity.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        heads: int,
        rank: int,
        lora_scale: float,
        slots: float | None = None,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(initial_values(1, rank, dim))
        self.attn = CrossAttention(
            dim,
            width,
            dim,
            width,
            heads,
        )
        self.norm = nn.LayerNorm(width)
        self.scale = 1 / (lora_scale * rank**0.5)
        if slots is not None:
            self.slot_norm = nn.LayerNorm(width)
            self.slot_map = nn.Linear(width, width, bias=False)
            with torch.no_grad():
                self.slot_map.weight.copy_(slots * torch.eye(width))

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        slots: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D), (B, L) bool; what is in the slots, and which are used: (B, r, D), (B, r) -> (B, r, D)."""
        queries = self.queries.expand(len(tokens), -1, -1)
        attended: Tensor = self.attn(
            queries,
            self.norm(tokens),
            mask,
        )
        rows: Tensor = self.scale * attended
        if slots is None or used is None:
            return rows
        normed = self.slot_norm(slots)
        filled: Tensor = self.slot_map(normed)
        weighted: Tensor = filled * used[..., None]
        return rows + weighted


class Scalar(nn.Module):
    """One trained number that is kept as a tenth: a step of the optimizer moves it ten times as far as a weight."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.tenth = nn.Parameter(torch.tensor(value / 10))

    def forward(self) -> Tensor:
        """Return the number."""
        return 10 * self.tenth


class WholePicture(nn.Module):
    """Compares pictures by the direction of their mean image token, as it enters the language model.

    The image encoder was trained on many more things than the training cases of an editor show. So only the weight of
    this cosine is trained, and the `threshold` that an expert has to beat. The `detail` of a picture that a question
    is about (the colour behind it, say) is compared in few values: with many, the networks would learn the things of
    the training cases by heart.
    """

    def __init__(self, features: int, detail: int) -> None:
        super().__init__()
        self.detail = nn.Linear(features, detail, bias=False)
        self.sharpness = Scalar(math.log(20.0))
        self.threshold = Scalar(0.5)

    def forward(self, vision: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return two directions: of the vision feature (B, F) -> (B, d), of the mean image token (B, E) -> (B, E)."""
        mean = mean.float()
        width = mean.shape[-1:]
        detail = self.detail(vision)
        whole = F.layer_norm(mean, width)
        return F.normalize(detail), F.normalize(whole)


class Asking:
    """How queries are routed with these networks; an exported model uses it too."""

    hparams: Any
    input_extractor: Extractor
    vision_sharpness: Scalar
    prompt_sharpness: Scalar
    picture: WholePicture
    name_weight: Scalar

    def ask(
        self, hidden: Tensor, prompt_mask: Tensor, image_mask: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the vision and the prompt feature of queries, (B, V) and (B, F), and what to beat (B, 1)."""
        hidden = hidden.float()
        vision, prompt, sentinel = self.input_extractor(
            hidden,
            prompt_mask,
            image_mask,
        )
        if self.published:
            products = (vision * sentinel).sum(1, keepdim=True)
            return vision, prompt, self._scale(vision) * products
        prompt = self.prompt_sharpness().exp() * F.normalize(prompt)
        vision_sharpness = self.vision_sharpness().exp()
        if not self.whole_picture:
            vision = vision_sharpness * F.normalize(vision)
            products = vision * F.normalize(sentinel)
            return vision, prompt, products.sum(1, keepdim=True)
        detail, whole = self.picture(vision, mean)
        sentinel_detail, _ = self.picture(sentinel, mean)
        detail = vision_sharpness * detail
        sharpness = self.picture.sharpness().exp()
        products = (detail * sentinel_detail).sum(1, keepdim=True)
        threshold = sharpness * self.picture.threshold()
        vision = torch.cat((detail, sharpness * whole), 1)
        return vision, prompt, products + threshold

    def routing(
        self,
        bank: ExpertBank,
        asked: tuple[Tensor, Tensor, Tensor],
        names: Tensor | None,
        settings: Any,
    ) -> Routing:
        """Return which experts of a bank R queries use, by what `ask` returned of them.

        names: (R, n, 1 + 2 L) of their pictures, where names are compared. settings: with the margin and top_k.
        """
        vision, prompt, sentinel = asked
        to_vision = partial(self.similarity, vision)
        to_prompt = partial(self.similarity, prompt)
        by_vision = bank.compare("vision", to_vision)
        by_prompt = bank.compare("prompt", to_prompt)
        if names is not None:
            to_names = partial(agreement, names)
            by_names = bank.compare("names", to_names)
            by_vision = by_vision + self.named(by_names)
        margin = by_vision - sentinel
        score = self.score(by_prompt, margin)
        # published: the picture alone decides which experts pass
        decisive = margin if self.published else score
        keep = (decisive > settings.margin) & bank.visible
        return choose(
            keep,
            score,
            settings.top_k,
            gated=self.published,
        )

    def named(self, agreed: Tensor) -> Tensor:
        """Return what is added to the similarity of pictures for the agreement of their names: (R, N) -> (R, N)."""
        weight: Tensor = self.name_weight()
        return weight * agreed

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return how near queries and keys are: (R, F), (N, F) -> (R, N), F or V.

        Published: the mean over the k vectors of a feature of <query, key> / sqrt(m). Joint: the sharpened cosine.
        """
        return queries @ keys.T * self._scale(queries)

    def score(self, by_prompt: Tensor, margin: Tensor) -> Tensor:
        """Return what the weights of experts are made of; in the published form the prompt alone.

        There the picture decides which experts pass, and the prompt how much they count. So the same picture passes
        with any question. In the joint form both decide both.
        """
        if self.published:
            return by_prompt
        weighted: Tensor = self.hparams.visual_weight * margin
        return by_prompt + weighted

    @property
    def published(self) -> bool:
        """Whether routing follows the paper to the letter."""
        variant: str = self.hparams.variant
        return variant == "paper"

    @property
    def whole_picture(self) -> bool:
        """Whether whole pictures are compared too."""
        compares: bool = self.hparams.whole_picture
        return compares and not self.published

    def _scale(self, features: Tensor) -> float:
        if not self.published:
            return 1.0
        vectors = self.hparams.feature_vectors
        values = features.shape[1]
        # 1 / (k * sqrt(m)) with F = k * m
        return float((values * vectors) ** -0.5)


class LiveEditNetworks(Asking, nn.Module):
    """All trained networks of LiveEdit; the model itself stays frozen."""

    def __init__(self, width: int, entry_width: int, hparams: LiveEditHparams) -> None:
        super().__init__()
        hp = hparams
        self.hparams = hparams
        self.entry_width = entry_width
        shape = (width, hp.module_dim, hp.heads)
        vectors = hp.feature_vectors
        self.edit_extractor = Extractor(*shape, vectors)
        self.input_extractor = Extractor(*shape, vectors, hp.sentinel_tokens)
        if not self.published:
            # one start for both: what is alike is then near whatever the weights
            start = self.edit_extractor.state_dict()
            self.input_extractor.load_state_dict(start, strict=False)
            # directions are compared, and their cosines sharpened: what was never seen then has no outliers
            self.vision_sharpness = Scalar(math.log(10.0))
            self.prompt_sharpness = Scalar(math.log(10.0))
            if hp.whole_picture:
                values = vectors * hp.module_dim
                self.picture = WholePicture(values, hp.detail_dim)
            if hp.naming is not None:
                self.name_weight = Scalar(1.0)
        # at first row j of u fires where token j of the answer is to be given, and row j of v gives it
        slots = (1 / width, 1.0) if hp.answer_slots else (None, None)
        shape_of_expert = (*shape, hp.rank, hp.lora_scale)
        self.generator_u = ExpertGenerator(*shape_of_expert, slots[0])
        self.generator_v = ExpertGenerator(*shape_of_expert, slots[1])
        self.stream_norm = nn.LayerNorm(width)

    def experts(
        self, prefix: Prefix, backbone: VisionLanguageModel
    ) -> tuple[Tensor, Tensor]:
        """Return the matrices u and v of the experts for requests with a picture: (B, r, D) each.

        Slot j of u holds the state that is to give token j of the answer, and slot j of v the row of the head for
        that token. The end of the answer counts as a token. Tokens beyond the rank have no slot.
        """
        batch = prefix.batch
        hidden = prefix.hidden.float()
        everything = batch.image_mask | batch.prompt_mask | batch.answer_mask
        tokens, mask = span(hidden, everything)
        if not self.hparams.answer_slots:
            return self.generator_u(tokens, mask), self.generator_v(tokens, mask)
        at, labels = batch.target_positions(backbone.end_id)
        rank = self.hparams.rank
        head = backbone.anchors.module("head").weight
        assert isinstance(head, Tensor)
        directions = head[labels].float()  # that make the head give a token
        states, used = first_valid(*span(hidden, at), rank)
        words, _ = first_valid(*span(directions, at), rank)
        u = self.generator_u(
            tokens,
            mask,
            states,
            used,
        )
        v = self.generator_v(
            tokens,
            mask,
            words,
            used,
        )
        return u, v

    def keys(self, prefix: Prefix, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vision and the prompt feature by which an expert is found: (B, V) and (B, F).

        `mean`: the mean image token of each row, (B, E).
        """
        batch = prefix.batch
        vision, prompt, _ = self.edit_extractor(
            prefix.hidden.float(),
            batch.prompt_mask,
            batch.image_mask,
        )
        if self.published:
            return vision, prompt
        if self.whole_picture:
            directions = self.picture(vision, mean)
            return torch.cat(directions, 1), F.normalize(prompt)
        return F.normalize(vision), F.normalize(prompt)

    @property
    def widths(self) -> dict[str, int]:
        """V and F, the number of values of a vision and of a prompt feature."""
        hp = self.hparams
        values = hp.feature_vectors * hp.module_dim
        vision = values
        if self.whole_picture:
            vision = hp.detail_dim + self.entry_width
        return {"vision": vision, "prompt": values}
