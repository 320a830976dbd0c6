"""DreamBooth with LoRA: a low-rank adapter of the attention learns a subject, through peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Generator, nn

from mmedit_cli.adapters import LoraLayers, joined
from mmedit_cli.drawing.methods.base import LearnedConcept, Personalizer, Tick, summary
from mmedit_cli.drawing.methods.shared import lora_files
from mmedit_cli.drawing.methods.shared.subject_training import (
    SubjectHparams,
    SubjectTraining,
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
    """One LoRA for each subject (Hu et al. 2022), always on: several are added up, and they act on every prompt.

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

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> LearnedConcept:
        hp, model = self.hparams, self.model
        name = hp.identifier or identifier(
            model.tokenizers[0], concept.token, self.identifiers
        )
        training = SubjectTraining(model, concept, hp, source, name)
        paths = _paths(
            model.model,
            model.denoiser,
            [f"to_{role}" for role in hp.unet_targets],
        )
        trains_text = bool(hp.train_text_encoder and hp.text_targets)
        if trains_text:
            ends = [f"{role}_proj" for role in hp.text_targets]
            for part in model.model:
                if part.startswith("text_encoder"):
                    paths += _paths(model.model, part, ends)
        ranks = dict.fromkeys(paths, hp.rank)
        alphas = dict.fromkeys(paths, hp.alpha)
        with Patch(model.model) as patch:
            layers = LoraLayers(patch, ranks, alphas, self.seed)
            parameters = layers.parameters()
            for parameter in parameters:
                parameter.data = parameter.data.float()
            losses = training.run(
                parameters,
                tick,
                text=trains_text,
            )
            tensors = lora_files.tensors_of(layers.pairs(), hp.alpha / hp.rank)
        return LearnedConcept(
            concept.token,
            concept.superclass,
            tensors,
            {"identifier": name},
            summary(losses),
        )

    def _attach(self, learned: LearnedConcept) -> None:
        token = learned.token
        blocks = lora_files.pairs(learned.tensors)
        shapes = {}
        for path, module in self.model.model.named_modules():
            if path in blocks:
                weight: Any = module.weight
                shapes[path] = weight.shape
        lora_files.check_fits(blocks, shapes, token)
        self._replace_adapters([*self.concepts.values(), learned])
        name = learned.facts["identifier"]
        self.model.words[token] = word_for(name, learned.superclass)

    def _detach(self, token: str) -> None:
        others = [
            learned for learned in self.concepts.values() if learned.token != token
        ]
        self._replace_adapters(others)
        del self.model.words[token]

    def _replace_adapters(self, concepts: list[LearnedConcept]) -> None:
        """Put just the adapters of these concepts into the model, and switch all of them on."""
        self._patch.undo()
        if not concepts:
            return
        pairs = [lora_files.pairs(learned.tensors) for learned in concepts]
        LoraLayers.of(self._patch, joined(pairs))

    def export(self, token: str, path: Path) -> None:
        """Write a concept as a LoRA file of diffusers; the subject is called by `facts["identifier"]` there."""
        lora_files.export(path, self.concepts[token].tensors)


def _paths(model: nn.Module, part: str, ends: Sequence[str]) -> list[str]:
    """Return the paths of the modules of a part whose last name is one of `ends`."""
    paths = []
    for path, _ in model.get_submodule(part).named_modules():
        _, _, last = path.rpartition(".")
        if last in ends:
            paths.append(f"{part}.{path}")
    return paths


PERSONALIZER = DreamboothLora
