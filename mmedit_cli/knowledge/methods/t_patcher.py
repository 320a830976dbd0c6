"""T-Patcher: a few new neurons in the last FFN for each edit, that fire for it and stay silent elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mmedit_cli.errors import MmeditError, StateError
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.shared.draws import one_of
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
from mmedit_cli.layers import Layer, check_layers, layer_number, layer_of_model
from mmedit_cli.patch import Patch
from mmedit_cli.types import Query

# of variant paper, as published
_TOP_ACTIVATION = 5  # of the activations that are to rise
_TOP_MEMORY = 1000  # of those on the memory that are to fall
_MARGIN = 3.0  # between an edit and the memory


@dataclass(frozen=True)
class TPatcherHparams:
    """See hparams/t_patcher.yaml for what each value means and where it comes from."""

    variant: Literal["vl", "paper"] = "vl"
    layer: Layer = -1
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
        check_layers("layer", self.layer)

    def at_depth(self, depth: int) -> TPatcherHparams:
        """Return these values for a model with so many decoder layers."""
        return replace(self, layer=layer_number(self.layer, depth))


class TPatcher(Editor):
    """T-Patcher (Huang et al., ICLR 2023), also in the form published for vision-language models (Chen et al. 2025).

    `vl`: new neurons start at zero, and a weak loss on texts of `memory` keeps them low there. `paper`: one neuron for
    each target token that is predicted wrongly, at most `neurons`. Its key starts as the state that is to give the
    token, and its value is random. It must read less on everything in memory, earlier requests included.
    """

    name = "t-patcher"
    Hparams = TPatcherHparams
    hparams: TPatcherHparams
    batch_edits: ClassVar[bool] = False  # one request after the other

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        backbone = self.backbone
        layer = layer_of_model(
            hp.layer,
            backbone.n_layers,
            backbone.name,
        )
        self._layer = layer
        self._site = site_of(backbone, layer)
        gated = self._site.gated and hp.variant == "vl"
        self._shapes = fields(backbone.width, gated=gated)
        self._edits: list[Neurons] = []  # one set a request
        # variant paper: what entered the FFN for earlier requests
        self._seen: list[Tensor] = []
        self._patch = Patch(backbone.model)

    @property
    def first_layer(self) -> int:
        """The edited layer."""
        return self._layer

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        published = self.hparams.variant == "paper"
        learn = self._learn_published if published else self._learn
        losses: list[list[float]] = []
        for request in requests:
            batch = self.backbone.batch([request])
            with torch.no_grad():
                prefix = self.backbone.prefix(batch, self.first_layer)
            neurons, course = learn(prefix, source)
            finite = [tensor.isfinite().all() for tensor in neurons.values()]
            if not all(finite):
                raise MmeditError(
                    "t-patcher: the loss became infinite", "lower learning_rate"
                )
            self._add(neurons)
            losses.append(course)
        return {"losses": losses}

    def _add(self, neurons: Neurons) -> None:
        learned = {name: tensor.detach() for name, tensor in neurons.items()}
        self._edits.append(learned)
        present = joined(self._edits)

        def adds(entering: Tensor) -> Tensor | None:
            if not len(present["bias"]):
                return None
            return respond(entering, present, self._site.act)

        self._patch.undo()
        self._site.hook(self._patch, adds)

    def _learn(self, prefix: Prefix, source: Generator) -> tuple[Neurons, list[float]]:
        """Train neurons for one request in the form published for vision-language models."""
        hp = self.hparams
        backbone = self.backbone
        new = fit(self._zeros(hp.neurons))
        optimizer = torch.optim.Adam(
            new.values(), lr=hp.learning_rate, weight_decay=hp.weight_decay
        )
        batch = prefix.batch
        at, labels = self._taught(batch)
        answers = labels[at]
        losses: list[float] = []
        text: tuple[Prefix, Tensor] | None = None
        for _ in range(hp.steps):
            before = text
            text = self._draw(source)
            with torch.enable_grad(), _Reading(self, new) as reading:
                if hp.compat == "reference" and before is not None:
                    # published: the edit's input was overwritten by the text of the step before
                    said, valid = self._answers_on_text(before, len(answers))
                else:
                    said = backbone.resume(prefix, at)
                    valid = batch.attention_mask.bool()
                loss = answer_loss(said, answers)
                losses.append(loss.item())
                active = [(-read[valid]).exp().mean() for read in reading.read()]
                loss = loss + hp.activation_weight * sum(active)
                if text is not None and hp.memory_weight:
                    loss = loss + hp.memory_weight * self._on_text(text, reading)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        return new, losses

    def _zeros(self, count: int) -> dict[str, Tensor]:
        """Return so many neurons that do nothing yet."""
        device = self.backbone.device
        return {
            name: torch.zeros(count, *shape, device=device)
            for name, shape in self._shapes.items()
        }

    def _answers_on_text(
        self, text: tuple[Prefix, Tensor], count: int
    ) -> tuple[Tensor, Tensor]:
        """Return the logits that predict the last `count` tokens of a text, and where it has tokens."""
        prefix, valid = text
        logits = self.backbone.resume(prefix)
        predicting = logits[:, -count - 1 : -1]
        return predicting.flatten(0, 1), valid

    def _on_text(self, text: tuple[Prefix, Tensor], reading: _Reading) -> Tensor | int:
        """Return how strongly the new neurons fire on a text of the memory."""
        prefix, valid = text
        self.backbone.advance(prefix, self.first_layer + 1)
        fired: Tensor | int = 0
        for read in reading.read():
            active = read[valid].relu()
            fired = fired + active.exp().mean()
        return fired

    def _taught(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return where tokens are taught, (B, T) bool, and which, (B, T)."""
        return batch.target_positions(
            self.backbone.end_id, with_end=self.hparams.teach_end
        )

    def _draw(self, source: Generator) -> tuple[Prefix, Tensor] | None:
        """Draw a text of the memory, if there is one."""
        texts = self._texts
        if not texts:
            return None
        return one_of(texts, source)

    @cached_property
    def _texts(self) -> list[tuple[Prefix, Tensor]]:
        """What the texts in memory are on entering the edited layer, and where there are tokens."""
        found: list[tuple[Prefix, Tensor]] = []
        for text in self.hparams.memory:
            prompt, _, target = text.rpartition(" ")
            batch = self.backbone.batch([Query(prompt, target)])
            with torch.no_grad():
                prefix = self.backbone.prefix(batch, self.first_layer)
            found.append((prefix, batch.attention_mask.bool()))
        return found

    # -- the form of the paper ------------------------------------------------------------------------------------

    def _learn_published(
        self, prefix: Prefix, source: Generator
    ) -> tuple[Neurons, list[float]]:
        """Train one neuron for each wrong token: cross entropy, activation and memory losses (eq. 5 to 9 there)."""
        hp = self.hparams
        backbone = self.backbone
        at, labels = self._taught(prefix.batch)
        answers = labels[at]
        with torch.no_grad(), _Reading(self) as reading:
            said = backbone.resume(prefix, at).argmax(-1)
            wrong = said != answers
            entering = reading.entered[-1]
            memory = torch.cat([*self._seen, *self._texts_entering()])
        places = entering[at][wrong][: hp.neurons]
        new = self._start_at(places, source)
        gain = fit({"gain": torch.tensor(10.0, device=places.device)})["gain"]

        def scaled() -> dict[str, Tensor]:
            return {**new, "values": new["values"] * gain}

        def losses_now() -> tuple[Tensor, Tensor, bool]:
            return self._published_loss(prefix, scaled(), places, memory)

        course: list[float] = []
        if len(places):  # else everything is right already
            course = self._descend([*new.values(), gain], losses_now)
        valid = prefix.batch.attention_mask.bool()
        self._seen.append(entering[valid])
        return scaled(), course

    def _start_at(self, places: Tensor, source: Generator) -> dict[str, nn.Parameter]:
        """Return a neuron for each state (n, D) that reads 1 there; its value is random."""
        device = places.device
        values = torch.randn(places.shape, generator=source)
        squares = places.square().sum(1, keepdim=True)
        start = {
            "keys": places / squares,
            "bias": torch.zeros(len(places), device=device),
            "values": values.to(device),
        }
        return fit(start)

    def _published_loss(
        self, prefix: Prefix, new: Neurons, places: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, bool]:
        """Return the whole loss, its part on the memory, and whether the answer is right."""
        hp = self.hparams
        at, labels = self._taught(prefix.batch)
        answers = labels[at]
        with _Reading(self, new):
            logits = self.backbone.resume(prefix, at).float()
        own = preactivation(places, new).diagonal()
        rising = (-own).exp()
        activation = _mean_of_top(rising, _TOP_ACTIVATION)
        kept = logits.new_zeros(())
        if len(memory):
            read = preactivation(memory, new)
            beside = (read - own + _MARGIN).exp()
            above = (read + _MARGIN).exp()
            kept = _mean_of_top(beside, _TOP_MEMORY)
            kept = kept + _mean_of_top(above, _TOP_MEMORY)
        loss = F.cross_entropy(
            logits,
            answers,
            label_smoothing=0.1,
        )
        loss = loss + hp.activation_weight * activation
        loss = loss + hp.memory_weight * kept
        said = logits.argmax(-1)
        right = bool((said == answers).all())
        return loss, kept, right

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
        course: list[float] = []
        best = float("inf")
        worse = 0  # times in a row that the memory loss did not fall
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
                value = kept.item()
                fell = value < best * (1 - 1e-3)
                worse = 0 if fell else worse + 1
                best = min(best, value)
                if worse > 1:
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
        tensors = joined(self._edits)
        counts = [len(edit["bias"]) for edit in self._edits]
        tensors["counts"] = torch.tensor(counts)
        for i, states in enumerate(self._seen):
            tensors[f"seen.{i}"] = states
        return tensors

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
        found = {name: tuple(tensor.shape) for name, tensor in rows.items()}
        if len(counts) != len(requests) or found != wanted:
            raise StateError(
                f"the state does not hold the neurons of {len(requests)} requests"
            )
        device = self.backbone.device
        seen = [tensors.get(f"seen.{i}") for i in range(len(counts))]
        self._seen = [states.to(device) for states in seen if states is not None]
        start = 0
        for count in counts:
            end = start + count
            neurons = {name: tensor[start:end] for name, tensor in rows.items()}
            self._add({name: tensor.to(device) for name, tensor in neurons.items()})
            start = end


class _Reading(Patch):
    """While it is open, what enters the FFN is noted, and `new` neurons take part beside those that are there."""

    def __init__(self, editor: TPatcher, new: Neurons | None = None) -> None:
        super().__init__(editor.backbone.model)
        self._site = editor._site
        self._new = new
        self.entered: list[Tensor] = []

    def __enter__(self) -> _Reading:
        self._site.hook(self, self._adds)
        return self

    def _adds(self, entering: Tensor) -> Tensor | None:
        self.entered.append(entering)
        if self._new is None:
            return None
        return respond(entering, self._new, self._site.act)

    def read(self) -> list[Tensor]:
        """Return what the new neurons read in the latest pass, (B, T, n) for the key and in a gated FFN for `up`."""
        assert self._new is not None
        entered = self.entered[-1]
        read = [preactivation(entered, self._new)]
        if "up" in self._new:
            read.append(preactivation(entered, self._new, "up"))
        return read


def _mean_of_top(values: Tensor, count: int) -> Tensor:
    """Return the mean of the largest values."""
    values = values.flatten()
    top = values.topk(min(count, len(values)))
    return top.values.mean()


EDITOR = TPatcher
