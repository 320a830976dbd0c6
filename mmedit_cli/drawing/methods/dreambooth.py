"""DreamBooth: all weights of the UNet and the text encoders learn one subject under a rare identifier."""

from __future__ import annotations

from typing import Any

from torch import Generator

from mmedit_cli.drawing.methods.base import Learned, Personalizer, Tick, summary
from mmedit_cli.drawing.methods.shared.subject_training import (
    SubjectHparams,
    SubjectLesson,
    identifier,
    word_for,
)
from mmedit_cli.errors import StateError
from mmedit_cli.patch import Patch
from mmedit_cli.types import Concept


class Dreambooth(Personalizer):
    """Full fine-tuning on a few photos (Ruiz et al. 2023), with prior preservation if wanted.

    A concept is a copy of all weights that were trained, and a model holds one of them.
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

    def _names(self) -> list[str]:
        parts = (
            ("unet.", "text_encoder") if self.hparams.train_text_encoder else ("unet.",)
        )
        return [
            name
            for name, _ in self.model.model.named_parameters()
            if name.startswith(parts)
        ]

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> Learned:
        hp, model = self.hparams, self.model
        name = hp.identifier or identifier(model.tokenizers[0], concept.token, ())
        lesson = SubjectLesson(model, concept, hp, source, name)
        with Patch(model.model) as patch:
            parameters = [patch.parameter(path) for path in self._names()]
            losses = lesson.run(
                parameters,
                tick,
                text=hp.train_text_encoder,
                float_copies=model.dtype.itemsize < 4,
            )
            tensors = {path: tensor.cpu() for path, tensor in patch.changed().items()}
        return Learned(
            concept.token,
            concept.superclass,
            tensors,
            {"identifier": name},
            summary(losses),
        )

    def _attach(self, learned: Learned) -> None:
        known = dict(self.model.model.named_parameters())
        strange = [
            path
            for path, t in learned.tensors.items()
            if path not in known or known[path].shape != t.shape
        ]
        parts = {"unet", *(path.partition(".")[0] for path in learned.tensors)}
        missing = [
            path
            for path in known
            if path.partition(".")[0] in parts and path not in learned.tensors
        ]
        if strange or missing:
            raise StateError(
                f"{learned.token}: {(strange + missing)[0]} does not fit {self.model.name}"
            )
        for path, tensor in learned.tensors.items():
            self._patch.set_(path, tensor.to(known[path]))
        self.model.words[learned.token] = word_for(
            learned.facts["identifier"], learned.superclass
        )

    def _detach(self, token: str) -> None:
        self._patch.undo()
        del self.model.words[token]


PERSONALIZER = Dreambooth
