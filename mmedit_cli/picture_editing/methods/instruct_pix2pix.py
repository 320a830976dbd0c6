"""InstructPix2Pix: the condition is CLIP's encoding of the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, nn

from mmedit_cli.errors import DataError
from mmedit_cli.picture_editing.methods.base import EditedPicture, EditJob, EditSettings
from mmedit_cli.picture_editing.methods.shared.latent import (
    LatentCondition,
    LatentEditor,
)
from mmedit_cli.picture_editing.methods.shared.loading import (
    load_pipeline,
)
from mmedit_cli.runtime import LoadOptions


@final
class InstructPix2Pix(LatentEditor):
    """Brooks et al. 2023, for any checkpoint that StableDiffusionInstructPix2PixPipeline reads."""

    name = "instruct-pix2pix"

    def __init__(
        self,
        pipeline: Any,
        model: str,
        fingerprint: str,
        usual: EditSettings | None = None,
    ) -> None:
        super().__init__(model, fingerprint, pipeline, usual)
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder
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

    def conditions(self, jobs: Sequence[EditJob]) -> LatentCondition:
        """Return the encodings (B, T, D) of the instructions and of the empty one."""
        instructions = [job.instruction for job in jobs]
        text = self.encode(instructions)
        null = self.encode([""])
        notes = [EditedPicture(job.picture) for job in jobs]
        return LatentCondition(text, null.expand_as(text), notes)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the encodings (B, T, D) of texts; raise DataError for a text that is too long."""
        longest = self.tokenizer.model_max_length
        unpadded = self.tokenizer(list(texts))
        for text, ids in zip(texts, unpadded["input_ids"], strict=True):
            if len(ids) > longest:
                raise DataError(
                    f"{text!r} takes {len(ids)} tokens; {self.model} reads {longest}",
                    "say it shorter",
                )
        inputs = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=longest,
            return_tensors="pt",
        )
        token_ids = inputs["input_ids"].to(self.text_encoder.device)
        hidden: Tensor = self.text_encoder(token_ids)[0]
        return hidden


IMAGE_EDITOR = InstructPix2Pix
