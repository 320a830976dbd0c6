"""Multi-MELO: each edit has a small LoRA block, and an index of pictures and questions chooses one for each query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mmedit_cli.errors import HparamsError, StateError, UserError
from mmedit_cli.knowledge.methods.base import (
    EditHandle,
    Editor,
    Operation,
    Standalone,
)
from mmedit_cli.knowledge.methods.multi_melo.clusters import ClusterIndex
from mmedit_cli.knowledge.methods.multi_melo.hparams import MultiMeloHparams
from mmedit_cli.knowledge.methods.multi_melo.index import (
    Keys,
    VectorIndex,
    published_distance,
    within_reach,
)
from mmedit_cli.knowledge.methods.multi_melo.keys import (
    BackboneKeys,
    HubKeys,
    KeySource,
    TokenKeys,
)
from mmedit_cli.knowledge.methods.shared import lora_adapters
from mmedit_cli.knowledge.methods.shared.block_training import train_blocks
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.current_question import Decision
from mmedit_cli.knowledge.methods.shared.lora_blocks import (
    NONE,
    BlockBank,
    Blocks,
    add_blocks,
    fresh_blocks,
    join_blocks,
    seed_of,
)
from mmedit_cli.knowledge.methods.shared.standalone import standalone
from mmedit_cli.knowledge.models.shared.anchors import sizes
from mmedit_cli.layers import layer_numbers
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query

_ASKED = 32  # queries that are routed at a time
_THRESHOLD = 0.35  # of the published distance


class MultiMelo(Editor):
    """Multi-MELO (BruthYU/MELO-V2) and, with `router: melo`, MELO (Yu et al., AAAI 2024).

    Which block a query gets is decided once, from what enters the lowest edited layer when its question is read, and
    holds for every token that is generated; a query without a block passes through the base model, bit for bit. A
    block depends on its requests alone, and radii on the edits present, so edits can be taken out one by one.
    """

    name = "multi-melo"
    Hparams = MultiMeloHparams
    hparams: MultiMeloHparams

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        backbone = self.backbone
        depth = backbone.n_layers
        numbers = layer_numbers(hp.layers, depth)
        for layer in numbers:
            if not -depth <= layer < depth:
                raise HparamsError(
                    f"layers {layer}: {backbone.name} has the layers 0 to {depth - 1}",
                    "--set layers=[0.47,0.63,0.79,0.97] are as deep as the published four of 32",
                )
        layers = sorted({layer % depth for layer in numbers})
        if layers[0] == 0:
            raise HparamsError(
                "layers 0: queries are told apart by what enters the lowest edited layer",
                "use 1 or up",
            )
        self._layer = layers[0]
        shapes: dict[str, tuple[int, int]] = {}
        for layer in layers:
            for role in hp.roles:
                path = backbone.anchors.path(role, layer)
                shapes[path] = sizes(backbone.model.get_submodule(path))
        self._bank = BlockBank(
            shapes,
            hp.rank,
            backbone.device,
        )
        self._index, self._keys = self._make_router()
        self._blocks: list[int] = []  # of each edit, the number of its block
        # of each edit, the number of the operation it was made in
        self._operation_of: list[int] = []
        self._patch = Patch(backbone.model)
        self._hooked = False
        # in training: blocks, and which row has which
        self._given: tuple[Blocks, Tensor] | None = None
        self._decision: Decision[Tensor | None] = Decision(self.backbone, "multi-melo")

    def _make_router(self) -> tuple[VectorIndex | ClusterIndex, KeySource]:
        hp = self.hparams
        place = (self.backbone, self._layer)
        published = hp.mode == "reference"
        reach = dict(vars(hp.reach))
        if hp.router == "melo":
            clusters = ClusterIndex(hp.cluster_radius, together=published)
            return clusters, TokenKeys(*place)
        if hp.router == "backbone":
            index = VectorIndex(within_reach(reach), separation=hp.separation)
            return index, BackboneKeys(*place)
        keys = HubKeys(
            *place,
            text=hp.text_encoder,
            image=hp.image_encoder,
            leaky=hp.leaky_keys,
        )
        if published:

            def distance(query: Keys, rows: Keys) -> Tensor:
                return published_distance(query, rows, keys.smallest_cosine)

            index = VectorIndex(distance, radius=_THRESHOLD, resolve=False)
            return index, keys
        del reach["state"]  # encoders beside the model have no state of it
        index = VectorIndex(within_reach(reach), separation=hp.separation)
        return index, keys

    @property
    def first_layer(self) -> int:
        """The lowest layer with blocks."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        keys = self._keys_of(requests)
        blocks, owner, course = self._train(requests)
        operation = self._next_operation()
        self._add(
            blocks,
            owner,
            keys,
            requests,
            [operation] * len(requests),
        )
        found = self._block_of(self._index.search(keys))
        own = self._blocks[-len(requests) :]
        return {
            "steps": [steps for steps, _ in course],
            "losses": [loss for _, loss in course],
            "routed": found.tolist() == own,
        }

    def _next_operation(self) -> int:
        return self._operation_of[-1] + 1 if self._operation_of else 0

    @torch.no_grad()
    def _keys_of(self, requests: Sequence[Query]) -> Keys:
        batch = self.backbone.batch(requests)
        prefix = self.backbone.prefix(batch, self._layer)
        return self._keys.keys(prefix.hidden, prefix.batch)

    def _train(
        self, requests: Sequence[Query]
    ) -> tuple[Blocks, list[int], list[tuple[int, float]]]:
        """Return the blocks of one operation, which of them each request has, and (steps, loss) of each."""
        hp = self.hparams
        size = hp.edits_per_block
        groups = list(chunks(requests, size))
        made: list[Blocks] = []
        course: list[tuple[int, float]] = []
        for some in chunks(groups, hp.parallel):
            seeds = [seed_of(group[0], self.seed) for group in some]
            fresh = fresh_blocks(
                self._bank.shapes,
                hp.rank,
                seeds,
            )
            blocks, how = train_blocks(
                self.backbone,
                self._layer,
                some,
                fresh,
                self._using,
                hp,
            )
            made.append(blocks)
            course += how
        owner = [i // size for i in range(len(requests))]
        return join_blocks(made), owner, course

    @contextmanager
    def _using(self, blocks: Blocks, index: Tensor) -> Iterator[None]:
        """Give row i of every pass inside the block index[i] of `blocks`, without a search."""
        self._hook()
        self._given = (blocks, index)
        try:
            yield
        finally:
            self._given = None
            if not self._blocks:
                self._unhook()

    def _add(
        self,
        blocks: Blocks,
        owner: Sequence[int],
        keys: Keys,
        requests: Sequence[Query],
        operations: Sequence[int],
    ) -> None:
        """Append edits: `owner` says which of `blocks` each has, `operations` which were made together."""
        numbers = self._bank.add(blocks)
        self._blocks += [numbers[i] for i in owner]
        self._operation_of += operations
        labels = [self._label(request) for request in requests]
        self._index.insert(
            keys,
            labels,
            operations,
        )
        self._hook()

    def _label(self, request: Query) -> str | int:
        """Return what makes two answers the same: their words; in MELO's code the sum of their token ids."""
        if self.hparams.mode == "reference" and self.hparams.router == "melo":
            encoded = self.backbone.encode(request)
            answer = encoded.ids[-encoded.n_answer :]
            return sum(answer)
        words = request.target.casefold().split()
        return " ".join(words)

    def _keep(self, positions: Sequence[int]) -> bool:
        """Keep some edits; blocks that an edit to be removed was trained into are trained again without it."""
        kept = list(positions)
        requests = self.requests
        keys = self._index.keys[kept]
        operations = [self._operation_of[i] for i in kept]
        blocks, owner = self._blocks_without_the_others(kept)
        self._reset()
        remaining = [requests[i] for i in kept]
        self._add(
            join_blocks(blocks),
            owner,
            keys,
            remaining,
            operations,
        )
        return True

    def _blocks_without_the_others(
        self, kept: list[int]
    ) -> tuple[list[Blocks], list[int]]:
        """Return the blocks that some edits need, without what others taught them; and which of them each edit has."""
        requests = self.requests
        gone = set(range(len(requests))) - set(kept)
        left = {self._blocks[i] for i in kept}
        shared = left & {self._blocks[i] for i in gone}
        broken = {self._operation_of[i] for i in kept if self._blocks[i] in shared}
        members_of: dict[int, list[int]] = {}
        for i in kept:
            members_of.setdefault(self._operation_of[i], []).append(i)
        made: list[Blocks] = []
        owner: list[int] = []
        count = 0
        for operation, members in members_of.items():
            if operation in broken:
                blocks, own, _ = self._train([requests[i] for i in members])
            else:
                numbers = sorted({self._blocks[i] for i in members})
                blocks = self._bank.blocks.select(numbers)
                own = [numbers.index(self._blocks[i]) for i in members]
            made.append(blocks)
            owner += [count + number for number in own]
            count += len(blocks)
        return made, owner

    def _reset(self) -> None:
        self._unhook()
        self._bank.clear()
        self._index.clear()
        self._blocks = []
        self._operation_of = []

    # -- routing ------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        if self._hooked:
            return
        self._hooked = True
        entered = self.backbone.anchors.path("layer", self._layer)
        self._patch.hook_input(entered, self._enter)
        for path in self._bank.shapes:
            self._patch.hook_call(path, partial(self._adapt, path))

    def _unhook(self) -> None:
        self._patch.undo()
        self._hooked = False
        self._decision.forget()

    def _enter(self, hidden: Tensor) -> None:
        """Decide which block each row has, when the whole question enters the lowest edited layer: (B, T, D)."""
        decision = self._decision
        batch = decision.batch
        if self._given is None and decision.is_due(hidden):
            with torch.no_grad():
                keys = self._keys.keys(hidden, batch)
                rows = self._index.search(keys)
                index = self._block_of(rows)
            has_block = index != NONE
            decision.make(index if bool(has_block.any()) else None)

    def _adapt(self, path: str, x: Tensor, out: Tensor) -> Tensor | None:
        """Add the blocks to what leaves a linear layer."""
        scale = self.hparams.scale
        if self._given is not None:
            blocks, given = self._given
            return add_blocks(
                x,
                out,
                blocks,
                path,
                given,
                scale,
            )
        # a token that is generated uses what its question was routed to
        index = self._decision.made
        if index is None:
            return None
        return add_blocks(
            x,
            out,
            self._bank.blocks,
            path,
            index,
            scale,
        )

    def _block_of(self, rows: Tensor) -> Tensor:
        """Return the block of each row of the index; -1 stays."""
        blocks = torch.tensor([*self._blocks, NONE], device=rows.device)
        return blocks[rows]

    @torch.no_grad()
    def _rows(self, queries: Sequence[Query]) -> dict[Query, int]:
        """Return for each distinct query the row of the index it goes to, -1 for none."""
        found = dict.fromkeys(queries, NONE)
        if not self._blocks:
            return found
        distinct = self.backbone.by_length(queries)
        for part in chunks(distinct, _ASKED):
            keys = self._keys_of(part)
            rows = self._index.search(keys).tolist()
            found.update(zip(part, rows, strict=True))
        return found

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether it is sent to a block."""
        rows = self._rows(queries)
        return [rows[query] != NONE for query in queries]

    def routes(self, queries: Sequence[Query]) -> list[int | None]:
        """Return for each query the id of the edit it is sent to, None where the base model answers."""
        ids: list[int | None] = [*self.ids, None]  # NONE is the last
        rows = self._rows(queries)
        return [ids[rows[query]] for query in queries]

    # -- saving -------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        if not self._blocks:
            return {}
        keys = self._index.keys
        rows = {
            "block": torch.tensor(self._blocks),
            "operation": torch.tensor(self._operation_of),
            "seen": keys.seen,
        }
        parts = {f"key.{name}": part.clone() for name, part in keys.parts.items()}
        return {**self._bank.tensors(), **rows, **parts}

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        device = self.backbone.device
        blocks = self._bank.from_tensors(tensors)
        parts = {
            name.removeprefix("key."): tensor.to(device)
            for name, tensor in tensors.items()
            if name.startswith("key.")
        }
        columns = [tensors.get(name) for name in ("block", "operation", "seen")]
        complete = all(
            rows is not None and len(rows) == len(requests)
            for rows in (*parts.values(), *columns)
        )
        if blocks is None or not parts or not complete:
            raise StateError(
                f"the state does not hold the blocks and keys of {len(requests)} edits"
            )
        owner = tensors["block"].tolist()
        if not 0 <= min(owner) <= max(owner) < len(blocks):
            raise StateError("the state names a block that it does not hold")
        keys = Keys(parts, tensors["seen"].to(device))
        operations = tensors["operation"].tolist()
        self._add(
            blocks,
            owner,
            keys,
            requests,
            operations,
        )

    def export_block(self, edit: int, folder: Path) -> None:
        """Write the block of an edit as a LoRA adapter that peft loads; raise StateError for an unknown id."""
        ids = self.ids
        if edit not in ids:
            raise StateError(f"no edit {edit} to export", f"there are {len(ids)} edits")
        number = self._blocks[ids.index(edit)]
        block = self._bank.blocks.select([number])
        lora_adapters.write(
            folder,
            block,
            scale=self.hparams.scale,
            backbone=self.backbone,
        )

    def save_adapters(self, folder: Path) -> dict[Path, tuple[Query, ...]]:
        """Write the block of each edit that its own question is routed to; the routing itself is not written."""
        requests = self.requests
        edits = self.routes(requests)
        requests_of: dict[int, list[Query]] = {}
        for request, edit in dict(zip(requests, edits, strict=True)).items():
            if edit is not None:
                requests_of.setdefault(edit, []).append(request)
        written: dict[Path, tuple[Query, ...]] = {}
        for edit, answered in requests_of.items():
            path = folder / f"edit-{edit}"
            self.export_block(edit, path)
            written[path] = tuple(answered)
        return written

    def import_block(self, folder: Path, request: Query) -> EditHandle:
        """Make an edit of a request from a LoRA adapter; raise StateError if it does not fit the edited layers."""
        hp = self.hparams
        block = lora_adapters.read(
            folder,
            self._bank.shapes,
            hp.rank,
            hp.scale,
        )
        keys = self._keys_of([request])
        self._add(
            block,
            [0],
            keys,
            [request],
            [self._next_operation()],
        )
        operation = Operation(
            (self._next_id,),
            (request,),
            {"imported": True},
        )
        self.operations.append(operation)
        self._next_id += 1
        return EditHandle(self, operation)

    def standalone(self) -> Standalone:
        """Return the blocks and the index; raise UserError if other encoders than the model route queries."""
        hp, index = self.hparams, self._index
        if hp.router != "backbone":
            is_hub = hp.router == "hub"
            beside = "encoders of the hub" if is_hub else "the clusters of MELO"
            raise UserError(
                f"multi-melo with router={hp.router} cannot be exported as a whole: {beside} route its questions",
                "--adapters exports its blocks; edits made with router=backbone are exported with what routes them",
            )
        assert isinstance(index, VectorIndex)
        tensors = self._tensors()
        tensors.pop("operation", None)
        tensors["radii"] = index.radii
        tensors["hidden"] = index.hidden
        settings = {
            "linears": list(self._bank.shapes),
            "scale": hp.scale,
            "reach": vars(hp.reach),
            "frame": self.backbone.frame,
        }
        entered = self.backbone.anchors.path("layer", self._layer)
        return standalone(self, entered, tensors, settings)


EDITOR = MultiMelo
