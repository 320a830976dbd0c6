"""Both memories of UniKE at work: neurons beside the FFN, and knowledge that attention is turned towards.

R rows of a batch, T tokens, D width, S edited layers, n neurons, K retrieved rows of knowledge, E edits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedit_cli.knowledge.methods.shared.neurons import (
    Neurons,
    Site,
    fields,
    respond,
    site_of,
)
from mmedit_cli.knowledge.methods.unike.hparams import UnikeHparams
from mmedit_cli.knowledge.methods.unike.networks import (
    MemoryNetworks,
    attend,
    blend,
)
from mmedit_cli.knowledge.methods.unike.training import last
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.patch import Patch


@dataclass(frozen=True)
class Route:
    """What is added to the rows (R,) of a batch.

    neurons: for each layer, (R, n, D) or (n, D) for all rows; known: (S, R, K, D), the rows of knowledge that were
    retrieved, or None; query: (R, D), the states of the questions they were retrieved for.
    """

    rows: Tensor
    neurons: Sequence[Neurons]
    known: Tensor | None
    query: Tensor


@dataclass(frozen=True)
class Places:
    """The edited layers of a model: the path of the first, and for each that of its attention, and its FFN."""

    entered: str
    attention: Sequence[str]
    sites: Sequence[Site]


def places_of(backbone: VisionLanguageModel, layers: int) -> Places:
    """Return the last so many layers of a model."""
    anchors = backbone.anchors
    first = backbone.n_layers - layers
    numbers = range(first, backbone.n_layers)
    return Places(
        entered=anchors.path("layer", first),
        attention=[anchors.path("attn", number) for number in numbers],
        sites=[site_of(backbone, number) for number in numbers],
    )


class Memories:
    """Both memories on the layers of a model.

    `scoped`: whether only rows that are about an edit change; `shapes`: of the tensors of one neuron.
    """

    def __init__(
        self, places: Places, networks: MemoryNetworks, hparams: UnikeHparams
    ) -> None:
        self.places = places
        self.networks = networks
        self.hparams = hparams
        self.scoped = hparams.mode == "scoped"
        width = networks.sem.shape[1]
        gated = places.sites[0].gated
        self.shapes = fields(width, gated=gated and not self.scoped)

    def attach(self, patch: Patch, route_of: Callable[[Tensor], Route | None]) -> None:
        """Hook both memories into the layers; `route_of` gets what enters the first of them, (B, T, D)."""
        current = _CurrentPass()

        def enter(hidden: Tensor) -> None:
            current.route = route_of(hidden)

        places = self.places
        patch.hook_input(places.entered, enter)
        pairs = zip(places.attention, places.sites, strict=True)
        for s, (attention, site) in enumerate(pairs):
            external = partial(self._external, s, current)
            intrinsic = partial(self._intrinsic, s, current)
            patch.hook_input(attention, current.keep_input)
            patch.hook(attention, external)
            site.hook(patch, intrinsic)

    def _external(self, s: int, current: _CurrentPass, output: Tensor) -> Tensor | None:
        """Turn the output of attention towards what is known (eq. 7 to 9); (B, T, D), None: not a bit changes."""
        route = current.route
        if route is None or route.known is None:
            return None
        hp = self.hparams
        rows = route.rows
        own_output = output[rows].float()
        states = current.attention_input[rows].float()
        sharpness = hp.sharpness if self.scoped else None
        known = attend(states, route.known[s], sharpness)  # eq. 8
        share = torch.full_like(own_output[..., 0], hp.share)
        if hp.collaboration:
            # section 3.3: the semantic encoder says how much of what is known belongs to the question
            meaning = self.networks.semantic[s](known)
            question = route.query[:, None]
            cosine = F.cosine_similarity(
                meaning,
                question,
                dim=-1,
            )
            relevance = cosine.clamp(0, 1)
            share = share * relevance if self.scoped else relevance
        turned = blend(own_output, known, share)
        return output.index_copy(
            0,
            rows,
            turned.to(output.dtype),
        )

    def _intrinsic(
        self, s: int, current: _CurrentPass, entering: Tensor
    ) -> Tensor | None:
        """Return what the neurons add to the FFN (eq. 3); (B, T, D), None: not a bit changes."""
        route = current.route
        if route is None:
            return None
        neurons = route.neurons[s]
        count = neurons["bias"].shape[-1]
        if not count:
            return None
        site = self.places.sites[s]
        act = F.relu if self.scoped else site.act
        added = respond(
            entering[route.rows],
            neurons,
            act,
        )
        nothing = torch.zeros_like(entering)
        return nothing.index_copy(0, route.rows, added)

    def about(
        self,
        hidden: Tensor,
        prompt: Tensor,
        image: Tensor,
        edits: Neurons,
        replaced: Tensor,
    ) -> Tensor:
        """Return which edit each question is about, -1 for none: (B,).

        hidden: (B, T, D) entering the first layer; prompt, image: (B, T) bool; `scope` of edits: (E, 2 F);
        replaced: (E,) bool, the edits that a later one hides.
        """
        scope = self.networks.scope
        features = scope(hidden, prompt, image)
        score = scope.score(features, edits["scope"])
        score = score.masked_fill(replaced, float("-inf"))
        best = score.max(1)
        return torch.where(
            best.values > self.hparams.threshold,
            best.indices,
            -1,
        )

    def choose(
        self, hidden: Tensor, prompt: Tensor, edits: Neurons, about: Tensor | None
    ) -> Route | None:
        """Return the route of questions, given the edit that each is `about`, (B,); None if there is none for any.

        With `about` None, all edits apply to each question.
        """
        query = hidden[last(prompt)].float()
        if about is None:
            size = len(hidden)
            rows = torch.arange(size, device=hidden.device)
            sem = edits["sem"]
            pos = edits["pos"]
            every_sem = sem.expand(size, *sem.shape)
            every_pos = pos.expand(size, *pos.shape)
            return self.route(
                rows,
                query,
                every_sem,
                every_pos,
                edits,
            )
        rows = (about >= 0).nonzero()[:, 0]
        if not len(rows):
            return None
        chosen = about[rows]
        own = {name: tensor[chosen] for name, tensor in edits.items()}
        own_sem = own["sem"][:, None]
        own_pos = own["pos"][:, None]
        return self.route(
            rows,
            query[rows],
            own_sem,
            own_pos,
            own,
        )

    def recall(self, query: Tensor, sem: Tensor, pos: Tensor) -> Tensor:
        """Return the knowledge nearest to questions by cosine, that of edits included: (S, R, K, D).

        query: (R, D); the edits each row may use: sem (R, M, D), pos (R, M, S, D).
        """
        known = int(self.networks.rows)  # rows of knowledge; those of edits follow
        bank = self.networks.sem[:known].float()
        asked = F.normalize(query, dim=-1)
        near_bank = asked @ F.normalize(bank, dim=-1).T
        edited = F.normalize(sem, dim=-1)
        near_edits = torch.einsum("rd,rmd->rm", asked, edited)
        near = torch.cat((near_bank, near_edits), 1)
        count = min(self.hparams.top_k, near.shape[1])
        picked = near.topk(count, 1).indices  # (R, K)
        from_edits = self._of_edits(picked - known, pos)
        if not known:
            return from_edits
        is_edit = picked >= known
        places = picked.clamp(max=known - 1)
        from_bank = self.networks.pos[:, places].float()
        return torch.where(
            is_edit[None, ..., None],
            from_edits,
            from_bank,
        )

    def _of_edits(self, picked: Tensor, pos: Tensor) -> Tensor:
        """Return the knowledge of the picked edits, of the first where one below 0 is picked.

        picked: (R, K); pos: (R, M, S, D); result: (S, R, K, D).
        """
        place = picked.clamp(min=0)
        place = place[..., None, None]
        layers_and_width = pos.shape[2:]
        place = place.expand(-1, -1, *layers_and_width)
        found = pos.gather(1, place)
        return found.permute(
            2,
            0,
            1,
            3,
        )

    def route(
        self, rows: Tensor, query: Tensor, sem: Tensor, pos: Tensor, neurons: Neurons
    ) -> Route:
        """Return the route of rows (R,) with these questions (R, D).

        sem, pos: as in `recall`; neurons: (R, S, n, ...), in mode reference (E, S, n, ...) for all rows.
        """
        known = None
        if self.hparams.external:
            known = self.recall(query, sem, pos)
        every: list[Neurons] = []
        for s in range(len(self.places.sites)):
            layer = {name: neurons[name][:, s] for name in self.shapes}
            if not self.scoped:
                layer = {name: rows.flatten(0, 1) for name, rows in layer.items()}
            every.append(layer)
        return Route(
            rows,
            every,
            known,
            query,
        )


class _CurrentPass:
    """The forward pass under way: its route, and what entered the attention that is running."""

    route: Route | None = None
    attention_input: Tensor

    def keep_input(self, hidden: Tensor) -> None:
        self.attention_input = hidden
