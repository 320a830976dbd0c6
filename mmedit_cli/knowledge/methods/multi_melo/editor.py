"""Multi-MELO: an edit owns a small LoRA block, and an index of pictures and questions decides who gets which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mmedit_cli.errors import HparamsError, MmeditError, StateError, UserError
from mmedit_cli.knowledge.methods.base import Edited, Editor, Operation, Standalone
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
from mmedit_cli.knowledge.models.shared.batch import Batch
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp, backbone = self.hparams, self.backbone
        outside = [
            layer
            for layer in hp.layers
            if not -backbone.n_layers <= layer < backbone.n_layers
        ]
        if outside:
            raise HparamsError(
                f"layers {outside[0]}: {backbone.name} has the layers 0 to {backbone.n_layers - 1}",
                f"--set layers=[{backbone.n_layers // 2},{backbone.n_layers - 1}]",
            )
        layers = sorted({layer % backbone.n_layers for layer in hp.layers})
        if layers[0] == 0:
            raise HparamsError(
                "layers 0: queries are told apart by what enters the lowest edited layer",
                "use 1 or up",
            )
        self._layer = layers[0]
        paths = [
            backbone.anchors.path(role, layer) for layer in layers for role in hp.roles
        ]
        linears: list[Any] = [backbone.model.get_submodule(path) for path in paths]
        shapes = {
            path: (m.in_features, m.out_features)
            for path, m in zip(paths, linears, strict=True)
        }
        self._bank = BlockBank(shapes, hp.rank, backbone.device)
        self._index, self._keys = self._make_router()
        self._blocks: list[int] = []  # of each edit, the number of its block
        self._operation_of: list[
            int
        ] = []  # of each edit, the number of the operation it was made in
        self._patch, self._hooked = Patch(backbone.model), False
        self._given: tuple[Blocks, Tensor] | None = (
            None  # in training: blocks, and which row has which
        )
        self._routed: tuple[Batch, Tensor | None] | None = None

    def _make_router(self) -> tuple[VectorIndex | ClusterIndex, KeySource]:
        hp, at = self.hparams, (self.backbone, self._layer)
        published = hp.mode == "reference"
        if hp.router == "melo":
            return ClusterIndex(hp.cluster_radius, together=published), TokenKeys(*at)
        if hp.router == "backbone":
            return VectorIndex(
                within_reach(vars(hp.reach)), separation=hp.separation
            ), BackboneKeys(*at)
        keys = HubKeys(
            *at, text=hp.text_encoder, image=hp.image_encoder, leaky=hp.leaky_keys
        )
        if published:
            return VectorIndex(
                published_distance, radius=_THRESHOLD, resolve=False
            ), keys
        reach = {"question": hp.reach.question, "image": hp.reach.image}
        return VectorIndex(within_reach(reach), separation=hp.separation), keys

    @property
    def first_layer(self) -> int:
        """The lowest layer with blocks."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        keys = self._keys_of(requests)
        blocks, owner, told = self._train(requests)
        operation = self._operation_of[-1] + 1 if self._operation_of else 0
        self._add(blocks, owner, keys, requests, [operation] * len(requests))
        routed = (
            self._block_of(self._index.search(keys)).tolist()
            == self._blocks[-len(requests) :]
        )
        return {
            "steps": [steps for steps, _ in told],
            "losses": [loss for _, loss in told],
            "routed": routed,
        }

    @torch.no_grad()
    def _keys_of(self, requests: Sequence[Query]) -> Keys:
        prefix = self.backbone.prefix(self.backbone.batch(requests), self._layer)
        return self._keys.keys(prefix.hidden, prefix.batch)

    def _train(
        self, requests: Sequence[Query]
    ) -> tuple[Blocks, list[int], list[tuple[int, float]]]:
        """Return the blocks of one operation, which of them each request has, and (steps, loss) of each."""
        hp, size = self.hparams, self.hparams.edits_per_block
        groups = [requests[i : i + size] for i in range(0, len(requests), size)]
        made, told = [], []
        for start in range(0, len(groups), hp.parallel):
            some = groups[start : start + hp.parallel]
            fresh = fresh_blocks(
                self._bank.shapes,
                hp.rank,
                [seed_of(group[0], self.seed) for group in some],
            )
            blocks, how = train_blocks(
                self.backbone, self._layer, some, fresh, self._using, hp
            )
            made.append(blocks)
            told += how
        return join_blocks(made), [i // size for i in range(len(requests))], told

    @contextmanager
    def _using(self, blocks: Blocks, index: Tensor) -> Iterator[None]:
        """Inside, row i of every pass has block index[i] of `blocks`, and nothing is searched."""
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
        self._index.insert(
            keys, [self._label(request) for request in requests], operations
        )
        self._hook()

    def _label(self, request: Query) -> str | int:
        """Return what makes two answers the same: their words; in MELO's code the sum of their token ids."""
        if self.hparams.mode == "reference" and self.hparams.router == "melo":
            encoded = self.backbone.encode(request)
            return sum(encoded.ids[-encoded.n_answer :])
        return " ".join(request.target.casefold().split())

    def _keep(self, positions: Sequence[int]) -> bool:
        """Keep some edits; an operation that shared a block with one that goes is made again without it."""
        kept, requests = list(positions), self.requests
        keys = self._index.keys[kept] if kept else None
        gone = set(range(len(requests))) - set(kept)
        lost = {self._blocks[i] for i in gone} & {self._blocks[i] for i in kept}
        broken = {self._operation_of[i] for i in kept if self._blocks[i] in lost}
        members_of: dict[int, list[int]] = {}
        for i in kept:
            members_of.setdefault(self._operation_of[i], []).append(i)
        made: list[Blocks] = []
        owner: list[int] = []
        before = 0
        for operation, members in members_of.items():
            if operation in broken:
                blocks, own, _ = self._train([requests[i] for i in members])
            else:
                numbers = sorted({self._blocks[i] for i in members})
                blocks, own = (
                    self._bank.blocks.select(numbers),
                    [numbers.index(self._blocks[i]) for i in members],
                )
            made.append(blocks)
            owner += [before + i for i in own]
            before += len(blocks)
        operations = [self._operation_of[i] for i in kept]
        self._reset()
        if keys is not None:
            self._add(
                join_blocks(made), owner, keys, [requests[i] for i in kept], operations
            )
        return True

    def _reset(self) -> None:
        self._unhook()
        self._bank.clear()
        self._index.clear()
        self._blocks, self._operation_of = [], []

    # -- routing ------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        if self._hooked:
            return
        self._hooked = True
        self._patch.hook_input(
            self.backbone.anchors.path("layer", self._layer), self._enter
        )
        for path in self._bank.shapes:
            self._patch.hook_call(path, partial(self._adapt, path))

    def _unhook(self) -> None:
        self._patch.undo()
        self._hooked, self._routed = False, None

    def _enter(self, hidden: Tensor) -> None:
        """Decide which block each row has, when the whole question enters the lowest edited layer: (B, T, D)."""
        batch = self.backbone.current_batch
        if batch is None:
            raise MmeditError(
                "multi-melo must know the questions and pictures: ask the backbone, not the model inside",
                "use backbone.generate(queries) or backbone.logits(batch)",
            )
        if self._given is None and hidden.shape[1] == batch.input_ids.shape[1]:
            with torch.no_grad():
                index = self._block_of(
                    self._index.search(self._keys.keys(hidden, batch))
                )
            self._routed = (batch, index if bool((index != NONE).any()) else None)

    def _adapt(self, path: str, x: Tensor, out: Tensor) -> Tensor | None:
        """Add the blocks to what leaves a linear layer."""
        if self._given is not None:
            return add_blocks(
                x, out, self._given[0], path, self._given[1], self.hparams.scale
            )
        if self._routed is None or self._routed[0] is not self.backbone.current_batch:
            raise MmeditError(
                "multi-melo met a part of a sequence whose beginning it has not seen"
            )
        index = self._routed[
            1
        ]  # a token that is generated uses what its question was routed to
        return (
            None
            if index is None
            else add_blocks(x, out, self._bank.blocks, path, index, self.hparams.scale)
        )

    def _block_of(self, rows: Tensor) -> Tensor:
        """Return the block of each row of the index; -1 stays."""
        return torch.tensor([*self._blocks, NONE], device=rows.device)[rows]

    @torch.no_grad()
    def _rows(self, queries: Sequence[Query]) -> dict[Query, int]:
        """Return for each distinct query the row of the index it goes to, -1 for none."""
        distinct, found = self.backbone.by_length(queries), dict.fromkeys(queries, NONE)
        for start in range(0, len(distinct) if self._blocks else 0, _ASKED):
            part = distinct[start : start + _ASKED]
            found.update(
                zip(part, self._index.search(self._keys_of(part)).tolist(), strict=True)
            )
        return found

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether it is sent to a block."""
        rows = self._rows(queries)
        return [rows[query] != NONE for query in queries]

    def routes(self, queries: Sequence[Query]) -> list[int | None]:
        """Return for each query the id of the edit it is sent to, None where the base model answers."""
        ids: list[int | None] = [
            i for operation in self.operations for i in operation.ids
        ]
        rows = self._rows(queries)
        return [[*ids, None][rows[query]] for query in queries]

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
        return (
            self._bank.tensors()
            | rows
            | {f"key.{name}": part.clone() for name, part in keys.parts.items()}
        )

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        device, blocks = self.backbone.device, self._bank.from_tensors(tensors)
        parts = {
            n.removeprefix("key."): t.to(device)
            for n, t in tensors.items()
            if n.startswith("key.")
        }
        rows = [
            *parts.values(),
            *(
                tensors[name]
                for name in ("block", "operation", "seen")
                if name in tensors
            ),
        ]
        if (
            blocks is None
            or not parts
            or len(rows) != len(parts) + 3
            or any(len(t) != len(requests) for t in rows)
        ):
            raise StateError(
                f"the state does not hold the blocks and keys of {len(requests)} edits"
            )
        owner, operations = tensors["block"].tolist(), tensors["operation"].tolist()
        if not 0 <= min(owner) <= max(owner) < len(blocks):
            raise StateError("the state names a block that it does not hold")
        self._add(
            blocks, owner, Keys(parts, tensors["seen"].to(device)), requests, operations
        )

    def export_block(self, edit: int, folder: Path) -> None:
        """Write the block of an edit as a LoRA adapter that peft loads; raise StateError for an unknown id."""
        ids = [i for operation in self.operations for i in operation.ids]
        if edit not in ids:
            raise StateError(f"no edit {edit} to export", f"there are {len(ids)} edits")
        block = self._bank.blocks.select([self._blocks[ids.index(edit)]])
        lora_adapters.write(folder, block, self.hparams.scale, self.backbone.name)

    def save_adapters(self, folder: Path) -> dict[Path, tuple[Query, ...]]:
        """Write a block for each edit that its question finds, named after its id; who gets which is not in them."""
        routes = dict(zip(self.requests, self.routes(self.requests), strict=True))
        written = {}
        for edit in dict.fromkeys(edit for edit in routes.values() if edit is not None):
            path = folder / f"edit-{edit}"
            self.export_block(edit, path)
            written[path] = tuple(
                request for request, found in routes.items() if found == edit
            )
        return written

    def import_block(self, folder: Path, request: Query) -> Edited:
        """Make an edit of a request from a LoRA adapter; raise StateError if it does not fit the edited layers."""
        block = lora_adapters.read(
            folder, self._bank.shapes, self.hparams.rank, self.hparams.scale
        )
        operation = Operation((self._next_id,), (request,), {"imported": True})
        number = self._operation_of[-1] + 1 if self._operation_of else 0
        self._add(block, [0], self._keys_of([request]), [request], [number])
        self.operations.append(operation)
        self._next_id += 1
        return Edited(self, operation)

    def standalone(self) -> Standalone:
        """Return the blocks and the index; raise UserError where something beside the model tells queries apart."""
        hp, index = self.hparams, self._index
        if hp.router != "backbone":
            beside = (
                "encoders of the hub" if hp.router == "hub" else "the clusters of MELO"
            )
            raise UserError(
                f"multi-melo with router={hp.router} cannot be exported as a whole: {beside} route its questions",
                "--adapters exports its blocks; edits made with router=backbone are exported with what routes them",
            )
        assert isinstance(index, VectorIndex)
        tensors = {
            name: tensor
            for name, tensor in self._tensors().items()
            if name != "operation"
        }
        tensors |= {"radii": index.radii, "hidden": index.hidden}
        settings = {
            "linears": list(self._bank.shapes),
            "scale": hp.scale,
            "reach": vars(hp.reach),
            "frame": self.backbone.frame,
        }
        entered = self.backbone.anchors.path("layer", self._layer)
        return standalone(self, entered, tensors, settings)


EDITOR = MultiMelo
