"""T-Patcher: a few new neurons in the last FFN for each edit, that fire for it and stay silent elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.errors import HparamsError, MmeditError, StateError
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.methods.shared.neurons import (
    Neurons,
    fields,
    fit,
    joined,
    preactivation,
    respond,
    site_of,
)
from mmedit_cli.knowledge.models.shared.batch import Batch, Prefix
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query

_TOP_ACTIVATION, _TOP_MEMORY, _MARGIN = 5, 1000, 3.0  # variant paper, as published


@dataclass(frozen=True)
class TPatcherHparams:
    """See hparams/t_patcher.yaml for what each value means and where it comes from."""

    variant: Literal["vl", "paper"] = "vl"
    layer: int = -1
    neurons: int = 1
    steps: int = 25
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    activation_weight: float = 1e-4
    memory_weight: float = 1e-4
    memory: tuple[str, ...] = ()
    teach_end: bool = False
    compat: Literal["correct", "reference"] = "correct"

    def __post_init__(self) -> None:
        for name in ("neurons", "steps", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if any(len(text.split()) < 2 for text in self.memory):
            raise ValueError("memory: every text needs two words")
        if self.compat == "reference" and (self.variant == "paper" or not self.memory):
            raise ValueError(
                "compat reference is the published loop of variant vl, and needs texts in memory"
            )


class TPatcher(Editor):
    """T-Patcher (Huang et al., ICLR 2023), also in the form published for vision-language models (Chen et al. 2025).

    `vl`: new neurons start at zero, and are held back on texts of `memory` by a weak loss. `paper`: one neuron for
    each target token that is predicted wrongly, at most `neurons`; its key starts as the state that is to say the
    token, its value is random; on everything in memory, earlier requests included, it must read less than there.
    """

    name = "t-patcher"
    Hparams = TPatcherHparams
    batch_edits: ClassVar[bool] = False  # one request after the other

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp, backbone = self.hparams, self.backbone
        if not -backbone.n_layers <= hp.layer < backbone.n_layers:
            raise HparamsError(
                f"layer {hp.layer}: {backbone.name} has the layers 0 to {backbone.n_layers - 1}"
            )
        self._layer, self._site = (
            hp.layer % backbone.n_layers,
            site_of(backbone, hp.layer),
        )
        self._shapes = fields(
            backbone.width, gated=self._site.gated and hp.variant == "vl"
        )
        self._edits: list[Neurons] = []  # one set a request
        self._seen: list[
            Tensor
        ] = []  # variant paper: what entered the FFN for earlier requests
        self._patch = Patch(backbone.model)

    @property
    def first_layer(self) -> int:
        """The edited layer."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        learn = self._learn if self.hparams.variant == "vl" else self._learn_published
        losses = []
        for request in requests:
            batch = self.backbone.batch([request])
            with torch.no_grad():
                prefix = self.backbone.prefix(batch, self.first_layer)
            neurons, course = learn(prefix, source)
            if not all(tensor.isfinite().all() for tensor in neurons.values()):
                raise MmeditError(
                    "t-patcher: the loss became infinite", "lower learning_rate"
                )
            self._add(neurons)
            losses.append(course)
        return {"losses": losses}

    def _add(self, neurons: Neurons) -> None:
        self._edits.append({name: tensor.detach() for name, tensor in neurons.items()})
        present = joined(self._edits)
        self._patch.undo()
        self._site.hook(
            self._patch,
            lambda z: (
                respond(z, present, self._site.act) if len(present["bias"]) else None
            ),
        )

    def _learn(self, prefix: Prefix, source: Generator) -> tuple[Neurons, list[float]]:
        """Train neurons for one request in the form published for vision-language models."""
        hp, backbone, n = self.hparams, self.backbone, self.hparams.neurons
        new = fit(
            {
                k: torch.zeros(n, *s, device=backbone.device)
                for k, s in self._shapes.items()
            }
        )
        optimizer = torch.optim.Adam(
            new.values(), lr=hp.learning_rate, weight_decay=hp.weight_decay
        )
        batch, losses = prefix.batch, []
        at, labels = self._taught(batch)
        answers = labels[at]
        text: tuple[Prefix, Tensor] | None = None
        for _ in range(hp.steps):
            before, text = text, self._draw(source)
            with torch.enable_grad(), _Reading(self, new) as reading:
                if (
                    hp.compat == "reference" and before is not None
                ):  # published: the edit's input was overwritten
                    said = backbone.resume(before[0])[
                        :, -len(answers) - 1 : -1
                    ].flatten(0, 1)
                    valid = before[1]
                else:
                    said, valid = (
                        backbone.resume(prefix, at),
                        batch.attention_mask.bool(),
                    )
                loss = answer_loss(said, answers)
                losses.append(loss.item())
                loss = loss + hp.activation_weight * sum(
                    (-a[valid]).exp().mean() for a in reading.taken()
                )
                if text is not None and hp.memory_weight:
                    backbone.advance(text[0], self.first_layer + 1)
                    on_text = [a[text[1]].relu().exp().mean() for a in reading.taken()]
                    loss = loss + hp.memory_weight * sum(on_text)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        return new, losses

    def _taught(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return where tokens are taught, (B, T) bool, and which, (B, T)."""
        at, labels = batch.target_positions(self.backbone.end_id)
        return (at if self.hparams.teach_end else batch.predicting), labels

    def _draw(self, source: Generator) -> tuple[Prefix, Tensor] | None:
        texts = self._texts
        return (
            texts[int(torch.randint(len(texts), (1,), generator=source))]
            if texts
            else None
        )

    @cached_property
    def _texts(self) -> list[tuple[Prefix, Tensor]]:
        """What the texts in memory are on entering the edited layer, and where there are tokens."""
        parts = [text.rpartition(" ") for text in self.hparams.memory]
        batches = [
            self.backbone.batch([Query(prompt, target)]) for prompt, _, target in parts
        ]
        with torch.no_grad():
            return [
                (self.backbone.prefix(b, self.first_layer), b.attention_mask.bool())
                for b in batches
            ]

    # -- the form of the paper ------------------------------------------------------------------------------------

    def _learn_published(
        self, prefix: Prefix, source: Generator
    ) -> tuple[Neurons, list[float]]:
        """Train one neuron for each wrong token: cross entropy, activation and memory losses (eq. 5 to 9 there)."""
        hp, backbone, batch = self.hparams, self.backbone, prefix.batch
        at, labels = self._taught(batch)
        answers = labels[at]
        with torch.no_grad(), _Reading(self) as reading:
            wrong = backbone.resume(prefix, at).argmax(-1) != answers
            entering = reading.entered[-1]
            memory = torch.cat([*self._seen, *self._texts_entering()])
        places = entering[at][wrong][: hp.neurons]
        width = places.shape[1]
        start = torch.randn(len(places), width, generator=source).to(places.device)
        new = fit(
            {
                "keys": places / places.square().sum(1, keepdim=True),
                "bias": torch.zeros(len(places), device=places.device),
                "values": start,
            }
        )
        gain = fit({"gain": torch.tensor(10.0, device=places.device)})["gain"]

        def scaled() -> dict[str, Tensor]:
            return {**new, "values": new["values"] * gain}

        if len(places):
            losses = self._descend(
                [*new.values(), gain],
                lambda: self._published_loss(prefix, scaled(), places, memory),
            )
        else:  # everything is right already
            losses = []
        self._seen.append(entering[batch.attention_mask.bool()])
        return scaled(), losses

    def _published_loss(
        self, prefix: Prefix, new: Neurons, places: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, bool]:
        """Return the whole loss, its part on the memory, and whether the answer is right."""
        hp = self.hparams
        at, labels = self._taught(prefix.batch)
        with _Reading(self, new):
            said = self.backbone.resume(prefix, at).float()
        answers = labels[at]
        own = preactivation(places, new).diagonal()
        activation = _mean_of_top((-own).exp(), _TOP_ACTIVATION)
        kept = said.new_zeros(())
        if len(memory):
            read = preactivation(memory, new)
            kept = _mean_of_top((read - own + _MARGIN).exp(), _TOP_MEMORY)
            kept = kept + _mean_of_top((read + _MARGIN).exp(), _TOP_MEMORY)
        loss = F.cross_entropy(said, answers, label_smoothing=0.1)
        right = bool((said.argmax(-1) == answers).all())
        return (
            loss + hp.activation_weight * activation + hp.memory_weight * kept,
            kept,
            right,
        )

    def _descend(
        self, parameters: list[Any], losses: Callable[[], tuple[Tensor, Tensor, bool]]
    ) -> list[float]:
        """Take at most `steps` steps; from 100 on stop once the answer is right and the memory loss has settled."""
        hp = self.hparams
        optimizer = torch.optim.Adam(
            parameters, lr=hp.learning_rate, weight_decay=hp.weight_decay
        )
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=1, threshold=0.05
        )
        course, best, patience = [], float("inf"), 0
        for step in range(hp.steps):
            with torch.enable_grad():
                loss, kept, right = losses()
                optimizer.zero_grad()
                loss.backward()
            course.append(loss.item())
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            if step % 25 == 24:
                schedule.step(course[-1])
            if step >= 100 and right:
                better = kept.item() < best * (1 - 1e-3)
                best, patience = min(best, kept.item()), 0 if better else patience + 1
                if patience > 1:
                    break
        return course

    def _texts_entering(self) -> list[Tensor]:
        """Return what enters the FFN for every token of the texts in memory: (tokens, D) each."""
        with _Reading(self) as reading:
            for prefix, _ in self._texts:
                self.backbone.advance(prefix, self.first_layer + 1)
        return [entered[0] for entered in reading.entered]

    # -- taking back, saving ------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._patch.undo()
        self._edits.clear()
        self._seen.clear()

    def _tensors(self) -> dict[str, Tensor]:
        if not self._edits:
            return {}
        counts = torch.tensor([len(edit["bias"]) for edit in self._edits])
        seen = {f"seen.{i}": states for i, states in enumerate(self._seen)}
        return {**joined(self._edits), "counts": counts, **seen}

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        rows = {
            name: tensor for name, tensor in tensors.items() if name in self._shapes
        }
        counts = tensors.get("counts", torch.zeros(0)).tolist()
        wanted = {name: (sum(counts), *shape) for name, shape in self._shapes.items()}
        if (
            len(counts) != len(requests)
            or {name: tuple(t.shape) for name, t in rows.items()} != wanted
        ):
            raise StateError(
                f"the state does not hold the neurons of {len(requests)} requests"
            )
        device = self.backbone.device
        split = {name: tensor.to(device).split(counts) for name, tensor in rows.items()}
        self._seen = [
            tensors[f"seen.{i}"].to(device)
            for i in range(len(counts))
            if f"seen.{i}" in tensors
        ]
        for i in range(len(counts)):
            self._add({name: parts[i] for name, parts in split.items()})


class _Reading(Patch):
    """While open: what enters the FFN is noted, and `new` neurons take part beside those that are there."""

    def __init__(self, editor: TPatcher, new: Neurons | None = None) -> None:
        super().__init__(editor.backbone.model)
        self._site, self._new = editor._site, new
        self.entered: list[Tensor] = []

    def __enter__(self) -> _Reading:
        self._site.hook(self, self._adds)
        return self

    def _adds(self, entering: Tensor) -> Tensor | None:
        self.entered.append(entering)
        return (
            None if self._new is None else respond(entering, self._new, self._site.act)
        )

    def taken(self) -> list[Tensor]:
        """Return what the new neurons read in the latest pass, (B, T, n) for the key and in a gated FFN for `up`."""
        assert self._new is not None
        names = ("keys", "up") if "up" in self._new else ("keys",)
        return [preactivation(self.entered[-1], self._new, name) for name in names]


def _mean_of_top(values: Tensor, count: int) -> Tensor:
    return values.flatten().topk(min(count, values.numel())).values.mean()


EDITOR = TPatcher
