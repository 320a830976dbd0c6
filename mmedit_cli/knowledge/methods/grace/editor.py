"""GRACE: a codebook of answers at one layer; a question near a stored one gets its value, any other is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.errors import MmeditError
from mmedit_cli.knowledge.methods.base import Editor, Standalone, check_shapes
from mmedit_cli.knowledge.methods.grace.codebook import (
    NONE,
    Choice,
    Codebook,
)
from mmedit_cli.knowledge.methods.grace.hparams import GraceHparams
from mmedit_cli.knowledge.methods.grace.radii import Neighbourhood
from mmedit_cli.knowledge.methods.grace.site import WrappedFfn
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.current_question import Decision
from mmedit_cli.knowledge.methods.shared.question_end import ends_of, states_at
from mmedit_cli.knowledge.methods.shared.standalone import standalone
from mmedit_cli.knowledge.models.shared.batch import Batch, Prefix
from mmedit_cli.layers import layer_of_model
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query

_ASKED = 32  # questions that are read at a time


@dataclass(frozen=True)
class _Learned:
    """What was learned for some requests: a value each (n, D), the steps taken, and the last loss that was seen."""

    values: Tensor
    steps: list[int]
    losses: list[float]


class Grace(Editor):
    """GRACE (Hartvigsen et al., NeurIPS 2023) and, with `radius: balanced`, BalancEdit (ICML 2025).

    The key of a question is what enters the FFN of one layer at the last token of the question; inside the ball of a
    stored key, the learned value of that edit replaces what leaves the FFN, from there to the end of the answer. It is
    decided once a question. Outside all balls the base model answers, bit for bit.

    Every edit keeps a key of its own, and radii follow from the keys that are there, so that an edit can be taken out
    as if it had never been made. (The published code merges edits with equal answers into one key.)
    """

    name = "grace"
    Hparams = GraceHparams
    hparams: GraceHparams
    independent = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backbone = self.backbone
        layer = layer_of_model(
            self.hparams.layer,
            backbone.n_layers,
            backbone.name,
        )
        self._layer = layer
        self._decision: Decision[Choice] = Decision(backbone, "grace")
        self._site = WrappedFfn(
            entered=backbone.anchors.path("ffn_in", layer),
            left=backbone.anchors.path("ffn_out", layer),
            rows=lambda: len(self._decision.batch.queries),
        )
        self._codebook = Codebook(split=self.hparams.radius != "fixed")
        self._patch = Patch(backbone.model)
        self._hooked = False
        # in training: values, and which row has which
        self._given: tuple[Tensor, Choice] | None = None

    @property
    def first_layer(self) -> int:
        """The layer of the codebook."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        keys = self._keys_of(requests)
        radii = self._starting_radii(requests, keys)
        values: list[Tensor] = []
        steps: list[int] = []
        losses: list[float] = []
        for part in chunks(requests, self.hparams.parallel):
            learned = self._learn(part, source)
            values.append(learned.values)
            steps += learned.steps
            losses += learned.losses
        rows = {
            "key": keys,
            "value": torch.cat(values),
            "start": radii,
        }
        self._add(rows, requests)
        return {
            "steps": steps,
            "losses": losses,
        }

    def _add(self, rows: dict[str, Tensor], requests: Sequence[Query]) -> None:
        self._hook()
        labels = []
        for request in requests:
            label = self._label(request)
            labels.append(label)
        self._codebook.insert(rows, labels)

    def _label(self, request: Query) -> tuple[int, ...]:
        """Return the tokens of the answer: edits with the same ones do not contradict each other."""
        encoded = self.backbone.encode(request)
        return tuple(encoded.ids[-encoded.n_answer :])

    def _starting_radii(self, requests: Sequence[Query], keys: Tensor) -> Tensor:
        """Return how far each key reaches if no other is near: (n,)."""
        hp = self.hparams
        if hp.radius != "balanced":
            return torch.full((len(keys),), hp.reach * self._around.spread).to(keys)
        return self._around.balanced(
            requests,
            keys,
            balance=hp.balance,
            rewordings=hp.rewordings,
        )

    @cached_property
    def _around(self) -> Neighbourhood:
        return Neighbourhood(self._keys_of)

    def _learn(self, requests: Sequence[Query], source: Generator) -> _Learned:
        """Learn a value for each request, all at once: they share nothing, and each ends when it is known."""
        hp = self.hparams
        backbone = self.backbone
        batch = backbone.batch(requests)
        with torch.no_grad():
            prefix = backbone.prefix(batch, self._layer)
        count = len(requests)
        done = self._starting_values(prefix, source)
        values = done.clone().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=hp.learning_rate)
        steps = [hp.steps] * count
        last = [float("inf")] * count
        active = list(range(count))
        part = prefix
        for step in range(hp.steps):
            losses = self._losses(part, values, active)
            for row, loss in zip(active, losses.tolist(), strict=True):
                last[row] = loss
            finished = [row for row in active if _below(last[row], hp.stop_loss)]
            for row in finished:
                steps[row] = step
                done[row] = values[row].detach()
            kept = [row for row in active if row not in finished]
            if not kept:
                break
            places = [active.index(row) for row in kept]
            optimizer.zero_grad()
            losses[places].sum().backward()
            optimizer.step()
            if finished:
                part = backbone.select(prefix, kept)
                active = kept
        else:
            done[active] = values[active].detach()
        return _Learned(done, steps, last)

    def _losses(self, prefix: Prefix, values: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the mean cross entropy of each row's answer under its value: (n,)."""
        batch = prefix.batch
        at, right = batch.target_positions(
            self.backbone.end_id, with_end=self.hparams.teach_end
        )
        with torch.enable_grad(), self._using(values, rows, batch):
            logits = self.backbone.resume(prefix, at=at)
            token_losses = F.cross_entropy(logits.float(), right[at], reduction="none")
        row_of = at.nonzero()[:, 0]
        tokens = at.sum(1)
        sums = token_losses.new_zeros(len(rows)).index_add(0, row_of, token_losses)
        losses = sums / tokens
        if not bool(losses.isfinite().all()):
            raise MmeditError("grace: the loss became infinite", "lower learning_rate")
        return losses

    @contextmanager
    def _using(
        self, values: Tensor, rows: Sequence[int], batch: Batch
    ) -> Iterator[None]:
        """Give the rows of every pass inside the block these of the values, whatever is stored."""
        self._hook()
        chosen = torch.tensor(rows, device=values.device)
        self._given = (values, self._choice(chosen, batch))
        try:
            yield
        finally:
            self._given = None
            if not len(self._codebook):
                self._unhook()

    @torch.no_grad()
    def _starting_values(self, prefix: Prefix, source: Generator) -> Tensor:
        """Return the values that training starts from: what leaves the FFN now, or random numbers: (n, D)."""
        backbone = self.backbone
        ends = ends_of(_question(prefix.batch))
        found: list[Tensor] = []

        def note(leaving: Tensor) -> None:
            found.append(states_at(leaving, ends).float())

        nobody = [NONE] * len(prefix.batch.queries)
        with self._using(ends, nobody, prefix.batch), Patch(backbone.model) as patch:
            self._site.hook(patch, lambda _entering: None, note)
            backbone.advance(prefix, self._layer + 1)
        (warm,) = found
        if self.hparams.start == "warm":
            return warm
        cold = torch.rand(warm.shape, generator=source)
        return cold.to(warm)

    def _keep(self, positions: Sequence[int]) -> bool:
        kept = list(positions)
        requests = [self.requests[i] for i in kept]
        present = self._codebook.tensors()
        rows = {name: tensor[kept] for name, tensor in present.items()}
        self._reset()
        self._add(rows, requests)
        return True

    def _reset(self) -> None:
        self._unhook()
        self._codebook.clear()

    # -- routing ------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        if self._hooked:
            return
        self._hooked = True
        self._site.hook(
            self._patch,
            self._read,
            self._replace,
        )

    def _unhook(self) -> None:
        self._patch.undo()
        self._hooked = False
        self._decision.forget()

    def _choice(self, chosen: Tensor, batch: Batch) -> Choice:
        ends = ends_of(_question(batch)).to(chosen.device)
        return Choice(chosen, ends, batch.input_ids.shape[1])

    @torch.no_grad()
    def _read(self, entering: Tensor) -> None:
        """Decide which key each question falls to when all of it enters the FFN: (B, T, D)."""
        decision = self._decision
        batch = decision.batch
        if self._given is not None or not decision.is_due(entering):
            return
        keys = states_at(entering, ends_of(_question(batch))).float()
        chosen = self._codebook.search(keys)
        decision.make(self._choice(chosen, batch))

    def _replace(self, leaving: Tensor) -> Tensor | None:
        if self._given is not None:
            values, choice = self._given
            return choice.replace(leaving, values)
        # a token that is generated has the value of its question
        choice = self._decision.made
        return choice.replace(leaving, self._codebook.values)

    @torch.no_grad()
    def _keys_of(self, queries: Sequence[Query]) -> Tensor:
        """Return the key of each question: (n, D), float32."""
        backbone = self.backbone
        found: dict[Query, Tensor] = {}
        entered: list[Tensor] = []
        for part in chunks(backbone.by_length(queries), _ASKED):
            batch = backbone.batch(part)
            prefix = backbone.prefix(batch, self._layer)
            with Patch(backbone.model) as patch:
                self._site.hook(patch, entered.append, lambda _leaving: None)
                backbone.advance(prefix, self._layer + 1)
            ends = ends_of(_question(batch))
            keys = states_at(entered.pop(), ends)
            found.update(zip(part, keys.float(), strict=True))
        return torch.stack([found[query] for query in queries])

    @torch.no_grad()
    def _rows(self, queries: Sequence[Query]) -> list[int]:
        """Return the row of the codebook that each question falls to, NONE for none."""
        nobody = [NONE] * len(queries)
        if not queries:
            return nobody
        if not len(self._codebook):
            return nobody
        keys = self._keys_of(queries)
        rows = self._codebook.search(keys)
        found: list[int] = rows.tolist()
        return found

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether it falls to a key."""
        return [row != NONE for row in self._rows(queries)]

    def routes(self, queries: Sequence[Query]) -> list[int | None]:
        """Return for each query the id of the edit whose value it gets, None where the base model answers."""
        ids: list[int | None] = [*self.ids, None]  # NONE is the last
        return [ids[row] for row in self._rows(queries)]

    # -- saving -------------------------------------------------------------------------------------------------

    def tensors(self, start: int = 0) -> dict[str, Tensor]:
        """Return the keys, values and radii of the edits from position `start` on."""
        return self._codebook.tensors(start) if len(self._codebook) else {}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        count = len(requests)
        width = self.backbone.width
        wanted = {
            "key": (count, width),
            "value": (count, width),
            "start": (count,),
        }
        held = f"keys and values of width {width} for {count} edits"
        check_shapes(tensors, wanted, held)
        device = self.backbone.device
        rows = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._add(rows, requests)

    def standalone(self) -> Standalone:
        """Return the codebook as it stands, with the file that runs it on transformers alone."""
        codebook = self._codebook
        tensors = {
            "key": codebook.keys,
            "value": codebook.values,
            "radii": codebook.radii,
            "hidden": codebook.hidden,
        }
        settings = {"ffn_entered": self._site.entered, "ffn_left": self._site.left}
        entered = self.backbone.anchors.path("layer", self._layer)
        return standalone(self, entered, tensors, settings)


def _question(batch: Batch) -> Tensor:
    """Return where the question stands, picture and words: (B, T) bool."""
    return batch.prompt_mask | batch.image_mask


def _below(loss: float, bound: float | None) -> bool:
    return bound is not None and loss < bound


EDITOR = Grace
