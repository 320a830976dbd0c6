"""FLUX.1 Kontext: a rectified-flow transformer that reads the picture as further tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import nn

from mmedit_cli.errors import DataError
from mmedit_cli.finite import check_finite
from mmedit_cli.picture_editing.methods.base import (
    EditedPicture,
    EditJob,
    EditSettings,
    ImageEditor,
    Tick,
)
from mmedit_cli.picture_editing.methods.shared.loading import (
    load_pipeline,
)
from mmedit_cli.runtime import LoadOptions


@final
class FluxKontext(ImageEditor):
    """FLUX.1 Kontext (Black Forest Labs 2025), for any checkpoint that FluxKontextPipeline reads.

    Its guidance is distilled into the model: there is one pass for each step at any scale, and no guidance by the
    picture.
    """

    name = "flux-kontext"
    defaults = EditSettings(steps=28, text_guidance=3.5)

    def __init__(self, pipeline: Any, model: str, fingerprint: str) -> None:
        self.pipeline = pipeline
        self.model = model
        self.fingerprint = fingerprint
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, model: str | None, options: LoadOptions) -> FluxKontext:
        """Return the editor for a name, a folder or a hub id; None is the published checkpoint."""
        found = load_pipeline(model or "flux-kontext", "FluxKontextPipeline", options)
        return cls(found.pipeline, found.name, found.fingerprint)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        device: torch.device = self.pipeline.transformer.device
        return device

    @property
    def multiple(self) -> int:
        """Pixels to a token: latents are packed two by two."""
        return 2 * int(self.pipeline.vae_scale_factor)

    @property
    def resolution(self) -> int:
        """About a megapixel."""
        return 1024

    def save_memory(self) -> None:
        """Keep on a GPU only the part that is at work; a CPU has all of it, and gains nothing."""
        self.pipeline.vae.enable_slicing()
        if self.device.type != "cpu":
            self.pipeline.enable_model_cpu_offload(device=self.device)

    def check_steps(self, steps: int) -> None:
        """Raise DataError for more steps than the sampler was made for."""
        most = int(self.pipeline.scheduler.config.num_train_timesteps)
        if not 1 <= steps <= most:
            raise DataError(
                f"--steps {steps}: {self.model} was made for 1 to {most}",
                "28 are usual",
            )

    def edit_batch(
        self, jobs: Sequence[EditJob], settings: EditSettings, tick: Tick
    ) -> list[EditedPicture]:
        """Edit pictures one after another: the pipeline takes one picture a call."""
        return [self._edit(job, settings, tick) for job in jobs]

    def _edit(self, job: EditJob, settings: EditSettings, tick: Tick) -> EditedPicture:
        width, height = job.picture.size
        steps = settings.steps or 1

        def make(check: Callable[[torch.Tensor, str], None]) -> torch.Tensor:
            """Return the pixels, (1, 3, H, W) in 0..1; `check` sees everything that leaves the model."""

            def after_step(
                _pipeline: Any, step: int, _time: Any, tensors: dict[str, Any]
            ) -> dict[str, Any]:
                check(tensors["latents"], f"the latents of step {step + 1} of {steps}")
                tick(1)
                return tensors

            output = self.pipeline(
                image=job.picture,
                prompt=job.instruction,
                width=width,
                height=height,
                max_area=width * height,
                num_inference_steps=steps,
                guidance_scale=settings.text_guidance,
                generator=torch.Generator().manual_seed(job.seed),
                callback_on_step_end=after_step,
                output_type="pt",
            )
            pixels: torch.Tensor = output.images
            check(pixels, "the edited picture")
            return pixels

        modules = nn.ModuleDict()
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                modules[name] = part

        def check(values: torch.Tensor, what: str) -> None:
            again = partial(make, lambda _values, _what: None)
            check_finite(
                values,
                f"{self.model}: {what}",
                modules,
                again,
            )

        processor = self.pipeline.image_processor
        pixels = processor.pt_to_numpy(make(check))
        (picture,) = processor.numpy_to_pil(pixels)
        return EditedPicture(picture, rows=steps)


IMAGE_EDITOR = FluxKontext
