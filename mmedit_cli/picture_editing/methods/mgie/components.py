"""The components of MGIE as diffusers saves them: one folder with all parts, made by save_pretrained."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

PIPELINE = "MGIEPipeline"  # what the index of a folder calls its class


class MGIEComponents(DiffusionPipeline):
    """A multimodal language model, the edit head with its visual tokens, an InstructPix2Pix denoiser and its VAE.

    `MGIEPipeline` can also be called with pictures; the editor is built on these parts alone.
    """

    model_cpu_offload_seq = "mllm->edit_head->unet->vae"
    mllm: Any
    processor: Any
    edit_head: Any
    unet: Any
    vae: Any
    scheduler: Any
    config: Any

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
            mllm=mllm,
            processor=processor,
            edit_head=edit_head,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(prompt=prompt)
