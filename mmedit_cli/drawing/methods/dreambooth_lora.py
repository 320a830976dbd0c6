"""DreamBooth with LoRA: a low-rank adapter of the attention learns a subject, through peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Generator, nn

from mmedit_cli.adapters import LoraLayers, joined
from mmedit_cli.drawing.methods.base import Learned, Personalizer, Tick, summary
from mmedit_cli.drawing.methods.shared import lora_files
from mmedit_cli.drawing.methods.shared.subject_training import (
    SubjectHparams,
    SubjectLesson,
    identifier,
    word_for,
)
from mmedit_cli.patch import Patch
from mmedit_cli.types import Concept


@dataclass(frozen=True)
class DreamboothLoraHparams(SubjectHparams):
    """See hparams/dreambooth_lora.yaml for what each value means and where it comes from."""

    learning_rate: float = 2e-5
    rank: int = 16
    alpha: float = 8.0
    unet_targets: tuple[str, ...] = ("q", "v")
    text_targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank <= 0:
            raise ValueError(f"rank must be above 0, not {self.rank}")


class DreamboothLora(Personalizer):
    """One LoRA a subject (Hu et al. 2022), always on: several are added up, and no prompt escapes them.

    The tensors of a concept are a LoRA as diffusers loads it.
    """

    name = "dreambooth-lora"
    Hparams = DreamboothLoraHparams

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patch = Patch(self.model.model)

    @property
    def steps(self) -> int:
        """The optimiser's steps."""
        return int(self.hparams.steps)

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> Learned:
        hp, model = self.hparams, self.model
        name = hp.identifier or identifier(
            model.tokenizers[0], concept.token, self.identifiers
        )
        lesson = SubjectLesson(model, concept, hp, source, name)
        targets = {"unet": [f"to_{role}" for role in hp.unet_targets]}
        if hp.train_text_encoder and hp.text_targets:
            texts = [part for part in model.model if part.startswith("text_encoder")]
            targets |= {
                part: [f"{role}_proj" for role in hp.text_targets] for part in texts
            }
        paths = [
            path
            for part, ends in targets.items()
            for path in _paths(model.model, part, ends)
        ]
        ranks, alphas = dict.fromkeys(paths, hp.rank), dict.fromkeys(paths, hp.alpha)
        with Patch(model.model) as patch:
            layers = LoraLayers(patch, ranks, alphas, self.seed)
            parameters = layers.parameters()
            for parameter in parameters:
                parameter.data = parameter.data.float()
            losses = lesson.run(parameters, tick, text=len(targets) > 1)
            tensors = lora_files.tensors_of(layers.pairs(), hp.alpha / hp.rank)
        return Learned(
            concept.token,
            concept.superclass,
            tensors,
            {"identifier": name},
            summary(losses),
        )

    def _attach(self, learned: Learned) -> None:
        blocks = lora_files.pairs(learned.tensors)
        modules = {
            path: module
            for path, module in self.model.model.named_modules()
            if path in blocks
        }
        lora_files.check_fits(
            blocks,
            {path: module.weight.shape for path, module in modules.items()},
            learned.token,
        )
        self._load([*self.concepts.values(), learned])
        self.model.words[learned.token] = word_for(
            learned.facts["identifier"], learned.superclass
        )

    def _detach(self, token: str) -> None:
        self._load(
            [learned for learned in self.concepts.values() if learned.token != token]
        )
        del self.model.words[token]

    def _load(self, concepts: list[Learned]) -> None:
        """Put just these adapters into the model, all of them on."""
        self._patch.undo()
        if concepts:
            LoraLayers.of(
                self._patch,
                joined([lora_files.pairs(learned.tensors) for learned in concepts]),
            )

    def export(self, token: str, path: Path) -> None:
        """Write a concept as a LoRA file of diffusers; the subject is called by `facts["identifier"]` there."""
        lora_files.export(path, self.concepts[token].tensors)


def _paths(model: nn.Module, part: str, ends: Sequence[str]) -> list[str]:
    """Return the paths of the modules of a part whose last name is one of `ends`."""
    return [
        f"{part}.{path}"
        for path, _ in model.get_submodule(part).named_modules()
        if path.rpartition(".")[2] in ends
    ]


PERSONALIZER = DreamboothLora
