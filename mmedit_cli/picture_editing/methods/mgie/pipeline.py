"""MGIE as a pipeline of diffusers: one folder with all its parts, made by save_pretrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from mmedit_cli.picture_editing.methods.base import Job, Settings


@dataclass
class MGIEOutput(BaseOutput):
    """Edited pictures, and the expressive instruction of each."""

    images: list[Image.Image]
    expressive: list[str]


class MGIEPipeline(DiffusionPipeline):
    """A multimodal language model, the edit head with its visual tokens, an InstructPix2Pix denoiser and its VAE."""

    model_cpu_offload_seq = "mllm->edit_head->unet->vae"

    def __init__(
        self,
        mllm: Any,
        processor: Any,
        edit_head: Any,
        unet: Any,
        vae: Any,
        scheduler: Any,
        prompt: str = "",
    ) -> None:
        super().__init__()
        self.register_modules(
            mllm=mllm, processor=processor, edit_head=edit_head, unet=unet, vae=vae, scheduler=scheduler
        )  # fmt: skip
        self.register_to_config(prompt=prompt)

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

        `expressive` takes the place of what the model would say. Raises DataError.
        """
        from mmedit_cli.picture_editing.methods.mgie.editor import Mgie

        images = [image] if isinstance(image, Image.Image) else list(image)
        texts = (
            [instruction] * len(images)
            if isinstance(instruction, str)
            else list(instruction)
        )
        given = (
            [expressive] * len(images)
            if expressive is None or isinstance(expressive, str)
            else list(expressive)
        )
        jobs = [
            Job(i.convert("RGB"), t, seed, e)
            for i, t, e in zip(images, texts, given, strict=True)
        ]
        settings = Settings(num_inference_steps, guidance_scale, image_guidance_scale)
        done = Mgie(self, self.config.get("_name_or_path", ""), "").edit(
            jobs, settings, batch_size=len(jobs)
        )
        return MGIEOutput(
            images=[d.picture for d in done], expressive=[d.expressive for d in done]
        )
