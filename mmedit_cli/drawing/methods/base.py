"""What every personalizer can do: learn a concept from pictures, draw it by its token, forget it, save and load it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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
class Learned:
    """A concept that was learned: its token, the word for what it is, tensors, and what else the method needs.

    `facts` are texts; `info` says how the learning went (steps, losses) and is not saved with it.
    """

    token: str
    superclass: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


class Personalizer(AbstractContextManager["Personalizer"], ABC):
    """Teaches one text-to-image model concepts, each from a few pictures; what is drawn without their tokens is kept
    as far as the method promises it.

    Leaving it as a context manager forgets all concepts: the model is then the base model, bit for bit.
    """

    name: ClassVar[str]
    Hparams: ClassVar[type]
    several: ClassVar[bool] = True  # concepts at a time
    routes: ClassVar[bool] = (
        False  # whether a concept acts on prompts that name it, so that any number may be there
    )

    def __init__(self, model: StableDiffusion, hparams: Any, *, seed: int = 0) -> None:
        self.model, self.hparams, self.seed = model, hparams, seed
        self.concepts: dict[str, Learned] = {}
        self.identifiers: set[str] = set()  # words that concepts have been given

    # -- what a method has to say -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def steps(self) -> int:
        """How often `tick(1)` is told while a concept is learned."""

    @abstractmethod
    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> Learned:
        """Learn a concept; afterwards the model is as before, whatever happens."""

    @abstractmethod
    def _attach(self, learned: Learned) -> None:
        """Put a concept into the model; raise StateError, with the model as before, if it does not fit."""

    @abstractmethod
    def _detach(self, token: str) -> None:
        """Take a concept out of the model."""

    # -- the verbs ----------------------------------------------------------------------------------------------

    def learn(self, concept: Concept, *, tick: Tick = lambda n: None) -> Learned:
        """Learn a concept from its pictures and put it into the model.

        If it fails, the model and the other concepts are as they were. Raises DataError for pictures, a token or a
        superclass that cannot be used, StateError for a token that is taken.
        """
        check_concept(concept)
        self._check_free(concept.token)
        others = list(self.concepts.values())
        self.close()  # concepts are learned on the base model, each for itself
        try:
            learned = self._learn(concept, generator(self.seed), tick)
        finally:
            for other in others:
                self.add(other)
        self.add(learned)
        return learned

    def add(self, learned: Learned) -> None:
        """Put a concept that was learned into the model; raise StateError if it does not fit."""
        self._check_free(learned.token)
        self._attach(learned)
        self.identifiers.add(learned.facts.get("identifier", learned.token))
        self.concepts[learned.token] = learned

    def remove(self, token: str) -> Learned:
        """Take one concept out of the model and return it; raise StateError if it is not there."""
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
        head = {
            "token": token,
            "superclass": learned.superclass,
            "seed": str(self.seed),
        }
        usual = to_dict(self.Hparams())
        hparams = json.dumps(
            {k: v for k, v in to_dict(self.hparams).items() if v != usual[k]},
            separators=(",", ":"),
        )
        write_tensors(
            path,
            learned.tensors,
            {**self._identity(), **head, **learned.facts, "hparams": hparams},
        )

    def load(self, path: Path) -> Learned:
        """Put the concept of a file into the model and return it; raise StateError if it does not fit."""
        learned = self.read(path)
        self.add(learned)
        return learned

    def read(self, path: Path) -> Learned:
        """Return the concept of a file; raise StateError if it was made by another method or for another model."""
        tensors, facts = read_tensors(path)
        for key, value in self._identity().items():
            former = self.model.former if key == "fingerprint" else ""
            if key != "model" and not same_model(facts.get(key), value, former):
                what = (
                    f"made for {facts.get('model')}"
                    if key == "fingerprint"
                    else f"made with {key} {facts.get(key)}"
                )
                raise StateError(
                    f"{path}: {what}, this is {self.model.name if key == 'fingerprint' else value}"
                )
        if bad := [
            name for name, tensor in tensors.items() if not tensor.isfinite().all()
        ]:
            raise StateError(
                f"{path}: {bad[0]} has numbers that are not finite",
                "learn the concept again",
            )
        try:
            check_token(facts.get("token", ""))
        except DataError as error:
            raise StateError(f"{path}: {error}") from error
        return Learned(facts["token"], facts.get("superclass", ""), tensors, facts)

    def _identity(self) -> dict[str, str]:
        model = {"model": self.model.name, "fingerprint": self.model.fingerprint}
        return {"format": FORMAT, "method": self.name, **model}


def check_concept(concept: Concept) -> None:
    """Raise DataError for a token or a superclass that is none, and without pictures, or naming every bad one."""
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
    """Return how a training went: its steps, the first loss, and the mean of the last tenth."""
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": sum(tail) / len(tail),
    }
