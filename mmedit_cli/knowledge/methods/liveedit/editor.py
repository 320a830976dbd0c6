"""LiveEdit: an edit becomes a low-rank expert, and a router decides by picture and prompt which experts answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mmedit_cli.errors import DataError, HparamsError, MmeditError, StateError
from mmedit_cli.knowledge.methods.base import TEXT_ONLY_HINT, Standalone, TrainedEditor
from mmedit_cli.knowledge.methods.liveedit.experts import ExpertBank, Routing, choose
from mmedit_cli.knowledge.methods.liveedit.hparams import LiveEditHparams
from mmedit_cli.knowledge.methods.liveedit.networks import LiveEditNetworks
from mmedit_cli.knowledge.methods.liveedit.refining import refined
from mmedit_cli.knowledge.methods.liveedit.training import (
    Place,
    choose_items,
    draw,
    losses_of,
)
from mmedit_cli.knowledge.methods.shared.standalone import standalone
from mmedit_cli.knowledge.models.shared.batch import Batch
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query


class LiveEdit(TrainedEditor):
    """LiveEdit (Chen et al., CVPR 2025): lifelong editing with a mixture of low-rank experts.

    Experts add to the stream that leaves decoder layer `edit_layer`, at every position of queries with a picture.
    An expert is written by networks and, where it does not say its answer yet, refined by a few steps of gradient.
    It depends on its request alone, so edits are independent of each other and of their order; one that repeats
    the picture and the prompt of an earlier one hides it until it is undone. Which experts a query uses is decided
    from its picture and prompt once, and holds for every token that is generated.
    """

    name = "liveedit"
    Hparams = LiveEditHparams
    independent = True
    needs_image = True
    architecture: ClassVar[tuple[str, ...]] = (
        "module_dim", "heads", "rank", "feature_vectors", "lora_scale", "edit_layer", "sentinel_tokens",
        "answer_slots", "whole_picture", "detail_dim",
    )  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp, backbone = self.hparams, self.backbone
        if not -backbone.n_layers <= hp.edit_layer < backbone.n_layers:
            raise HparamsError(
                f"edit_layer {hp.edit_layer}: {backbone.name} has the layers 0 to {backbone.n_layers - 1}",
                f"--set edit_layer={round(backbone.n_layers * 2 / 3) - 1} is as deep as the published 21 of 32",
            )
        if backbone.width % hp.heads:
            raise HparamsError(
                f"heads {hp.heads}: must divide the width {backbone.width} of {backbone.name}"
            )
        if hp.answer_slots and backbone.entry_width != backbone.width:
            raise HparamsError(
                f"answer_slots: {backbone.name} embeds words in {backbone.entry_width} numbers",
                "answer_slots=false",
            )
        self._layer = hp.edit_layer % backbone.n_layers + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.networks = LiveEditNetworks(backbone.width, backbone.entry_width, hp)
        self.networks.to(backbone.device).eval().requires_grad_(False)
        expert = (hp.rank, backbone.width)
        features = {name: (values,) for name, values in self.networks.widths.items()}
        self._shapes: dict[str, tuple[int, ...]] = {
            "u": expert,
            "v": expert,
            **features,
        }
        self._bank = ExpertBank(self._shapes, backbone.device)
        self._patch = Patch(backbone.model)
        self._newest: dict[
            tuple[Any, ...], int
        ] = {}  # picture and prompt -> position of the newest expert
        self._prefilled: tuple[Batch, Tensor, Routing] | None = None
        self._aside = False

    @property
    def first_layer(self) -> int:
        """The layer after the edit layer: experts change what enters it."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        if any(request.image is None for request in requests):
            raise DataError(
                "liveedit routes by the picture: every request needs an image",
                TEXT_ONLY_HINT,
            )
        prefix = self.backbone.prefix(self.backbone.batch(requests), self._layer)
        experts = self.networks.experts(prefix, self.backbone)
        with self._set_aside():
            u, v = refined(
                self.networks, self.backbone, prefix, experts, self.hparams.refine
            )
        vision, prompt = self.networks.keys(
            prefix, self.backbone.mean_image_tokens(prefix.batch)
        )
        self._add({"u": u, "v": v, "vision": vision, "prompt": prompt}, requests)
        return {}

    def _add(self, rows: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        if not len(self._bank):
            self._patch.hook_input(self._entered, self._adapt)
        start = len(self._bank)
        self._bank.add(rows)
        for position, request in enumerate(requests, start):
            key = (request.image, request.background, request.prompt)
            if key in self._newest:
                self._bank.hide(self._newest[key], True)
            self._newest[key] = position

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Run the base model inside: an expert is refined as if it were alone, so that no order matters."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    @property
    def _entered(self) -> str:
        """The path of the module that the adapted stream enters."""
        anchors = self.backbone.anchors
        return (
            anchors.path("layer", self._layer)
            if self._layer < self.backbone.n_layers
            else anchors.tail[0]
        )

    def _keep(self, positions: Sequence[int]) -> bool:
        requests = [self.requests[i] for i in positions]
        rows = {
            name: tensor[list(positions)]
            for name, tensor in self._bank.tensors().items()
        }
        self._reset()
        if requests:
            self._add(rows, requests)
        return True

    def _reset(self) -> None:
        self._patch.undo()
        self._bank.clear()
        self._newest.clear()
        self._prefilled = None

    # -- routing ------------------------------------------------------------------------------------------------

    def _adapt(self, hidden: Tensor) -> Tensor | None:
        """Add the experts to the stream (B, T, D) that enters the layer after the edit layer."""
        if self._aside:
            return None
        batch = self.backbone.current_batch
        if batch is None:
            raise MmeditError(
                "liveedit must know where the picture is: ask the backbone, not the model inside",
                "use backbone.generate(queries) or backbone.logits(batch)",
            )
        if hidden.shape[1] == batch.input_ids.shape[1]:
            rows, routing = self.route(hidden, batch)
            self._prefilled = (batch, rows, routing)
        elif self._prefilled is None or self._prefilled[0] is not batch:
            raise MmeditError(
                "liveedit met a part of a sequence whose beginning it has not seen"
            )
        _, rows, routing = (
            self._prefilled
        )  # a token that is generated uses what its question was routed to
        if not bool(routing.used.any()):
            return None
        stream = hidden[rows]
        normed = self.networks.stream_norm(stream.float())
        return hidden.index_copy(0, rows, self._bank.apply(stream, normed, routing))

    @torch.no_grad()
    def route(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Routing]:
        """Return the rows (R,) of a batch that have a picture, and which experts they use. hidden: (B, T, D)."""
        rows = batch.image_mask.any(1).nonzero()[:, 0]
        if not len(rows):
            nothing = torch.zeros(0, 0, device=rows.device)
            return rows, Routing(nothing.long(), nothing)
        networks, bank = self.networks, self._bank
        vision, prompt, against = networks.ask(
            hidden[rows],
            batch.prompt_mask[rows],
            batch.image_mask[rows],
            self.backbone.mean_image_tokens(batch)[rows],
        )
        margin = bank.compare("vision", partial(networks.similarity, vision)) - against
        score = networks.score(
            bank.compare("prompt", partial(networks.similarity, prompt)), margin
        )
        decisive = margin if networks.published else score
        keep = (decisive > self.hparams.margin) & bank.visible
        return rows, choose(keep, score, self.hparams.top_k, gated=networks.published)

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether any expert is chosen for it; without a picture none ever is."""
        return [bool(used) for used in self._routed(queries)]

    def explain(self, queries: Sequence[Query]) -> list[dict[int, float]]:
        """Return the weights of the experts chosen for each query, by the id of their edit, the largest first."""
        ids = [i for operation in self.operations for i in operation.ids]
        routed = self._routed(queries)
        return [
            {ids[at]: w for at, w in sorted(used.items(), key=lambda item: -item[1])}
            for used in routed
        ]

    @torch.no_grad()
    def _routed(self, queries: Sequence[Query]) -> list[dict[int, float]]:
        """Return the weights of the experts chosen for each query, by their position in the bank."""
        answers: dict[Query, dict[int, float]] = {query: {} for query in queries}
        seeing = self.backbone.by_length(
            query for query in queries if query.image is not None
        )
        size = 32
        for part in (
            seeing[i : i + size]
            for i in range(0, len(seeing) if self.operations else 0, size)
        ):
            prefix = self.backbone.prefix(self.backbone.batch(part), self._layer)
            rows, routing = self.route(prefix.hidden, prefix.batch)
            for row, index, weight in zip(
                rows.tolist(),
                routing.index.tolist(),
                routing.weight.tolist(),
                strict=True,
            ):
                answers[part[row]] = {
                    i: w for i, w in zip(index, weight, strict=True) if w > 0
                }
        return [answers[query] for query in queries]

    # -- training -----------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> Mapping[str, Sequence[float]]:
        """The margin, unless routing follows the paper to the letter."""
        return (
            {}
            if self.networks.published
            else {"margin": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)}
        )

    def losses(
        self,
        cases: Sequence[EditCase],
        source: Generator,
        *,
        others: Sequence[EditCase] = (),
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, Tensor]:
        """Return every loss of a batch by name, `total` among them (sections 2.5 and 2.6 of the published code)."""
        hp = self.hparams.training
        items = choose_items(cases, source, hp.generality_items, hp.locality_items)
        draws = draw(items, source, hp.compat)
        place = Place(self.backbone, self._layer, rank, world)
        return losses_of(
            self.networks, place, items, draws, [case.request for case in others]
        )

    # -- saving -------------------------------------------------------------------------------------------------

    def tensors(self, start: int = 0) -> dict[str, Tensor]:
        """Return the experts of the edits from position `start` on, without a copy of the others."""
        return self._bank.tensors(start)

    def _tensors(self) -> dict[str, Tensor]:
        return self._bank.tensors()

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        wanted = {name: (len(requests), *shape) for name, shape in self._shapes.items()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
            rank, width = self._shapes["u"]
            raise StateError(
                f"the state does not hold {len(requests)} experts of rank {rank} and width {width}"
            )
        if requests:
            self._add(tensors, requests)

    def standalone(self) -> Standalone:
        """Return the experts, what routes them, and one file that needs transformers only."""
        names = (
            "module_dim", "heads", "feature_vectors", "sentinel_tokens", "variant", "whole_picture", "detail_dim",
            "visual_weight", "top_k", "margin",
        )  # fmt: skip
        kept = (
            "input_extractor.",
            "stream_norm.",
            "vision_sharpness.",
            "prompt_sharpness.",
            "picture.",
        )
        state = {
            key: value
            for key, value in self.networks.state_dict().items()
            if key.startswith(kept)
        }
        tensors = {**self._bank.tensors(), "hidden": ~self._bank.visible}
        tensors |= {f"networks.{key}": value for key, value in state.items()}
        settings = {name: getattr(self.hparams, name) for name in names}
        return standalone(self, self._entered, tensors, settings)


EDITOR = LiveEdit
