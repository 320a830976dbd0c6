"""UniKE: new neurons in the last layers for each edit, beside a latent memory of what the model got wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mmedit_cli.errors import HparamsError, MmeditError, StateError
from mmedit_cli.knowledge.methods.base import Standalone, TrainedEditor
from mmedit_cli.knowledge.methods.shared.neurons import Neurons
from mmedit_cli.knowledge.methods.shared.standalone import standalone
from mmedit_cli.knowledge.methods.unike.hparams import UnikeHparams
from mmedit_cli.knowledge.methods.unike.memory import Memories, Route, places_of
from mmedit_cli.knowledge.methods.unike.networks import UnikeNetworks
from mmedit_cli.knowledge.methods.unike.training import (
    Triples,
    encoder_losses,
    gather,
    last,
    scope_loss,
    states,
)
from mmedit_cli.knowledge.models.shared.batch import Batch, Prefix
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query

_TOGETHER = 32  # requests of one operation whose neurons are trained side by side


class Unike(TrainedEditor):
    """UniKE (Pan et al., NeurIPS 2024): intrinsic and external knowledge in the last decoder layers, in collaboration.

    Neurons beside the FFN say the new answer (intrinsic); what attention says is turned towards the states of right
    answers to questions like this one (external). One encoder decides how far, the other moves the neurons' values
    towards what is true (collaboration). `scoped`: all that happens for queries that are about an edit, and the edits
    are independent of each other; `reference`: for every query and with the neurons of all edits, as published.
    """

    name = "unike"
    Hparams = UnikeHparams
    architecture: ClassVar[tuple[str, ...]] = (
        "layers", "knowledge", "encoder_dim", "truth_dim", "scope_dim", "heads",
    )  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp, backbone = self.hparams, self.backbone
        if hp.layers > backbone.n_layers:
            raise HparamsError(
                f"layers {hp.layers}: {backbone.name} has {backbone.n_layers}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.networks = UnikeNetworks(backbone.width, hp)
        self.networks.to(backbone.device).eval().requires_grad_(False)
        self._memories = Memories(places_of(backbone, hp.layers), self.networks, hp)
        self._scoped, self._layer = self._memories.scoped, backbone.n_layers - hp.layers
        self._triples: Triples | None = None
        self._patch = Patch(backbone.model)
        self._parts: list[dict[str, Tensor]] = []  # the edits of each operation
        self._keys: list[tuple[Any, ...]] = []  # picture and prompt of each edit
        self._edits: dict[str, Tensor] = {}  # all of them, each tensor with E rows
        self._prefilled: tuple[Batch, Route | None] | None = None

    @property
    def first_layer(self) -> int:
        """The lowest of the edited layers."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        size = _TOGETHER if self._scoped else 1
        losses: list[list[float]] = []
        for start in range(0, len(requests), size):
            part = requests[start : start + size]
            self._patch.undo()
            with torch.no_grad():
                prefix = self.backbone.prefix(self.backbone.batch(part), self._layer)
                masks = prefix.batch.prompt_mask, prefix.batch.image_mask
                sem, pos = states(self.backbone, part, self._layer)
                edits = {
                    "scope": self.networks.scope(prefix.hidden, *masks),
                    "sem": sem,
                    "pos": pos.transpose(0, 1),
                }
            neurons, course = self._learn(prefix, edits, source)
            if not all(tensor.isfinite().all() for tensor in neurons.values()):
                raise MmeditError(
                    "unike: the loss became infinite", "lower learning_rate"
                )
            self._add({**edits, **neurons}, part)
            losses += course
        return {"losses": losses}

    def _learn(
        self, prefix: Prefix, edits: dict[str, Tensor], source: Generator
    ) -> tuple[Neurons, list[list[float]]]:
        """Train the neurons of some requests (B, S, n, ...), each on its own; return them and the losses of each."""
        hp, backbone, batch = self.hparams, self.backbone, prefix.batch
        at, labels = batch.target_positions(backbone.end_id)
        at = at if hp.teach_end else batch.predicting
        size = len(batch.queries)
        if not hp.intrinsic:
            return {k: t.detach() for k, t in self._blank(size, 0).items()}, [
                [] for _ in range(size)
            ]
        new = {
            k: nn.Parameter(t)
            for k, t in self._initial(prefix, edits, at, source).items()
        }
        decoder = None
        if (
            hp.collaboration and not self._scoped
        ):  # published: the map back from the encoding is learned in each edit
            decoder = nn.Parameter(
                torch.zeros(
                    hp.layers, backbone.width, hp.truth_dim, device=backbone.device
                )
            )
        trained = [*new.values(), *([] if decoder is None else [decoder])]
        # a step of Adam is as long whatever it is taken on: as a share of a key, which is short, it would be too long
        size_of_key = new["keys"].detach().norm(dim=-1).mean().item()
        rates = [
            hp.learning_rate * (size_of_key if k in ("keys", "up") else 1.0)
            for k in new
        ]
        rates += [hp.learning_rate] * (len(trained) - len(new))
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": r} for p, r in zip(trained, rates, strict=True)]
        )
        final, courses = self._moved(new, decoder), [[] for _ in range(size)]  # type: ignore[var-annotated]
        open_rows = torch.ones(size, dtype=torch.bool, device=at.device)
        for step in range(hp.steps + 1):
            with torch.enable_grad(), Patch(backbone.model) as patch:
                present = self._moved(new, decoder)
                route = self._training_route(prefix, edits, present)
                self._memories.attach(patch, lambda _, route=route: route)  # type: ignore[misc]
                each, right = _answer_losses(backbone.resume(prefix, at), labels, at)
                total = each.sum()
            for i in open_rows.nonzero()[:, 0].tolist():
                courses[i].append(each[i].item())
            # what is learned is what stood when it was good enough, whoever else is still learning
            final = {
                k: torch.where(_beside(open_rows, t), t.detach(), final[k])
                for k, t in present.items()
            }
            open_rows = open_rows & ~(right & (each < hp.stop_loss))
            if step == hp.steps or not open_rows.any():
                break
            gradients = torch.autograd.grad(total, trained, allow_unused=True)
            norm = sum(
                g.square().flatten(1).sum(1)
                for g in gradients[: len(new)]
                if g is not None
            ).sqrt()
            scale = (hp.clip / norm.clamp(min=1e-12)).clamp(max=1.0)
            for i, (parameter, gradient) in enumerate(
                zip(trained, gradients, strict=True)
            ):
                own = _beside(scale, parameter) if i < len(new) else scale[0]
                parameter.grad = None if gradient is None else own * gradient
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / hp.steps))
            optimizer.step()
        return {k: t.detach() for k, t in final.items()}, courses

    def _training_route(
        self, prefix: Prefix, edits: Mapping[str, Tensor], new: Neurons
    ) -> Route:
        """Return what a request is routed to while it is learned: itself, and as published all earlier ones."""
        batch, size = prefix.batch, len(prefix.batch.queries)
        sem, pos = edits["sem"][:, None], edits["pos"][:, None]
        if not self._scoped and self._parts:
            before = self._present
            sem = torch.cat((before["sem"][None], sem), 1)
            pos = torch.cat((before["pos"][None], pos), 1)
            new = (
                {k: torch.cat((before[k], t)) for k, t in new.items()}
                if new["bias"].shape[2]
                else before
            )
        rows = torch.arange(size, device=batch.input_ids.device)
        return self._memories.route(
            rows, prefix.hidden[last(batch.prompt_mask)].float(), sem, pos, new
        )

    def _blank(self, size: int, count: int) -> dict[str, Tensor]:
        shape = (size, self.hparams.layers, count)
        return {
            k: torch.zeros(*shape, *s, device=self.backbone.device)
            for k, s in self._memories.shapes.items()
        }

    @torch.no_grad()
    def _initial(
        self, prefix: Prefix, edits: dict[str, Tensor], at: Tensor, source: Generator
    ) -> dict[str, Tensor]:
        """Return neurons that read 1 where the answer is to be said, and say nothing yet."""
        hp, backbone = self.hparams, self.backbone
        new, seen = self._blank(len(at), hp.neurons), []  # type: ignore[var-annotated]
        with Patch(backbone.model) as patch:
            for site in self._memories.places.sites:
                site.hook(patch, seen.append)
            self._memories.attach(
                patch,
                lambda _: self._training_route(prefix, edits, self._blank(len(at), 0)),
            )
            backbone.advance(prefix, backbone.n_layers)
        for s, entering in enumerate(seen):
            for i, row in enumerate(entering):
                places = row[at[i]]
                places = places[
                    torch.arange(hp.neurons, device=at.device) % len(places)
                ]
                noise = torch.randn(places.shape, generator=source).to(
                    places.device
                )  # several at a place differ
                noise = (
                    0.1
                    * noise
                    * places.norm(dim=1, keepdim=True)
                    / places.shape[1] ** 0.5
                )
                new["keys"][i, s] = (places + noise) / places.square().sum(
                    1, keepdim=True
                )
        if "up" in new:
            new["up_bias"].fill_(1.0)
        return new

    def _moved(self, new: Neurons, decoder: Tensor | None) -> dict[str, Tensor]:
        """Return neurons whose values are moved towards what is true (eq. 6): the same for each of a layer."""
        if not self.hparams.collaboration:
            return dict(new)
        shift = self.networks.shift
        if decoder is not None:
            shift = torch.einsum("sdk,sk->sd", decoder, self.networks.zeta)
        return {**new, "values": new["values"] + self.hparams.beta * shift[:, None]}

    def _add(self, edits: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        self._parts.append(dict(edits))
        self._keys += [
            (request.image, request.background, request.prompt) for request in requests
        ]
        self._edits, self._prefilled = {}, None
        self._patch.undo()
        self._memories.attach(self._patch, self._routed)

    @property
    def _present(self) -> dict[str, Tensor]:
        """All edits, joined when they are asked for: adding one costs nothing."""
        if not self._edits:
            self._edits = {
                name: torch.cat([part[name] for part in self._parts])
                for name in self._parts[0]
            }
            self._parts = [self._edits]
        return self._edits

    def _keep(self, positions: Sequence[int]) -> bool:
        if not self._scoped:
            return False
        requests, kept = [self.requests[i] for i in positions], list(positions)
        edits = {name: tensor[kept] for name, tensor in self._present.items()}
        self._reset()
        self._add(edits, requests)
        return True

    def _reset(self) -> None:
        self._patch.undo()
        self._parts, self._keys, self._edits, self._prefilled = [], [], {}, None

    # -- which edit a query is about ------------------------------------------------------------------------------

    @torch.no_grad()
    def _routed(self, hidden: Tensor) -> Route | None:
        """Return what a batch that enters the first edited layer is routed to, None if no edit is about any of it."""
        batch = self.backbone.current_batch
        if batch is None:
            raise MmeditError(
                "unike must know where the question ends: ask the backbone, not the model inside",
                "use backbone.generate(queries) or backbone.logits(batch)",
            )
        if hidden.shape[1] == batch.input_ids.shape[1]:
            about = self.about(hidden, batch) if self._scoped else None
            self._prefilled = (
                batch,
                self._memories.choose(hidden, batch.prompt_mask, self._present, about),
            )
        elif self._prefilled is None or self._prefilled[0] is not batch:
            raise MmeditError(
                "unike met a part of a sequence whose beginning it has not seen"
            )
        return self._prefilled[
            1
        ]  # a token that is generated uses what its question was routed to

    @torch.no_grad()
    def about(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return which edit each query is about, -1 for none: (B,); hidden: (B, T, D) entering the first layer.

        An edit that repeats the picture and the prompt of an earlier one hides it.
        """
        masks = batch.prompt_mask, batch.image_mask
        return self._memories.about(
            hidden, *masks, self._present, self._replaced.to(hidden.device)
        )

    @property
    def _replaced(self) -> Tensor:
        newest = {key: i for i, key in enumerate(self._keys)}
        return torch.tensor([newest[key] != i for i, key in enumerate(self._keys)])

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether it is about an edit; as published every query is touched."""
        if not self._scoped:
            return super().affects(queries)
        return [about >= 0 for about in self._about(queries)]

    def explain(self, queries: Sequence[Query]) -> list[dict[int, float]] | None:
        """Return for each query the edit it is about; as published there is nothing to say."""
        if not self._scoped:
            return None
        ids = [i for operation in self.operations for i in operation.ids]
        return [
            {ids[about]: 1.0} if about >= 0 else {} for about in self._about(queries)
        ]

    @torch.no_grad()
    def _about(self, queries: Sequence[Query]) -> list[int]:
        """Return for each query the place of the edit it is about, -1 for none."""
        found: dict[Query, int] = dict.fromkeys(queries, -1)
        distinct, size = self.backbone.by_length(queries) if self.operations else [], 32
        for part in (distinct[i : i + size] for i in range(0, len(distinct), size)):
            prefix = self.backbone.prefix(self.backbone.batch(part), self._layer)
            found.update(
                zip(part, self.about(prefix.hidden, prefix.batch).tolist(), strict=True)
            )
        return [found[query] for query in queries]

    # -- training -----------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> Mapping[str, Sequence[float]]:
        """The threshold of the scope; as published there is none."""
        return {"threshold": (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)} if self._scoped else {}

    def gather(self, cases: Sequence[EditCase]) -> str:
        """Build the bank of knowledge from what the model gets wrong among the requests of these cases."""
        self._triples = gather(self.backbone, cases, self._layer)
        self.networks.know(self._triples.sem, self._triples.pos)
        wrong = len(self._triples.place)
        return f"knowledge: {wrong} requests answered otherwise than they should, {int(self.networks.rows)} kept"

    def finalize(self) -> None:
        """Fix the direction of truthfulness for the encoders as they are."""
        if self._triples is not None and self._triples.place:
            self.networks.finalize(self._triples.pos, self._triples.neg)

    def losses(
        self,
        cases: Sequence[EditCase],
        source: Generator,
        *,
        others: Sequence[EditCase] = (),
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, Tensor]:
        """Return the losses of both encoders (eq. 4 and 5) and of the scope by name, and `total`, their sum.

        They share no parameter, so that no weights between them are needed; each process computes all of it.
        """
        if self._triples is None:
            self.gather(cases)
        assert self._triples is not None
        losses = encoder_losses(
            self.networks, self._triples, cases, self.hparams.training.temperature
        )
        if self._scoped:
            losses["scope"] = scope_loss(
                self.networks.scope, self.backbone, self._layer, cases, others, source
            )
        return {**losses, "total": torch.stack(list(losses.values())).sum() / world}

    # -- saving -------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self._present) if self._parts else {}

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        hp, width, size = self.hparams, self.backbone.width, len(requests)
        count = hp.neurons if hp.intrinsic else 0
        wanted = {
            k: (size, hp.layers, count, *shape)
            for k, shape in self._memories.shapes.items()
        }
        wanted |= {
            "scope": (size, 2 * self.networks.scope.features),
            "sem": (size, width),
        }
        wanted |= {"pos": (size, hp.layers, width)}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
            raise StateError(
                f"the state does not hold {size} edits of {count} neurons in {hp.layers} layers"
            )
        self._add(
            {name: tensor.to(self.backbone.device) for name, tensor in tensors.items()},
            requests,
        )

    def standalone(self) -> Standalone:
        """Return the edits, the knowledge, and the networks that are asked when a question is answered."""
        names = (
            "mode", "external", "collaboration", "top_k", "sharpness", "share", "encoder_dim", "scope_dim", "heads",
            "threshold",
        )  # fmt: skip
        settings = {name: getattr(self.hparams, name) for name in names}
        places, anchors = self._memories.places, self.backbone.anchors
        settings |= {
            "attention": places.attention,
            "ffn": [site.paths for site in places.sites],
            "act": [
                anchors.path("ffn_act", layer)
                for layer in range(self._layer, self.backbone.n_layers)
            ],
            "gated": places.sites[0].gated,
        }
        networks, rows = self.networks, int(self.networks.rows)
        known = {
            "sem": networks.sem[:rows],
            "pos": networks.pos[:, :rows],
            "rows": networks.rows,
        }
        kept = ("semantic.", "scope.")
        known |= {
            key: value
            for key, value in networks.state_dict().items()
            if key.startswith(kept)
        }
        tensors = {
            **self._present,
            "hidden": self._replaced,
            **{f"networks.{key}": t for key, t in known.items()},
        }
        return standalone(self, places.entered, tensors, settings)


def _answer_losses(logits: Tensor, labels: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy of each row and whether all is right, (B,); logits: (n, V), of `at` (B, T)."""
    wanted, row = labels[at], at.nonzero()[:, 0]
    each = F.cross_entropy(logits.float(), wanted, reduction="none")
    zeros = each.new_zeros(len(at))
    missed = zeros.index_add(0, row, (logits.argmax(-1) != wanted).float())
    return zeros.index_add(0, row, each) / at.sum(1), missed == 0


def _beside(rows: Tensor, tensor: Tensor) -> Tensor:
    """Return (B,) shaped so that it multiplies (B, ...)."""
    return rows.view(-1, *[1] * (tensor.dim() - 1))


EDITOR = Unike
