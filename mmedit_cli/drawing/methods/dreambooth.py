"""DreamBooth: all weights of the UNet and the text encoders learn one subject under a rare identifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Generator, Tensor

from mmedit_cli.drawing.methods.base import LearnedConcept, Personalizer, Tick, summary
from mmedit_cli.drawing.methods.shared.subject_training import (
    SubjectHparams,
    SubjectTraining,
    identifier,
    word_for,
)
from mmedit_cli.errors import StateError
from mmedit_cli.patch import Patch
from mmedit_cli.types import Concept


class Dreambooth(Personalizer):
    """Full fine-tuning on a few photos (Ruiz et al. 2023), with prior preservation if wanted.

    A concept is a copy of all trained weights, so a model holds only one concept.
    """

    name = "dreambooth"
    Hparams = SubjectHparams
    several = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patch = Patch(self.model.model)

    @property
    def steps(self) -> int:
        """The optimiser's steps."""
        return int(self.hparams.steps)

    def _trained_paths(self) -> list[str]:
        denoiser = f"{self.model.denoiser}."
        parts: tuple[str, ...] = (denoiser,)
        if self.hparams.train_text_encoder:
            parts = (denoiser, "text_encoder")
        paths = [path for path, _ in self.model.model.named_parameters()]
        return [path for path in paths if path.startswith(parts)]

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> LearnedConcept:
        hp, model = self.hparams, self.model
        name = hp.identifier or identifier(model.tokenizers[0], concept.token, ())
        training = SubjectTraining(model, concept, hp, source, name)
        with Patch(model.model) as patch:
            parameters = [patch.parameter(path) for path in self._trained_paths()]
            losses = training.run(
                parameters,
                tick,
                text=hp.train_text_encoder,
                float_copies=model.dtype.itemsize < 4,
            )
            changed = patch.changed()
            tensors = {path: tensor.cpu() for path, tensor in changed.items()}
        return LearnedConcept(
            concept.token,
            concept.superclass,
            tensors,
            {"identifier": name},
            summary(losses),
        )

    def _attach(self, learned: LearnedConcept) -> None:
        token = learned.token
        parameters = dict(self.model.model.named_parameters())
        misfit = _first_misfit(learned.tensors, parameters)
        if misfit is not None:
            raise StateError(f"{token}: {misfit} does not fit {self.model.name}")
        for path, tensor in learned.tensors.items():
            self._patch.set_(path, tensor.to(parameters[path]))
        name = learned.facts["identifier"]
        self.model.words[token] = word_for(name, learned.superclass)

    def _detach(self, token: str) -> None:
        self._patch.undo()
        del self.model.words[token]


def _first_misfit(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> str | None:
    """Return the first path that does not fit the parameters, or is missing from the tensors of its part."""
    for path, tensor in tensors.items():
        if path not in parameters or parameters[path].shape != tensor.shape:
            return path
    parts = {_part_of(path) for path in tensors}
    parts |= {"unet", "transformer"}  # a denoiser is always learned
    for path in parameters:
        if _part_of(path) in parts and path not in tensors:
            return path
    return None


def _part_of(path: str) -> str:
    part, _, _ = path.partition(".")
    return part


PERSONALIZER = Dreambooth
