"""LiveEdit: an edit becomes a low-rank expert, and a router decides by picture and prompt which experts answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mmedit_cli.errors import DataError, HparamsError
from mmedit_cli.knowledge.methods.base import (
    TEXT_ONLY_HINT,
    Standalone,
    TrainedEditor,
    check_shapes,
)
from mmedit_cli.knowledge.methods.liveedit.experts import ExpertBank, Routing
from mmedit_cli.knowledge.methods.liveedit.hparams import LiveEditHparams
from mmedit_cli.knowledge.methods.liveedit.names import LENGTH, WIDTH
from mmedit_cli.knowledge.methods.liveedit.naming import Naming
from mmedit_cli.knowledge.methods.liveedit.networks import LiveEditNetworks
from mmedit_cli.knowledge.methods.liveedit.refining import refined
from mmedit_cli.knowledge.methods.liveedit.training import (
    Place,
    choose_items,
    draw,
    losses_of,
)
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.current_question import Decision
from mmedit_cli.knowledge.methods.shared.standalone import standalone
from mmedit_cli.knowledge.models.shared.batch import Batch
from mmedit_cli.layers import layer_number
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query

_ASKED = 32  # queries that are routed at a time
_EXPORTED_NETWORKS = (
    "input_extractor.",
    "stream_norm.",
    "vision_sharpness.",
    "prompt_sharpness.",
    "picture.",
    "name_weight.",
)
_EXPORTED_SETTINGS = (
    "module_dim",
    "heads",
    "feature_vectors",
    "sentinel_tokens",
    "variant",
    "whole_picture",
    "detail_dim",
    "visual_weight",
    "top_k",
    "margin",
)


class LiveEdit(TrainedEditor):
    """LiveEdit (Chen et al., CVPR 2025): lifelong editing with a mixture of low-rank experts.

    Experts add to the stream that leaves decoder layer `edit_layer`, at every position of queries with a picture.
    Networks write an expert in one pass. If it does not give its answer yet, a few steps of gradient refine it.
    It depends on its request alone, so edits are independent of each other and of their order; one that repeats
    the picture and the prompt of an earlier one hides it until it is undone. Which experts a query uses is decided
    from its picture and prompt once, and holds for every token that is generated.
    """

    name = "liveedit"
    Hparams = LiveEditHparams
    independent = True
    needs_image = True
    architecture: ClassVar[tuple[str, ...]] = (
        "module_dim",
        "heads",
        "rank",
        "feature_vectors",
        "lora_scale",
        "edit_layer",
        "sentinel_tokens",
        "answer_slots",
        "whole_picture",
        "detail_dim",
        "naming",
    )
    hparams: LiveEditHparams
    networks: LiveEditNetworks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        backbone = self.backbone
        edit_layer = layer_number(hp.edit_layer, backbone.n_layers)
        if not -backbone.n_layers <= edit_layer < backbone.n_layers:
            raise HparamsError(
                f"edit_layer {edit_layer}: {backbone.name} has the layers 0 to {backbone.n_layers - 1}",
                "--set edit_layer=0.66 is as deep as the published 21 of 32",
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
        self._layer = edit_layer % backbone.n_layers + 1
        with self.untrained():
            self.networks = LiveEditNetworks(
                backbone.width,
                backbone.entry_width,
                hp,
            )
        matrix = (hp.rank, backbone.width)
        self._shapes: dict[str, tuple[int, ...]] = {"u": matrix, "v": matrix}
        for name, values in self.networks.widths.items():
            self._shapes[name] = (values,)
        self._naming: Naming | None = None
        if hp.naming is not None:
            self._naming = Naming(backbone, hp.naming)
            self._shapes["names"] = (LENGTH, WIDTH)
        self._bank = ExpertBank(self._shapes, backbone.device)
        self._patch = Patch(backbone.model)
        # picture and prompt -> position of the newest expert
        self._newest: dict[tuple[Any, ...], int] = {}
        self._decision: Decision[tuple[Tensor, Routing]] = Decision(
            backbone, "liveedit"
        )
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
        backbone = self.backbone
        networks = self.networks
        batch = backbone.batch(requests)
        prefix = backbone.prefix(batch, self._layer)
        experts = networks.experts(prefix, backbone)
        names = self._names_of(batch)
        with self._set_aside():
            u, v = refined(
                networks,
                backbone,
                prefix,
                experts,
                self.hparams.refine,
                names,
            )
        mean = backbone.mean_image_tokens(prefix.batch)
        vision, prompt = networks.keys(prefix, mean)
        rows = {"u": u, "v": v, "vision": vision, "prompt": prompt}
        if names is not None:
            rows["names"] = names
        self._add(rows, requests)
        return {}

    def _add(self, rows: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        if not len(self._bank):
            self._patch.hook_input(self._entered, self._adapt)
            if self._naming is not None:
                self.backbone.before_pass.append(self._ask_for_names)
        start = len(self._bank)
        self._bank.add(rows)
        for position, request in enumerate(requests, start):
            key = (request.image, request.background, request.prompt)
            earlier = self._newest.get(key)
            if earlier is not None:
                self._bank.hide(earlier, True)
            self._newest[key] = position

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Run the base model inside: an expert is refined as if it were alone, so the order does not matter."""
        before = self._aside
        self._aside = True
        try:
            yield
        finally:
            self._aside = before

    @property
    def _entered(self) -> str:
        """The path of the module that the adapted stream enters."""
        anchors = self.backbone.anchors
        if self._layer < self.backbone.n_layers:
            return anchors.path("layer", self._layer)
        return anchors.tail[0]

    def _keep(self, positions: Sequence[int]) -> bool:
        kept = list(positions)
        requests = [self.requests[i] for i in kept]
        experts = self._bank.tensors()
        rows = {name: tensor[kept] for name, tensor in experts.items()}
        self._reset()
        if requests:
            self._add(rows, requests)
        return True

    def _reset(self) -> None:
        self._patch.undo()
        self._bank.clear()
        self._newest.clear()
        self._decision.forget()
        if self._naming is None:
            return
        self._naming.forget()
        asked_before = self.backbone.before_pass
        if self._ask_for_names in asked_before:
            asked_before.remove(self._ask_for_names)

    def _ask_for_names(self, batch: Batch) -> None:
        """Let the untouched model name the pictures of a batch before it enters."""
        if not self._aside:
            self._names_of(batch)

    def _names_of(self, batch: Batch) -> Tensor | None:
        """Return the names of each row's picture, (B, n, 1 + 2 L), where names are compared."""
        if self._naming is None:
            return None
        with self._set_aside():
            return self._naming.of(batch)

    # -- routing ------------------------------------------------------------------------------------------------

    def _adapt(self, hidden: Tensor) -> Tensor | None:
        """Add the experts to the stream (B, T, D) that enters the layer after the edit layer."""
        if self._aside:
            return None
        decision = self._decision
        if decision.is_due(hidden):
            decision.make(self.route(hidden, decision.batch))
        # a token that is generated uses what its question was routed to
        rows, routing = decision.made
        if not bool(routing.used.any()):
            return None
        stream = hidden[rows]
        normed = self.networks.stream_norm(stream.float())
        adapted = self._bank.apply(stream, normed, routing)
        return hidden.index_copy(0, rows, adapted)

    @torch.no_grad()
    def route(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Routing]:
        """Return the rows (R,) of a batch that have a picture, and which experts they use. hidden: (B, T, D)."""
        rows = batch.image_mask.any(1).nonzero()[:, 0]
        if not len(rows):
            nothing = torch.zeros(0, 0, device=rows.device)
            return rows, Routing(nothing.long(), nothing)
        networks = self.networks
        mean = self.backbone.mean_image_tokens(batch)
        asked = networks.ask(
            hidden[rows],
            batch.prompt_mask[rows],
            batch.image_mask[rows],
            mean[rows],
        )
        names = self._names_of(batch)
        if names is not None:
            names = names[rows]
        routing = networks.routing(
            self._bank,
            asked,
            names,
            self.hparams,
        )
        return rows, routing

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether any expert is chosen for it; without a picture none ever is."""
        return [bool(used) for used in self._routed(queries)]

    def explain(self, queries: Sequence[Query]) -> list[dict[int, float]]:
        """Return the weights of the experts chosen for each query, by the id of their edit, the largest first."""
        ids = self.ids
        explained: list[dict[int, float]] = []
        for used in self._routed(queries):
            largest_first = sorted(used.items(), key=lambda item: -item[1])
            weights = {ids[position]: weight for position, weight in largest_first}
            explained.append(weights)
        return explained

    @torch.no_grad()
    def _routed(self, queries: Sequence[Query]) -> list[dict[int, float]]:
        """Return the weights of the experts chosen for each query, by their position in the bank."""
        routed: dict[Query, dict[int, float]] = {}
        seeing: list[Query] = []
        if self.operations:
            seeing = [query for query in queries if query.image is not None]
        backbone = self.backbone
        for part in chunks(backbone.by_length(seeing), _ASKED):
            batch = backbone.batch(part)
            prefix = backbone.prefix(batch, self._layer)
            rows, routing = self.route(prefix.hidden, prefix.batch)
            weights = routing.by_expert()
            for row, used in zip(rows.tolist(), weights, strict=True):
                query = part[row]
                routed[query] = used
        return [routed.get(query, {}) for query in queries]

    # -- training -----------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> Mapping[str, Sequence[float]]:
        """The margin, unless routing follows the paper to the letter."""
        if self.networks.published:
            return {}
        return {"margin": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)}

    def losses(
        self,
        cases: Sequence[EditCase],
        source: Generator,
        *,
        others: Sequence[EditCase] = (),
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, Tensor]:
        """Return every loss of a batch by name, `total` among them; see `liveedit/training.py`."""
        hp = self.hparams.training
        items = choose_items(
            cases,
            source,
            generality=hp.generality_items,
            locality=hp.locality_items,
        )
        draws = draw(items, source, hp.compat)
        place = Place(self.backbone, self._layer, rank, world, self._naming)
        more = [case.request for case in others]
        return losses_of(self.networks, place, items, draws, more)

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
        rank, width = self._shapes["u"]
        held = f"{len(requests)} experts of rank {rank} and width {width}"
        check_shapes(tensors, wanted, held)
        if requests:
            self._add(tensors, requests)

    def standalone(self) -> Standalone:
        """Return the experts, the networks that route to them, and one file that needs only transformers."""
        hp = self.hparams
        tensors = self._bank.tensors()
        tensors["hidden"] = ~self._bank.visible
        networks = self.networks.state_dict()
        for name, tensor in networks.items():
            if name.startswith(_EXPORTED_NETWORKS):
                tensors[f"networks.{name}"] = tensor
        settings = {name: getattr(hp, name) for name in _EXPORTED_SETTINGS}
        settings["naming"] = None
        if self._naming is not None:
            settings |= self._naming.exported()
        return standalone(
            self,
            self._entered,
            tensors,
            settings,
        )


EDITOR = LiveEdit
