"""InstructPix2Pix: the instruction as CLIP reads it, and the latents of the picture beside the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import nn

from mmedit_cli.errors import DataError
from mmedit_cli.picture_editing.methods.base import Edited, Job, Settings
from mmedit_cli.picture_editing.methods.shared.latent import Condition, LatentEditor
from mmedit_cli.picture_editing.methods.shared.loading import LoadOptions, load_pipeline


@final
class InstructPix2Pix(LatentEditor):
    """Brooks et al. 2023, for any checkpoint that StableDiffusionInstructPix2PixPipeline reads."""

    name = "instruct-pix2pix"

    def __init__(
        self, pipeline: Any, model: str, fingerprint: str, usual: Settings | None = None
    ) -> None:
        super().__init__(model, fingerprint, pipeline, usual)
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.reading = nn.ModuleDict({"text_encoder": self.text_encoder})

    @classmethod
    def load(cls, model: str | None, options: LoadOptions) -> InstructPix2Pix:
        """Return the editor for a name, a folder or a hub id; None is the published checkpoint."""
        found = load_pipeline(
            model or "instruct-pix2pix",
            "StableDiffusionInstructPix2PixPipeline",
            options,
        )
        return cls(found.pipeline, found.name, found.fingerprint, found.settings)

    def conditions(self, jobs: Sequence[Job]) -> Condition:
        """Return the instructions, and the empty one, as CLIP reads them: (B, T, D)."""
        text = self.encode([job.instruction for job in jobs])
        null = self.encode([""]).expand_as(text)
        return Condition(text, null, [Edited(job.picture) for job in jobs])

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Return texts as CLIP reads them, (B, T, D); raise DataError for one that is too long."""
        longest = self.tokenizer.model_max_length
        for text, ids in zip(
            texts, self.tokenizer(list(texts))["input_ids"], strict=True
        ):
            if len(ids) > longest:
                raise DataError(
                    f"{text!r} takes {len(ids)} tokens; {self.model} reads {longest}",
                    "say it shorter",
                )
        inputs = self.tokenizer(
            list(texts), padding="max_length", max_length=longest, return_tensors="pt"
        )
        return self.text_encoder(inputs["input_ids"].to(self.text_encoder.device))[0]  # type: ignore[no-any-return]


IMAGE_EDITOR = InstructPix2Pix
