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
from mmedit_cli.knowledge.methods.unike.networks import UnikeNetworks, attend, blend
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
    numbers, anchors = (
        range(backbone.n_layers - layers, backbone.n_layers),
        backbone.anchors,
    )
    attention = [anchors.path("attn", number) for number in numbers]
    return Places(
        anchors.path("layer", numbers[0]),
        attention,
        [site_of(backbone, number) for number in numbers],
    )


class Memories:
    """Layers of a model, ready to use both memories.

    `scoped`: whether only some rows are touched; `shapes`: those of one neuron.
    """

    def __init__(
        self, places: Places, networks: UnikeNetworks, hparams: UnikeHparams
    ) -> None:
        self.places, self.networks, self.hparams = places, networks, hparams
        self.scoped = hparams.mode == "scoped"
        self.shapes = fields(
            networks.sem.shape[1], gated=places.sites[0].gated and not self.scoped
        )

    def attach(self, patch: Patch, route_of: Callable[[Tensor], Route | None]) -> None:
        """Have the layers use both memories; what enters the first of them, (B, T, D), says what it is routed to."""
        now = _Now()

        def enter(hidden: Tensor) -> None:
            now.route = route_of(hidden)

        patch.hook_input(self.places.entered, enter)
        for s, (attention, site) in enumerate(
            zip(self.places.attention, self.places.sites, strict=True)
        ):
            patch.hook_input(attention, now.ask)
            patch.hook(attention, partial(self._external, s, now))
            site.hook(patch, partial(self._intrinsic, s, now))

    def _external(self, s: int, now: _Now, said: Tensor) -> Tensor | None:
        """Turn what attention says towards what is known (eq. 7 to 9); (B, T, D), None: not a bit changes."""
        route = now.route
        if route is None or route.known is None:
            return None
        said_here, asking = said[route.rows].float(), now.asking[route.rows].float()
        known = attend(
            asking, route.known[s], self.hparams.sharpness if self.scoped else None
        )
        share = torch.full_like(said_here[..., 0], self.hparams.share)
        if self.hparams.collaboration:
            meant = self.networks.semantic[s](known)
            relevance = F.cosine_similarity(meant, route.query[:, None], dim=-1).clamp(
                0, 1
            )
            share = share * relevance if self.scoped else relevance
        return said.index_copy(
            0, route.rows, blend(said_here, known, share).to(said.dtype)
        )

    def _intrinsic(self, s: int, now: _Now, entering: Tensor) -> Tensor | None:
        """Return what the neurons add to the FFN (eq. 3); (B, T, D), None: not a bit changes."""
        route = now.route
        if route is None or not route.neurons[s]["bias"].shape[-1]:
            return None
        act = F.relu if self.scoped else self.places.sites[s].act
        more = respond(entering[route.rows], route.neurons[s], act)
        return torch.zeros_like(entering).index_copy(0, route.rows, more)

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
        score = scope.score(scope(hidden, prompt, image), edits["scope"]).masked_fill(
            replaced, float("-inf")
        )
        best = score.max(1)
        return torch.where(best.values > self.hparams.threshold, best.indices, -1)

    def choose(
        self, hidden: Tensor, prompt: Tensor, edits: Neurons, about: Tensor | None
    ) -> Route | None:
        """Return what questions are routed to that are about these edits, (B,); None if no edit is about any of them.

        Without `about` it is all edits for each question.
        """
        query = hidden[last(prompt)].float()
        if about is None:
            rows, size = torch.arange(len(hidden), device=hidden.device), len(hidden)
            sem, pos = (
                edits[name].expand(size, *edits[name].shape) for name in ("sem", "pos")
            )
            return self.route(rows, query, sem, pos, edits)
        rows = (about >= 0).nonzero()[:, 0]
        if not len(rows):
            return None
        own = {name: tensor[about[rows]] for name, tensor in edits.items()}
        return self.route(
            rows, query[rows], own["sem"][:, None], own["pos"][:, None], own
        )

    def recall(self, query: Tensor, sem: Tensor, pos: Tensor) -> Tensor:
        """Return the knowledge nearest to questions by cosine, that of edits included: (S, R, K, D).

        query: (R, D); the edits each row may use: sem (R, M, D), pos (R, M, S, D).
        """
        networks = self.networks
        rows = int(networks.rows)
        asked = F.normalize(query, dim=-1)
        near = asked @ F.normalize(networks.sem[:rows].float(), dim=-1).T
        near = torch.cat(
            (near, torch.einsum("rd,rmd->rm", asked, F.normalize(sem, dim=-1))), 1
        )
        picked = near.topk(min(self.hparams.top_k, near.shape[1]), 1).indices  # (R, K)
        own = picked >= rows
        place = (
            (picked - rows).clamp(min=0)[..., None, None].expand(-1, -1, *pos.shape[2:])
        )
        of_edits = pos.gather(1, place).permute(2, 0, 1, 3)
        if not rows:
            return of_edits
        return torch.where(
            own[None, ..., None],
            of_edits,
            networks.pos[:, picked.clamp(max=rows - 1)].float(),
        )

    def route(
        self, rows: Tensor, query: Tensor, sem: Tensor, pos: Tensor, neurons: Neurons
    ) -> Route:
        """Return the route of rows (R,) with these questions (R, D).

        sem, pos: as in `recall`; neurons: (R, S, n, ...), in mode reference (E, S, n, ...) for all rows.
        """
        known = self.recall(query, sem, pos) if self.hparams.external else None
        layers = range(len(self.places.sites))
        each = [{k: neurons[k][:, s] for k in self.shapes} for s in layers]
        if not self.scoped:
            each = [{k: t.flatten(0, 1) for k, t in layer.items()} for layer in each]
        return Route(rows, each, known, query)


class _Now:
    """What holds for the pass under way: its route, and what entered the attention that is running."""

    route: Route | None = None
    asking: Tensor

    def ask(self, hidden: Tensor) -> None:
        self.asking = hidden
