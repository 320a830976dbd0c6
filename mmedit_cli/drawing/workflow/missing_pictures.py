"""Pictures of an evaluation: drawn in batches that depend on what is wanted alone, each written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmedit_cli.drawing.workflow.plan import DrawingSettings
from mmedit_cli.pictures import png
from mmedit_cli.storage import write_atomic

if TYPE_CHECKING:
    from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion

Wanted = tuple[str, int, Path]  # a prompt, a seed, and where the picture goes


def draw_missing(
    model: StableDiffusion,
    settings: DrawingSettings,
    wanted: Sequence[Wanted],
    tick: Callable[[str, int], None],
    before: Callable[[Sequence[Wanted]], None] = lambda batch: None,
) -> None:
    """Draw what is wanted, a batch at a time; a finished batch is only counted.

    `before` is told each batch that is about to be drawn.
    """
    size = settings.batch_size
    for start in range(0, len(wanted), size):
        batch = wanted[start : start + size]
        if not all(path.is_file() for _, _, path in batch):
            before(batch)
            _draw_batch(model, settings, batch)
        tick("pictures", len(batch))


def _draw_batch(
    model: StableDiffusion, settings: DrawingSettings, batch: Sequence[Wanted]
) -> None:
    from mmedit_cli.drawing.models.stable_diffusion import Sampling

    sampling = Sampling(
        steps=settings.steps,
        guidance=settings.guidance,
        resolution=settings.size,
        batch_size=settings.batch_size,
    )
    prompts, seeds, paths = zip(*batch, strict=True)
    pictures = model.generate(prompts, seeds, sampling)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, picture in zip(paths, pictures, strict=True):
        write_atomic(path, png(picture))
