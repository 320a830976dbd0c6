"""The base class of personalizers: they learn a concept from pictures, draw it by its token, save and load it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Generator, Tensor

from mmedit_cli.drawing.models.prompts import check_token
from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion
from mmedit_cli.errors import DataError, StateError
from mmedit_cli.hparams import to_dict
from mmedit_cli.identity import same_model
from mmedit_cli.pictures import check_picture
from mmedit_cli.runtime import generator
from mmedit_cli.storage import read_tensors, write_tensors
from mmedit_cli.types import Concept

FORMAT = "1"  # of concept files; another is refused
Tick = Callable[[int], None]


@dataclass(frozen=True)
class LearnedConcept:
    """A learned concept: its token, the word for what it is, its tensors, and texts that the method needs (`facts`).

    `info` describes the training (steps, losses) and is not saved with the concept.
    """

    token: str
    superclass: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


class Personalizer(AbstractContextManager["Personalizer"], ABC):
    """Teaches a text-to-image model concepts, each from a few pictures.

    `several` is true if a model can hold more than one concept at a time. `routes` is true if a concept acts only on
    prompts that name it. Leaving the personalizer as a context manager forgets all concepts: the model is then the
    base model, bit for bit.
    """

    name: ClassVar[str]
    Hparams: ClassVar[type]
    several: ClassVar[bool] = True
    routes: ClassVar[bool] = False

    def __init__(self, model: StableDiffusion, hparams: Any, *, seed: int = 0) -> None:
        self.model = model
        self.hparams = hparams
        self.seed = seed
        self.concepts: dict[str, LearnedConcept] = {}
        self.identifiers: set[str] = set()  # words that concepts have been given

    # -- what a method has to say -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def steps(self) -> int:
        """How often `tick(1)` is called while a concept is learned."""

    @abstractmethod
    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> LearnedConcept:
        """Learn a concept, and leave the model as it was, even after an error."""

    @abstractmethod
    def _attach(self, learned: LearnedConcept) -> None:
        """Put a concept into the model; if it does not fit, leave the model as it was and raise StateError."""

    @abstractmethod
    def _detach(self, token: str) -> None:
        """Take a concept out of the model."""

    # -- the verbs ----------------------------------------------------------------------------------------------

    def learn(self, concept: Concept, *, tick: Tick = lambda n: None) -> LearnedConcept:
        """Learn a concept from its pictures and put it into the model.

        After an error, the model and the other concepts are as they were. Raises DataError for pictures, a token or a
        superclass that cannot be used, StateError for a token that is taken.
        """
        check_concept(concept)
        self._check_free(concept.token)
        others = list(self.concepts.values())
        self.close()  # every concept is learned on the base model
        try:
            learned = self._learn(concept, generator(self.seed), tick)
        finally:
            for other in others:
                self.add(other)
        self.add(learned)
        return learned

    def add(self, learned: LearnedConcept) -> None:
        """Put a concept that was learned into the model; raise StateError if it does not fit."""
        token = learned.token
        self._check_free(token)
        self._attach(learned)
        identifier = learned.facts.get("identifier", token)
        self.identifiers.add(identifier)
        self.concepts[token] = learned

    def remove(self, token: str) -> LearnedConcept:
        """Take one concept out of the model and return it; raise StateError if it is not in the model."""
        if token not in self.concepts:
            raise StateError(
                f"no concept {token} here",
                f"there are: {', '.join(self.concepts) or 'none'}",
            )
        self._detach(token)
        return self.concepts.pop(token)

    def close(self) -> None:
        """Take all concepts out of the model."""
        for token in list(self.concepts):
            self.remove(token)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_free(self, token: str) -> None:
        if token in self.model.words:
            raise StateError(
                f"{token}: taken already",
                "remove that concept first, or choose another token",
            )
        if self.concepts and not self.several:
            raise StateError(
                f"{self.name} holds one concept a model, {next(iter(self.concepts))}",
                "remove it first",
            )

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, token: str, path: Path) -> None:
        """Write one concept to a safetensors file."""
        learned = self.concepts[token]
        defaults = to_dict(self.Hparams())
        changed = {}
        for key, value in to_dict(self.hparams).items():
            if value != defaults[key]:
                changed[key] = value
        metadata = {
            **self._identity(),
            "token": token,
            "superclass": learned.superclass,
            "seed": str(self.seed),
            **learned.facts,
            "hparams": json.dumps(changed, separators=(",", ":")),
        }
        write_tensors(path, learned.tensors, metadata)

    def load(self, path: Path) -> LearnedConcept:
        """Put the concept of a file into the model and return it; raise StateError if it does not fit."""
        learned = self.read(path)
        self.add(learned)
        return learned

    def read(self, path: Path) -> LearnedConcept:
        """Return the concept of a file; raise StateError if it was made by another method or for another model."""
        tensors, facts = read_tensors(path)
        self._check_identity(facts, path)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise StateError(
                    f"{path}: {name} has numbers that are not finite",
                    "learn the concept again",
                )
        token = facts.get("token", "")
        superclass = facts.get("superclass", "")
        try:
            check_token(token)
        except DataError as error:
            raise StateError(f"{path}: {error}") from error
        return LearnedConcept(token, superclass, tensors, facts)

    def _check_identity(self, facts: Mapping[str, str], path: Path) -> None:
        """Raise StateError unless a file is of this format and method, and was made for this model."""
        identity = self._identity()
        for key in ("format", "method"):
            made, expected = facts.get(key), identity[key]
            if made != expected:
                raise StateError(f"{path}: made with {key} {made}, this is {expected}")
        model = self.model
        if not same_model(facts.get("fingerprint"), model.fingerprint, model.former):
            made = facts.get("model")
            raise StateError(f"{path}: made for {made}, this is {model.name}")

    def _identity(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "method": self.name,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
        }


@runtime_checkable
class ExportsLora(Protocol):
    """A personalizer whose concepts are LoRA files of diffusers."""

    def export(self, token: str, path: Path) -> None:
        """Write one concept as a LoRA file."""


def check_concept(concept: Concept) -> None:
    """Raise DataError for an invalid token or superclass, for no pictures, or naming every bad picture."""
    check_token(concept.token)
    if not concept.images:
        raise DataError(
            f"{concept.token}: no pictures to learn from",
            "three to six photos are usual",
        )
    if not concept.superclass.strip() or "<" in concept.superclass:
        raise DataError(
            f"superclass {concept.superclass!r}: not a word", "e.g. --superclass dog"
        )
    problems: list[str] = []
    for path in concept.images:
        try:
            check_picture(path)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(
            problems, "replace the pictures, or take them out of the folder"
        )


def summary(losses: Sequence[float]) -> dict[str, Any]:
    """Return the steps of a training, the first loss, and the mean of the last tenth of the losses."""
    tenth = max(1, len(losses) // 10)
    tail = losses[-tenth:]
    return {
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": sum(tail) / len(tail),
    }
