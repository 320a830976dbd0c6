"""UniKE: new neurons in the last layers for each edit, beside a latent memory of what the model got wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mmedit_cli.errors import HparamsError, MmeditError
from mmedit_cli.knowledge.methods.base import Standalone, TrainedEditor, check_shapes
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.current_question import Decision
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
from mmedit_cli.layers import count_above
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query

_TOGETHER = 32  # requests of one operation whose neurons are trained side by side
_ASKED = 32  # queries that are routed at a time
_EXPORTED_SETTINGS = (
    "mode",
    "external",
    "collaboration",
    "top_k",
    "sharpness",
    "share",
    "encoder_dim",
    "scope_dim",
    "heads",
    "threshold",
)


class Unike(TrainedEditor):
    """UniKE (Pan et al., NeurIPS 2024): intrinsic and external knowledge in the last decoder layers, in collaboration.

    Neurons beside the FFN produce the new answer (intrinsic). The output of attention is turned towards the states of
    right answers to similar questions (external). One encoder decides how far, the other moves the values of the
    neurons towards what is true (collaboration). In mode `scoped` this happens only for queries that are about an
    edit, and edits are independent of each other. In mode `reference` it happens for every query and with the neurons
    of all edits, as published.
    """

    name = "unike"
    Hparams = UnikeHparams
    architecture: ClassVar[tuple[str, ...]] = (
        "layers",
        "knowledge",
        "encoder_dim",
        "truth_dim",
        "scope_dim",
        "heads",
    )
    hparams: UnikeHparams
    networks: UnikeNetworks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        backbone = self.backbone
        layers = count_above(hp.layers, backbone.n_layers)
        if layers > backbone.n_layers:
            raise HparamsError(
                f"layers {layers}: {backbone.name} has {backbone.n_layers}"
            )
        with self.untrained():
            self.networks = UnikeNetworks(backbone.width, hp)
        places = places_of(backbone, layers)
        self._memories = Memories(places, self.networks, hp)
        self._scoped = self._memories.scoped
        self._layers = layers
        self._layer = backbone.n_layers - layers
        self._triples: Triples | None = None
        self._patch = Patch(backbone.model)
        self._parts: list[dict[str, Tensor]] = []  # the edits of each operation
        self._keys: list[tuple[Any, ...]] = []  # picture and prompt of each edit
        self._edits: dict[str, Tensor] = {}  # all of them, each tensor with E rows
        self._decision: Decision[Route | None] = Decision(backbone, "unike")

    @property
    def first_layer(self) -> int:
        """The lowest of the edited layers."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        size = _TOGETHER if self._scoped else 1
        losses: list[list[float]] = []
        for part in chunks(requests, size):
            losses += self._teach(part, source)
        return {"losses": losses}

    def _teach(self, requests: Sequence[Query], source: Generator) -> list[list[float]]:
        """Make the edits of some requests side by side; return the losses of each."""
        self._patch.undo()
        with torch.no_grad():
            batch = self.backbone.batch(requests)
            prefix = self.backbone.prefix(batch, self._layer)
            scope = self.networks.scope(
                prefix.hidden,
                prefix.batch.prompt_mask,
                prefix.batch.image_mask,
            )
            sem, pos = states(
                self.backbone,
                requests,
                self._layer,
            )
            edits = {"scope": scope, "sem": sem, "pos": pos.transpose(0, 1)}
        neurons, losses = self._learn(prefix, edits, source)
        if not all(tensor.isfinite().all() for tensor in neurons.values()):
            raise MmeditError("unike: the loss became infinite", "lower learning_rate")
        self._add({**edits, **neurons}, requests)
        return losses

    def _learn(
        self, prefix: Prefix, edits: dict[str, Tensor], source: Generator
    ) -> tuple[Neurons, list[list[float]]]:
        """Train the neurons of some requests (B, S, n, ...), each on its own; return them and the losses of each."""
        hp = self.hparams
        size = len(prefix.batch.queries)
        courses: list[list[float]] = [[] for _ in range(size)]
        if not hp.intrinsic:
            return self._blank(size, 0), courses
        at, labels = self._taught(prefix.batch)
        new = self._trainable(
            prefix,
            edits,
            at,
            source,
        )
        decoder = self._own_decoder()
        optimizer = _NeuronOptimizer(new, decoder, hp)
        final = self._moved(new, decoder)
        open_rows = torch.ones(
            size,
            dtype=torch.bool,
            device=at.device,
        )
        for step in range(hp.steps + 1):
            with torch.enable_grad(), Patch(self.backbone.model) as patch:
                present = self._moved(new, decoder)
                route = self._training_route(
                    prefix,
                    edits,
                    present,
                )
                self._memories.attach(patch, _always(route))
                logits = self.backbone.resume(prefix, at)
                each, right = _answer_losses(logits, labels, at)
                total = each.sum()
            for row in open_rows.nonzero()[:, 0].tolist():
                courses[row].append(each[row].item())
            # an edit keeps the neurons that were first good enough, while the others still learn
            final = {
                name: torch.where(
                    _beside(open_rows, tensor),
                    tensor.detach(),
                    final[name],
                )
                for name, tensor in present.items()
            }
            good = right & (each < hp.stop_loss)
            open_rows = open_rows & ~good
            if step == hp.steps or not open_rows.any():
                break
            optimizer.step(total, step)
        learned = {name: tensor.detach() for name, tensor in final.items()}
        return learned, courses

    def _taught(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return where tokens are taught, (B, T) bool, and which, (B, T)."""
        return batch.target_positions(
            self.backbone.end_id, with_end=self.hparams.teach_end
        )

    def _trainable(
        self, prefix: Prefix, edits: dict[str, Tensor], at: Tensor, source: Generator
    ) -> dict[str, nn.Parameter]:
        initial = self._initial(prefix, edits, at, source)
        return {name: nn.Parameter(tensor) for name, tensor in initial.items()}

    def _own_decoder(self) -> nn.Parameter | None:
        """Return the map from the encoding back to states, which each edit learns in mode `reference`."""
        hp = self.hparams
        if self._scoped or not hp.collaboration:
            return None
        zeros = torch.zeros(
            self._layers,
            self.backbone.width,
            hp.truth_dim,
            device=self.backbone.device,
        )
        return nn.Parameter(zeros)

    def _training_route(
        self, prefix: Prefix, edits: Mapping[str, Tensor], new: Neurons
    ) -> Route:
        """Return the route of a request while it is learned: itself, and in mode `reference` all earlier ones."""
        batch = prefix.batch
        sem = edits["sem"][:, None]
        pos = edits["pos"][:, None]
        if not self._scoped and self._parts:
            before = self._present
            sem = torch.cat((before["sem"][None], sem), 1)
            pos = torch.cat((before["pos"][None], pos), 1)
            has_neurons = new["bias"].shape[2] > 0
            new = _joined_edits(before, new) if has_neurons else before
        rows = torch.arange(
            len(batch.queries),
            device=batch.input_ids.device,
        )
        query = prefix.hidden[last(batch.prompt_mask)].float()
        return self._memories.route(
            rows,
            query,
            sem,
            pos,
            new,
        )

    def _blank(self, size: int, count: int) -> dict[str, Tensor]:
        """Return so many neurons for each of `size` edits: all zeros."""
        leading = (size, self._layers, count)
        device = self.backbone.device
        return {
            name: torch.zeros(*leading, *shape, device=device)
            for name, shape in self._memories.shapes.items()
        }

    @torch.no_grad()
    def _initial(
        self, prefix: Prefix, edits: dict[str, Tensor], at: Tensor, source: Generator
    ) -> dict[str, Tensor]:
        """Return neurons that read 1 where the answer is to be given, and add nothing yet."""
        new = self._blank(len(at), self.hparams.neurons)
        keys = new["keys"]
        entering = self._entering_ffn(prefix, edits)
        for layer, of_layer in enumerate(entering):
            for i, row in enumerate(of_layer):
                places = row[at[i]]
                keys[i, layer] = self._keys_for(places, source)
        if "up" in new:
            new["up_bias"].fill_(1.0)
        return new

    def _entering_ffn(self, prefix: Prefix, edits: dict[str, Tensor]) -> list[Tensor]:
        """Return what enters the FFN of each edited layer before there are neurons: (B, T, D) each."""
        seen: list[Tensor] = []
        nothing = self._blank(len(prefix.batch.queries), 0)
        with Patch(self.backbone.model) as patch:
            for site in self._memories.places.sites:
                site.hook(patch, seen.append)
            route = self._training_route(
                prefix,
                edits,
                nothing,
            )
            self._memories.attach(patch, _always(route))
            self.backbone.advance(prefix, self.backbone.n_layers)
        return seen

    def _keys_for(self, places: Tensor, source: Generator) -> Tensor:
        """Return keys whose product with the states (A, D) of the answer is about 1: (n, D)."""
        number = torch.arange(self.hparams.neurons, device=places.device)
        places = places[number % len(places)]
        # noise makes several neurons of one place differ
        noise = torch.randn(places.shape, generator=source)
        noise = 0.1 * noise.to(places.device)
        length = places.norm(dim=1, keepdim=True)
        width = places.shape[1]
        noise = noise * length / width**0.5
        squares = places.square()
        keys = places + noise
        scaled: Tensor = keys / squares.sum(1, keepdim=True)
        return scaled

    def _moved(self, new: Neurons, decoder: Tensor | None) -> dict[str, Tensor]:
        """Return neurons whose values are moved towards what is true (eq. 6): the same for each of a layer."""
        hp = self.hparams
        if not hp.collaboration:
            return dict(new)
        shift = self.networks.shift
        if decoder is not None:
            shift = torch.einsum(
                "sdk,sk->sd",
                decoder,
                self.networks.zeta,
            )
        values = new["values"] + hp.beta * shift[:, None]
        return {**new, "values": values}

    def _add(self, edits: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        self._parts.append(dict(edits))
        for request in requests:
            key = (request.image, request.background, request.prompt)
            self._keys.append(key)
        self._edits = {}
        self._decision.forget()
        self._patch.undo()
        self._memories.attach(self._patch, self._routed)

    @property
    def _present(self) -> dict[str, Tensor]:
        """All edits in one; they are joined only when they are needed, so adding one costs nothing."""
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
        kept = list(positions)
        requests = [self.requests[i] for i in kept]
        present = self._present
        edits = {name: tensor[kept] for name, tensor in present.items()}
        self._reset()
        self._add(edits, requests)
        return True

    def _reset(self) -> None:
        self._patch.undo()
        self._parts = []
        self._keys = []
        self._edits = {}
        self._decision.forget()

    # -- which edit a query is about ------------------------------------------------------------------------------

    @torch.no_grad()
    def _routed(self, hidden: Tensor) -> Route | None:
        """Return the route of a batch that enters the first edited layer; None if no edit is about any of its rows."""
        decision = self._decision
        if decision.is_due(hidden):
            batch = decision.batch
            about = self.about(hidden, batch) if self._scoped else None
            route = self._memories.choose(
                hidden,
                batch.prompt_mask,
                self._present,
                about,
            )
            decision.make(route)
        # a token that is generated uses what its question was routed to
        return decision.made

    @torch.no_grad()
    def about(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return which edit each query is about, -1 for none: (B,); hidden: (B, T, D) entering the first layer.

        An edit that repeats the picture and the prompt of an earlier one hides it.
        """
        return self._memories.about(
            hidden,
            batch.prompt_mask,
            batch.image_mask,
            self._present,
            self._replaced.to(hidden.device),
        )

    @property
    def _replaced(self) -> Tensor:
        """(E,) bool: the edits that a later one hides."""
        newest: dict[tuple[Any, ...], int] = {}
        for i, key in enumerate(self._keys):
            newest[key] = i
        replaced = [
            newest[key] != i  # a later one has this key
            for i, key in enumerate(self._keys)
        ]
        return torch.tensor(replaced)

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether it is about an edit; in mode `reference` every query is affected."""
        if not self._scoped:
            return super().affects(queries)
        return [about >= 0 for about in self._about(queries)]

    def explain(self, queries: Sequence[Query]) -> list[dict[int, float]] | None:
        """Return for each query the edit it is about; None in mode `reference`, which tells no edits apart."""
        if not self._scoped:
            return None
        weights: list[dict[int, float]] = []
        for about in self._about(queries):
            known = about >= 0
            weights.append({self.ids[about]: 1.0} if known else {})
        return weights

    @torch.no_grad()
    def _about(self, queries: Sequence[Query]) -> list[int]:
        """Return for each query the place of the edit it is about, -1 for none."""
        if not self.operations:
            return [-1] * len(queries)
        backbone = self.backbone
        found: dict[Query, int] = {}
        for part in chunks(backbone.by_length(queries), _ASKED):
            batch = backbone.batch(part)
            prefix = backbone.prefix(batch, self._layer)
            about = self.about(prefix.hidden, prefix.batch)
            places = about.tolist()
            found.update(zip(part, places, strict=True))
        return [found[query] for query in queries]

    # -- training -----------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> Mapping[str, Sequence[float]]:
        """The threshold of the scope; mode `reference` has none."""
        if not self._scoped:
            return {}
        return {"threshold": (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)}

    def gather(self, cases: Sequence[EditCase]) -> str:
        """Build the bank of knowledge from what the model gets wrong among the requests of these cases (App. C)."""
        triples = gather(self.backbone, cases, self._layer)
        self._triples = triples
        self.networks.know(triples.sem, triples.pos)
        wrong = len(triples.place)
        kept = int(self.networks.rows)
        return f"knowledge: {wrong} requests answered otherwise than they should, {kept} kept"

    def finalize(self) -> None:
        """Fix the direction of truthfulness for the encoders as they are."""
        triples = self._triples
        if triples is not None and triples.place:
            self.networks.finalize(triples.pos, triples.neg)

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
        networks = self.networks
        temperature = self.hparams.training.temperature
        losses = encoder_losses(networks, self._triples, cases, temperature)
        if self._scoped:
            losses["scope"] = scope_loss(
                networks.scope,
                self.backbone,
                self._layer,
                cases,
                others,
                source,
            )
        every = torch.stack(list(losses.values()))
        return {**losses, "total": every.sum() / world}

    # -- saving -------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self._present) if self._parts else {}

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        hp = self.hparams
        width = self.backbone.width
        size = len(requests)
        count = hp.neurons if hp.intrinsic else 0
        wanted: dict[str, tuple[int, ...]] = {
            name: (size, self._layers, count, *shape)
            for name, shape in self._memories.shapes.items()
        }
        wanted["scope"] = (size, 2 * self.networks.scope.features)
        wanted["sem"] = (size, width)
        wanted["pos"] = (size, self._layers, width)
        held = f"{size} edits of {count} neurons in {self._layers} layers"
        check_shapes(tensors, wanted, held)
        device = self.backbone.device
        edits = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._add(edits, requests)

    def standalone(self) -> Standalone:
        """Return the edits, the knowledge, and the networks that are asked when a question is answered."""
        anchors = self.backbone.anchors
        places = self._memories.places
        layers = range(self._layer, self.backbone.n_layers)
        settings = {
            **{name: getattr(self.hparams, name) for name in _EXPORTED_SETTINGS},
            "attention": places.attention,
            "ffn": [site.paths for site in places.sites],
            "act": [anchors.path("ffn_act", layer) for layer in layers],
            "gated": places.sites[0].gated,
        }
        tensors = {**self._present, "hidden": self._replaced}
        networks = self._exported_networks()
        for name, tensor in networks.items():
            tensors[f"networks.{name}"] = tensor
        return standalone(
            self,
            places.entered,
            tensors,
            settings,
        )

    def _exported_networks(self) -> dict[str, Tensor]:
        """Return the filled rows of the knowledge, and the networks that are asked when a question is answered."""
        networks = self.networks
        rows = int(networks.rows)
        exported = {
            "sem": networks.sem[:rows],
            "pos": networks.pos[:, :rows],
            "rows": networks.rows,
        }
        for name, tensor in networks.state_dict().items():
            if name.startswith(("semantic.", "scope.")):
                exported[name] = tensor
        return exported


class _NeuronOptimizer:
    """Adam on the neurons of several edits, each with a clipped gradient of its own, under a cosine schedule."""

    def __init__(
        self,
        new: Mapping[str, nn.Parameter],
        decoder: nn.Parameter | None,
        hparams: UnikeHparams,
    ) -> None:
        self._hparams = hparams
        self._neurons = len(new)
        self._parameters = list(new.values())
        # a step of Adam has the same length for every parameter; keys are short, so theirs is a share of their length
        key_length = new["keys"].detach().norm(dim=-1).mean().item()
        self._rates: list[float] = []
        for name in new:
            scale = key_length if name in ("keys", "up") else 1.0
            self._rates.append(hparams.learning_rate * scale)
        if decoder is not None:
            self._parameters.append(decoder)
            self._rates.append(hparams.learning_rate)
        groups = [
            {"params": [parameter], "lr": rate}
            for parameter, rate in zip(self._parameters, self._rates, strict=True)
        ]
        self._adam = torch.optim.Adam(groups)

    def step(self, loss: Tensor, step: int) -> None:
        """Take one step down from a loss that is the sum over the edits."""
        gradients = torch.autograd.grad(
            loss,
            self._parameters,
            allow_unused=True,
        )
        scale = self._clipping(gradients[: self._neurons])
        for i, gradient in enumerate(gradients):
            parameter = self._parameters[i]
            if gradient is None:
                parameter.grad = None
                continue
            is_neuron = i < self._neurons
            own_scale = _beside(scale, parameter) if is_neuron else scale[0]
            parameter.grad = own_scale * gradient
        angle = math.pi * step / self._hparams.steps
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(angle))
        self._adam.step()

    def _clipping(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the factor that bounds the norm of the gradient of each edit: (B,)."""
        present = [gradient for gradient in gradients if gradient is not None]
        squared_norm = present[0].new_zeros(len(present[0]))
        for gradient in present:
            squares = gradient.square().flatten(1)
            squared_norm = squared_norm + squares.sum(1)
        norm = squared_norm.sqrt()
        scale = self._hparams.clip / norm.clamp(min=1e-12)
        return scale.clamp(max=1.0)


def _always(route: Route) -> Callable[[Tensor], Route]:
    """Return a function that routes every batch in one way."""
    return lambda _hidden: route


def _joined_edits(before: Neurons, new: Neurons) -> Neurons:
    return {name: torch.cat((before[name], tensor)) for name, tensor in new.items()}


def _answer_losses(logits: Tensor, labels: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy of each row and whether all is right, (B,); logits: (n, V), of `at` (B, T)."""
    wanted = labels[at]
    row = at.nonzero()[:, 0]
    token_losses = F.cross_entropy(
        logits.float(),
        wanted,
        reduction="none",
    )
    said = logits.argmax(-1)
    wrong = (said != wanted).float()
    zeros = token_losses.new_zeros(len(at))
    missed = zeros.index_add(0, row, wrong)
    row_losses = zeros.index_add(0, row, token_losses)
    tokens = at.sum(1)
    return row_losses / tokens, missed == 0


def _beside(rows: Tensor, tensor: Tensor) -> Tensor:
    """Return (B,) shaped so that it multiplies (B, ...)."""
    ones = [1] * (tensor.dim() - 1)
    return rows.view(-1, *ones)


EDITOR = Unike
