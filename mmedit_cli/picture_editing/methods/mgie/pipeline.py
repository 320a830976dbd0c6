"""MGIE as a pipeline of diffusers: its components in one folder, called with pictures and instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers.utils import BaseOutput
from PIL import Image

from mmedit_cli.picture_editing.methods.base import EditJob, EditSettings
from mmedit_cli.picture_editing.methods.mgie.components import MGIEComponents
from mmedit_cli.picture_editing.methods.mgie.editor import Mgie


@dataclass
class MGIEOutput(BaseOutput):
    """Edited pictures, and the expressive instruction of each."""

    images: list[Image.Image]
    expressive: list[str]


class MGIEPipeline(MGIEComponents):
    """The components of MGIE, and a call that edits pictures with them."""

    def __call__(
        self,
        image: Image.Image | Sequence[Image.Image],
        instruction: str | Sequence[str],
        expressive: str | Sequence[str | None] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
        seed: int = 0,
    ) -> MGIEOutput:
        """Return pictures edited as instructions say, each in its own size; every pair of scales is honoured.

        `expressive` replaces the instruction that the model would derive. Raises DataError.
        """
        images = [image] if isinstance(image, Image.Image) else list(image)
        count = len(images)
        if isinstance(instruction, str):
            instruction = [instruction] * count
        if expressive is None or isinstance(expressive, str):
            expressive = [expressive] * count
        jobs = []
        for picture, text, own in zip(images, instruction, expressive, strict=True):
            jobs.append(EditJob(picture.convert("RGB"), text, seed, own))
        settings = EditSettings(
            steps=num_inference_steps,
            text_guidance=guidance_scale,
            image_guidance=image_guidance_scale,
        )
        editor = Mgie(
            self,
            self.config.get("_name_or_path", ""),
            "",
        )
        results = editor.edit(jobs, settings, batch_size=count)
        return MGIEOutput(
            images=[result.picture for result in results],
            expressive=[result.expressive for result in results],
        )
