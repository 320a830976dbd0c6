"""MGIE as an image editor: InstructPix2Pix with another condition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from mmedit_cli.catalog import own_image_editors
from mmedit_cli.errors import UserError
from mmedit_cli.model_folder import CHECKPOINT, INDEX
from mmedit_cli.picture_editing.methods.base import Edited, Job, Settings
from mmedit_cli.picture_editing.methods.mgie.guide import Guide, Written
from mmedit_cli.picture_editing.methods.mgie.hparams import MgieHparams
from mmedit_cli.picture_editing.methods.shared.latent import Condition, LatentEditor
from mmedit_cli.picture_editing.methods.shared.loading import (
    LoadOptions,
    usual_settings,
)

OWN = "mini-mgie"  # comes along
_CUT = "the expressive instruction is longer than the model reads: its end was not used"


@final
class Mgie(LatentEditor):
    """Guiding instruction-based image editing via multimodal large language models (Fu et al. 2024)."""

    name = "mgie"
    trains = derives = True
    Hparams = MgieHparams

    def __init__(
        self, pipeline: Any, model: str, fingerprint: str, usual: Settings | None = None
    ) -> None:
        super().__init__(model, fingerprint, pipeline, usual)
        self.pipeline, self.edit_head = pipeline, pipeline.edit_head
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

        None is the one that comes along. Raises UserError if that is not there.
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
            return cls(*parts.load_trained(folder, options), usual_settings(folder))
        return cls(*parts.load_whole(model, options))

    def conditions(self, jobs: Sequence[Job]) -> Condition:
        """Return what the edit head makes of the visual tokens behind each expressive instruction."""
        written = self.write(jobs)
        rows = self.guide.rows(
            self.guide.features([job.picture for job in jobs]),
            [job.instruction for job in jobs],
            [w.text for w in written],
        )
        text = self.edit_head(self.guide.states(rows).visual)
        full = [len(row.ids) >= self.guide.room for row in rows]
        notes = [
            Edited(job.picture, w.text, w.source, 0, w.warnings + (_CUT,) * cut)
            for job, w, cut in zip(jobs, written, full, strict=True)
        ]
        dtype = self.unet.dtype
        return Condition(
            text.to(dtype), self.edit_head.null(len(jobs)).to(dtype), notes
        )

    def write(self, jobs: Sequence[Job]) -> list[Written]:
        """Return the expressive instruction of each job: the user's own, else what the model says."""
        own = [job.expressive for job in jobs]
        asked = [i for i, text in enumerate(own) if not (text or "").strip()]
        said: list[Written] = []
        if asked:
            with torch.no_grad():
                said = self.guide.write(
                    [jobs[i].picture for i in asked],
                    [jobs[i].instruction for i in asked],
                )
        found = dict(zip(asked, said, strict=True))
        return [
            found[i] if i in found else Written((own[i] or "").strip(), "user")
            for i in range(len(jobs))
        ]
