"""WISE: a side memory of one FFN matrix for edits, and a rule by how much it reacts that says when it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.errors import MmeditError, StateError
from mmedit_cli.knowledge.methods.base import Editor, Standalone
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.current_question import Decision
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.methods.shared.question_end import only_last
from mmedit_cli.knowledge.methods.shared.standalone import standalone
from mmedit_cli.knowledge.methods.shared.unrelated import on_empty_picture, unrelated
from mmedit_cli.knowledge.methods.wise.hparams import WiseHparams
from mmedit_cli.knowledge.methods.wise.memories import (
    NONE,
    Memory,
    add_memories,
    merged,
    reaction,
    strongest,
)
from mmedit_cli.knowledge.models.shared.anchors import check_upright
from mmedit_cli.knowledge.models.shared.batch import Batch, Prefix
from mmedit_cli.layers import layer_of_model
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query

_ASKED = 32  # questions that are read at a time
_BESIDE = (
    4  # unrelated questions that are drawn for an edit, and as many about its picture
)


class Wise(Editor):
    """WISE (Wang et al., NeurIPS 2024): edits are taught to masked copies of one FFN matrix, the matrix itself stays.

    A memory answers a question where it changes what leaves the matrix by more than its own threshold; of several the
    one that is farthest above its own. It is decided once a question, from its words, and holds for the whole answer;
    otherwise the base model answers, bit for bit. What must not wake a memory are questions that ship with the package
    and the edit's own question about an empty picture. Undo makes the remaining edits again.
    """

    name = "wise"
    Hparams = WiseHparams
    hparams: WiseHparams

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backbone = self.backbone
        layer = layer_of_model(
            self.hparams.layer,
            backbone.n_layers,
            backbone.name,
        )
        self._layer = layer
        self._path = backbone.anchors.path("ffn_out", layer)
        check_upright(backbone.model, self._path, self.name)
        linear: Any = backbone.model.get_submodule(self._path)
        self._shape = (linear.out_features, linear.in_features)
        self._memories: list[Memory] = []
        # as they were before the operation under way
        self._before: list[Memory] = []
        self._patch = Patch(backbone.model)
        self._hooked = False
        # in training: a memory for every row, and what entered the matrix
        self._given: Tensor | None = None
        self._entered: Tensor | None = None
        self._decision: Decision[Tensor] = Decision(self.backbone, "wise")

    @property
    def first_layer(self) -> int:
        """The layer of the side memories."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        self._before = list(self._memories)
        taught = list(self.requests)
        losses: list[list[float]] = []
        left = list(requests)
        while left:
            if self._is_full():
                self._begin_memory(source)
            newest = self._memories[-1]
            room = self.hparams.edits_per_memory - newest.count
            size = min(room, self.hparams.batch_size)
            part = left[:size]
            left = left[size:]
            earlier = self._drawn(taught, source)
            course = self._teach(part, earlier, source)
            losses.append(course)
            taught += part
        self._hook()
        return {"losses": losses}

    def _is_full(self) -> bool:
        if not self._memories:
            return True
        newest = self._memories[-1]
        most = self.hparams.edits_per_memory
        return newest.count >= most

    def _begin_memory(self, source: Generator) -> None:
        """Begin a new memory in a subspace of its own; in mode `merge` the finished ones become one."""
        hp = self.hparams
        if hp.mode == "merge" and len(self._memories) > 1:
            self._memories = [merged(self._memories, hp.density)]
        device = self.backbone.device
        uniform = torch.rand(
            self._shape,
            generator=source,
        )
        mask = uniform < hp.mask_ratio
        empty = torch.zeros(
            self._shape,
            device=device,
        )
        begun = Memory(
            delta=empty,
            mask=mask.to(device),
            weakest=float("inf"),
            count=0,
        )
        self._memories.append(begun)

    def _drawn(self, taught: Sequence[Query], source: Generator) -> list[Query]:
        """Draw at most `replay` earlier edits of the present memory."""
        memory = self._memories[-1]
        count = memory.count
        start = len(taught) - count
        order = torch.randperm(
            count,
            generator=source,
        )
        drawn = order[: self.hparams.replay]
        earlier = []
        for i in drawn.tolist():
            request = taught[start + i]
            earlier.append(request)
        return earlier

    def _teach(
        self, requests: Sequence[Query], earlier: Sequence[Query], source: Generator
    ) -> list[float]:
        """Teach requests to the present memory, with earlier ones beside them; return the losses."""
        hp = self.hparams
        memory = self._memories[-1]
        batch = self.backbone.batch([*requests, *earlier])
        with torch.no_grad():
            prefix = self.backbone.prefix(batch, self._layer)
        delta = nn.Parameter(memory.delta.clone())
        outside = self._outside(requests, source)
        optimizer = self._optimizer(delta)
        losses: list[float] = []
        for _ in range(hp.steps):
            loss, inside = self._loss(prefix, delta, outside)
            value = loss.item()
            losses.append(value)
            if not value < float("inf"):
                raise MmeditError(
                    f"wise: the loss became {value}", "lower learning_rate"
                )
            if hp.stop_loss is not None and value < hp.stop_loss:
                break
            optimizer.zero_grad()
            loss.backward()
            self._keep_to(memory.mask, delta)
            optimizer.step()
            self._limit(delta)
        with torch.no_grad():
            _, inside = self._loss(prefix, delta, outside)
        weakest = float(inside.min())
        count = memory.count + len(requests)
        self._memories[-1] = replace(
            memory,
            delta=delta.detach(),
            weakest=min(memory.weakest, weakest),
            count=count,
        )
        return losses

    def _optimizer(self, delta: nn.Parameter) -> torch.optim.Optimizer:
        hp = self.hparams
        if hp.optimizer == "adam":
            return torch.optim.Adam([delta], lr=hp.learning_rate)
        return torch.optim.SGD([delta], lr=hp.learning_rate)

    def _keep_to(self, mask: Tensor, delta: nn.Parameter) -> None:
        """Leave gradients in the subspace of the memory alone."""
        assert delta.grad is not None
        delta.grad.mul_(mask)

    def _limit(self, delta: nn.Parameter) -> None:
        bound = self.hparams.norm_constraint
        if bound is not None:
            with torch.no_grad():
                delta.clamp_(-bound, bound)

    def _loss(
        self, prefix: Prefix, delta: Tensor, outside: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the whole loss, and how strongly the memory reacts to each request: (), (n,) (eq. 5 to 7 there)."""
        hp = self.hparams
        batch = prefix.batch
        at, labels = batch.target_positions(self.backbone.end_id, with_end=hp.teach_end)
        with torch.enable_grad(), self._using(delta):
            logits = self.backbone.resume(prefix, at=at)
            loss = answer_loss(logits, labels[at])
            assert self._entered is not None
            inside = reaction(self._entered, delta, self._positions(batch))
            entered, where = outside
            beside = reaction(entered, delta, where)
            apart = beside[:, None] - inside + hp.gamma
            loss = loss + _mean_above_zero(apart)
            loss = loss + _mean_above_zero(beside - hp.alpha)
            loss = loss + _mean_above_zero(hp.beta - inside)
        return loss, inside.detach()

    def _positions(self, batch: Batch) -> Tensor:
        """Return where a memory's reaction to a question is read: (B, T) bool."""
        words = batch.prompt_mask
        if self.hparams.positions == "question":
            return words
        return only_last(words)

    def _outside(
        self, requests: Sequence[Query], source: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return what enters the matrix, and where it is read, for questions that are not to wake the memory."""
        beside = _draw(source)
        for request in requests:
            if request.image is None:
                continue
            beside.append(on_empty_picture(request))
            background = request.background
            for other in _draw(source):
                seen = replace(
                    other,
                    image=request.image,
                    background=background,
                )
                beside.append(seen)
        return self._read(beside)

    @torch.no_grad()
    def _read(self, queries: Sequence[Query]) -> tuple[Tensor, Tensor]:
        """Return what enters the matrix for some questions, (B, T, I), and where it is read, (B, T) bool."""
        backbone = self.backbone
        batch = backbone.batch(queries)
        prefix = backbone.prefix(batch, self._layer)
        entered: list[Tensor] = []
        nothing = torch.zeros(
            self._shape,
            device=backbone.device,
        )
        with Patch(backbone.model) as patch:
            patch.hook_input(self._path, entered.append)
            with self._using(nothing):
                above = self._layer + 1
                backbone.advance(prefix, above)
        rows = len(queries)
        width = self._shape[1]
        x = entered[0].reshape(
            rows,
            -1,
            width,
        )
        return x.float(), self._positions(batch)

    @contextmanager
    def _using(self, delta: Tensor) -> Iterator[None]:
        """Give every row of a pass inside the block this memory, whatever is stored."""
        self._hook()
        self._given = delta
        try:
            yield
        finally:
            self._given = None
            self._entered = None
            if not self._memories:
                self._unhook()

    def _keep(self, positions: Sequence[int]) -> bool:
        """Return True if all edits stay, as after a failed edit; else False: the others are made again."""
        if len(positions) < len(self.requests):
            return False
        self._memories = self._before
        return True

    def _reset(self) -> None:
        self._unhook()
        self._memories = []
        self._before = []

    # -- routing ------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        if self._hooked:
            return
        self._hooked = True
        self._patch.hook_call(self._path, self._adapt)

    def _unhook(self) -> None:
        self._patch.undo()
        self._hooked = False
        self._decision.forget()

    def _adapt(self, x: Tensor, out: Tensor) -> Tensor | None:
        """Add the memory of each row to what leaves the matrix."""
        batch = self._decision.batch
        # OPT gives its FFN one row for all tokens of a batch
        rows = len(batch.queries)
        x = x.reshape(rows, -1, x.shape[-1])
        by_sequence = out.reshape(rows, -1, out.shape[-1])
        if self._given is not None:
            self._entered = x
            added = nn.functional.linear(x.float(), self._given)
            changed: Tensor | None = by_sequence + added.to(out.dtype)
        else:
            chosen = self._choose(x, batch)
            deltas = [memory.delta for memory in self._memories]
            changed = add_memories(
                x,
                by_sequence,
                deltas,
                chosen,
            )
        return None if changed is None else changed.reshape(out.shape)

    @torch.no_grad()
    def _choose(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the memory of each row, decided when the whole question is read: (B,)."""
        decision = self._decision
        if decision.is_due(x):
            at = self._positions(batch)
            decision.make(self._strongest(x, at))
        return decision.made

    def _strongest(self, x: Tensor, at: Tensor) -> Tensor:
        reactions = []
        for memory in self._memories:
            reacted = reaction(x, memory.delta, at)
            reactions.append(reacted)
        return strongest(
            torch.stack(reactions, 1),
            self._thresholds(),
        )

    def _thresholds(self) -> Tensor:
        """Return how strongly each memory has to react: (M,)."""
        values = []
        for memory in self._memories:
            value = self.hparams.act_ratio * memory.weakest
            values.append(value)
        device = self.backbone.device
        return torch.tensor(
            values,
            device=device,
        )

    @torch.no_grad()
    def _memory_of(self, queries: Sequence[Query]) -> list[int]:
        """Return the memory that answers each query, NONE for none."""
        if not self.operations:
            return [NONE] * len(queries)
        found: dict[Query, int] = {}
        distinct = self.backbone.by_length(queries)
        for part in chunks(distinct, _ASKED):
            x, at = self._read(part)
            chosen = self._strongest(x, at)
            memories = chosen.tolist()
            for query, memory in zip(part, memories, strict=True):
                found[query] = memory
        return [found[query] for query in queries]

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether a memory answers it."""
        return [memory != NONE for memory in self._memory_of(queries)]

    def explain(self, queries: Sequence[Query]) -> list[dict[int, float]]:
        """Return for each query the edits of the memory that answers it, in equal parts."""
        ids = self.ids
        shares: list[dict[int, float]] = []
        start = 0
        for memory in self._memories:
            end = start + memory.count
            own = ids[start:end]
            share = 1 / max(1, len(own))
            shares.append(dict.fromkeys(own, share))
            start = end
        shares.append({})  # NONE is the last
        return [shares[memory] for memory in self._memory_of(queries)]

    # -- saving -------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, memory in enumerate(self._memories):
            tensors[f"mask.{number}"] = memory.mask
            # of most entries it is known that they are 0
            tensors[f"delta.{number}"] = memory.delta[memory.mask]
        if not tensors:
            return tensors
        weakest = [memory.weakest for memory in self._memories]
        tensors["weakest"] = torch.tensor(
            weakest,
            dtype=torch.float64,
        )
        tensors["count"] = self._counts()
        return tensors

    def _counts(self) -> Tensor:
        """Return the number of edits of each memory: (M,)."""
        counts = []
        for memory in self._memories:
            counts.append(memory.count)
        return torch.tensor(counts)

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        none = torch.zeros(0)
        counts = tensors.get("count", none).tolist()
        wanted = {"count", "weakest"}
        for number in range(len(counts)):
            wanted |= {f"mask.{number}", f"delta.{number}"}
        if sum(counts) != len(requests) or set(tensors) != wanted:
            raise StateError(
                f"the state does not hold the memories of {len(requests)} edits"
            )
        memories = []
        for number, count in enumerate(counts):
            memory = self._memory(tensors, number, count)
            memories.append(memory)
        self._memories = memories
        self._hook()

    def _memory(self, tensors: Mapping[str, Tensor], number: int, count: int) -> Memory:
        device = self.backbone.device
        mask = tensors[f"mask.{number}"].to(device)
        values = tensors[f"delta.{number}"].to(device)
        if tuple(mask.shape) != self._shape or len(values) != int(mask.sum()):
            raise StateError(
                f"the state does not hold a memory of a matrix {self._shape}"
            )
        delta = torch.zeros(self._shape, device=device)
        delta[mask] = values
        return Memory(
            delta=delta,
            mask=mask,
            weakest=float(tensors["weakest"][number]),
            count=count,
        )

    def standalone(self) -> Standalone:
        """Return the memories and their thresholds, with the file that runs them on transformers alone."""
        deltas = []
        for memory in self._memories:
            deltas.append(memory.delta)
        tensors = {
            "delta": torch.stack(deltas),
            "threshold": self._thresholds(),
            "count": self._counts(),
        }
        settings = {
            "matrix": self._path,
            "positions": self.hparams.positions,
        }
        entered = self.backbone.anchors.path("layer", self._layer)
        return standalone(self, entered, tensors, settings)


def _draw(source: Generator) -> list[Query]:
    """Draw some of the questions that ship with the package."""
    every = unrelated()
    count = len(every)
    order = torch.randperm(
        count,
        generator=source,
    )
    drawn = order[:_BESIDE]
    return [every[i] for i in drawn.tolist()]


def _mean_above_zero(values: Tensor) -> Tensor:
    """Return the mean of the values above 0, 0 if there are none."""
    above = values.clamp(min=0)
    number = (values > 0).sum()
    return above.sum() / number.clamp(min=1)


EDITOR = Wise
