"""MGIE as an image editor: InstructPix2Pix with another condition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from torch import nn

from mmedit_cli.catalog import own_image_editors
from mmedit_cli.errors import UserError
from mmedit_cli.model_folder import CHECKPOINT, INDEX
from mmedit_cli.picture_editing.methods.base import EditedPicture, EditJob, EditSettings
from mmedit_cli.picture_editing.methods.mgie.guide import ExpressiveInstruction, Guide
from mmedit_cli.picture_editing.methods.mgie.hparams import MgieHparams
from mmedit_cli.picture_editing.methods.shared.latent import (
    LatentCondition,
    LatentEditor,
)
from mmedit_cli.picture_editing.methods.shared.loading import (
    usual_settings,
)
from mmedit_cli.runtime import LoadOptions

OWN = "mini-mgie"  # part of the package
_CUT = "the expressive instruction is longer than the model reads: its end was not used"


@final
class Mgie(LatentEditor):
    """Guiding instruction-based image editing via multimodal large language models (Fu et al. 2024)."""

    name = "mgie"
    trains = True
    derives = True
    Hparams = MgieHparams

    def __init__(
        self,
        pipeline: Any,
        model: str,
        fingerprint: str,
        usual: EditSettings | None = None,
    ) -> None:
        super().__init__(model, fingerprint, pipeline, usual)
        self.pipeline = pipeline
        self.edit_head = pipeline.edit_head
        self.reading = nn.ModuleDict(
            {"mllm": pipeline.mllm, "edit_head": self.edit_head}
        )
        self.guide = Guide(
            pipeline.mllm,
            pipeline.processor,
            self.edit_head.tokens,
            pipeline.config.prompt,
        )

    @classmethod
    def load(cls, model: str | None, options: LoadOptions) -> Mgie:
        """Return the editor for a folder of MGIEPipeline, a finished training, or `tiny-mgie`.

        None is the model that comes along. Raises UserError if that is missing.
        """
        from mmedit_cli.picture_editing.methods.mgie import parts

        if model is None and OWN not in own_image_editors():
            raise UserError(
                "mgie: no --model named, and none was trained",
                "mmedit train-editor mgie --data ..., or mmedit convert mgie for the published weights",
            )
        model = model or OWN
        folder = own_image_editors().get(model, Path(model))
        if (folder / CHECKPOINT).is_file() and not (folder / INDEX).is_file():
            pipeline, name, fingerprint = parts.load_trained(folder, options)
            return cls(
                pipeline,
                name,
                fingerprint,
                usual_settings(folder),
            )
        return cls(*parts.load_whole(model, options))

    def conditions(self, jobs: Sequence[EditJob]) -> LatentCondition:
        """Return the output of the edit head for the visual tokens behind each expressive instruction."""
        derived = self.write(jobs)
        rows = self.guide.rows(
            self.guide.features([job.picture for job in jobs]),
            [job.instruction for job in jobs],
            [instruction.text for instruction in derived],
        )
        states = self.guide.states(rows)
        text = self.edit_head(states.visual)
        null = self.edit_head.null(len(jobs))
        notes = []
        for job, instruction, row in zip(jobs, derived, rows, strict=True):
            warnings = instruction.warnings
            if len(row.ids) >= self.guide.room:
                warnings += (_CUT,)
            note = EditedPicture(
                job.picture,
                expressive=instruction.text,
                source=instruction.source,
                warnings=warnings,
            )
            notes.append(note)
        dtype = self.unet.dtype
        return LatentCondition(
            text.to(dtype),
            null.to(dtype),
            notes,
        )

    def write(self, jobs: Sequence[EditJob]) -> list[ExpressiveInstruction]:
        """Return the expressive instruction of each job: the user's own, else one that the model derives."""
        instructions: dict[int, ExpressiveInstruction] = {}
        asked = []
        for i, job in enumerate(jobs):
            own = (job.expressive or "").strip()
            if own:
                instructions[i] = ExpressiveInstruction(own, "user")
            else:
                asked.append(i)
        if asked:
            derived = self.guide.write(
                [jobs[i].picture for i in asked],
                [jobs[i].instruction for i in asked],
            )
            instructions.update(zip(asked, derived, strict=True))
        return [instructions[i] for i in range(len(jobs))]
