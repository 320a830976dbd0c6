"""DreamBooth with LoRA: a low-rank adapter of the attention learns a subject, through peft and diffusers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Generator, Tensor

from mmedit_cli.personalizers import _lora
from mmedit_cli.personalizers._subjects import SubjectHparams, SubjectLesson, forked, identifier, word_for
from mmedit_cli.personalizers.base import Learned, Personalizer, Tick, summary
from mmedit_cli.types import Concept

_LEARNING = "learning"


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

    @property
    def steps(self) -> int:
        """The optimiser's steps."""
        return int(self.hparams.steps)

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> Learned:
        from peft import LoraConfig

        hp, model = self.hparams, self.model
        name = hp.identifier or identifier(model.tokenizers[0], concept.token, self.identifiers)
        lesson = SubjectLesson(model, concept, hp, source, name)
        targets = {"unet": [f"to_{role}" for role in hp.unet_targets]}
        if hp.train_text_encoder and hp.text_targets:
            texts = [part for part in model.model if part.startswith("text_encoder")]
            targets |= {part: [f"{role}_proj" for role in hp.text_targets] for part in texts}
        try:
            with forked(self.seed):
                for part, modules in targets.items():
                    config = LoraConfig(r=hp.rank, lora_alpha=hp.alpha, target_modules=modules)
                    model.model[part].add_adapter(config, adapter_name=_LEARNING)
            parameters = [p for n, p in model.model.named_parameters() if f".{_LEARNING}." in n]
            for parameter in parameters:
                parameter.data = parameter.data.float()
            losses = lesson.run(parameters, tick, text=len(targets) > 1)
            tensors = self._collected(hp.alpha / hp.rank)
        finally:
            model.pipe.unload_lora_weights()
        return Learned(concept.token, concept.superclass, tensors, {"identifier": name}, summary(losses))

    def _collected(self, scale: float) -> dict[str, Tensor]:
        """Return the adapter that was trained, under the names of a LoRA file."""
        named = dict(self.model.model.named_parameters())
        down = f".lora_A.{_LEARNING}.weight"
        paths = [name.removesuffix(down) for name in named if name.endswith(down)]
        return _lora.tensors_of({p: (named[p + down], named[f"{p}.lora_B.{_LEARNING}.weight"]) for p in paths}, scale)

    def _attach(self, learned: Learned) -> None:
        blocks = _lora.pairs(learned.tensors)
        modules = {path: module for path, module in self.model.model.named_modules() if path in blocks}
        _lora.check_fits(blocks, {path: module.weight.shape for path, module in modules.items()}, learned.token)
        self._load([*self.concepts.values(), learned])
        self.model.words[learned.token] = word_for(learned.facts["identifier"], learned.superclass)

    def _detach(self, token: str) -> None:
        self._load([learned for learned in self.concepts.values() if learned.token != token])
        del self.model.words[token]

    def _load(self, concepts: list[Learned]) -> None:
        """Put just these adapters into the model, all of them on."""
        pipe = self.model.pipe
        pipe.unload_lora_weights()
        names = []
        for i, learned in enumerate(concepts):
            names.append(f"concept{i}")
            with warnings.catch_warnings():  # several at once are what is wanted
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                pipe.load_lora_weights(dict(learned.tensors), adapter_name=names[-1])
        if names:
            pipe.set_adapters(names)

    def export(self, token: str, path: Path) -> None:
        """Write a concept as a LoRA file of diffusers; the subject is called by `facts["identifier"]` there."""
        _lora.export(path, self.concepts[token].tensors)


PERSONALIZER = DreamboothLora
