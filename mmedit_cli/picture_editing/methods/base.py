"""The base class of image editors: they take pictures of any size with instructions, and return pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL import Image

from mmedit_cli.errors import DataError

LARGEST_ENLARGEMENT = 2  # times: beyond it a result looks blurred at its own size
LARGEST_RESOLUTION = (
    2048  # pixels: beyond it attention alone fills the memory of any device
)
Tick = Callable[[int], None]


@dataclass(frozen=True)
class EditSettings:
    """How an edit is made; None means the editor's own default.

    steps: denoising steps; text_guidance, image_guidance: how strongly the result follows the instruction and the
    picture; resolution: longer edge in pixels at which the model works; restore: return the picture in its own size.
    """

    steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    resolution: int | None = None
    restore: bool = True

    def over(self, defaults: EditSettings) -> EditSettings:
        """Return these settings with every None replaced by the value of `defaults`."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        return replace(defaults, **given)


@dataclass(frozen=True)
class EditJob:
    """One edit to make: an upright RGB picture, an instruction, a seed.

    `expressive` replaces the expressive instruction that an editor such as MGIE would derive.
    """

    picture: Image.Image
    instruction: str
    seed: int = 0
    expressive: str | None = None


@dataclass(frozen=True)
class EditedPicture:
    """An edited picture and how it was made.

    `expressive` is the instruction that the editor derived, if it derives one; it comes from `source` (model, user or
    fallback). `rows` counts the pictures that went through the denoiser.
    """

    picture: Image.Image
    expressive: str = ""
    source: str = ""
    rows: int = 0
    warnings: tuple[str, ...] = ()


class ImageEditor(ABC):
    """Edits pictures by instruction. An edit changes nothing in the editor, so there is nothing to undo.

    `derives` is true if the editor turns an instruction into an expressive one.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = False
    derives: ClassVar[bool] = False
    defaults: EditSettings
    model: str
    fingerprint: str

    @classmethod
    @abstractmethod
    def load(cls, model: str | None, options: Any) -> ImageEditor:
        """Return the editor for a model: a known name, a folder or a hub id; None is the editor's default.

        Raises ModelError.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the denoiser is."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """The longer edge in pixels that the model was made for."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Width and height of a working picture are multiples of this many pixels."""

    @abstractmethod
    def save_memory(self) -> None:
        """Need less memory and more time from now on; what is edited stays the same but for rounding."""

    @abstractmethod
    def edit_batch(
        self, jobs: Sequence[EditJob], settings: EditSettings, tick: Tick
    ) -> list[EditedPicture]:
        """Edit pictures of one size, with edges that are multiples of `multiple`; `tick(B)` after each step.

        `settings` are complete. The result of a job does not depend on the others. Raises DataError, ModelError.
        """

    @torch.no_grad()
    def edit(
        self,
        jobs: Sequence[EditJob],
        settings: EditSettings | None = None,
        *,
        batch_size: int = 1,
        tick: Tick = lambda _n: None,
    ) -> list[EditedPicture]:
        """Edit pictures of any sizes and return the results in order; those of one working size form batches.

        An empty instruction returns the picture as it is (InstructPix2Pix does so too). Raises DataError for invalid
        settings, or for an instruction that the model cannot read.
        """
        chosen = (settings or EditSettings()).over(self.defaults)
        self._check(chosen)
        if not self.derives and any(job.expressive for job in jobs):
            raise DataError(
                f"{self.name} derives no expressive instruction",
                "leave it out, or name another editor",
            )
        by_size: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        results: dict[int, EditedPicture] = {}
        for i, job in enumerate(jobs):
            if job.instruction.strip():
                resolution = chosen.resolution or self.resolution
                size = working_size(job.picture.size, resolution, self.multiple)
                by_size[size].append(i)
            else:
                warning = "empty instruction: the picture is returned as it is"
                results[i] = EditedPicture(job.picture, warnings=(warning,))
        for size, members in by_size.items():
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                batch = []
                for i in part:
                    picture = resized(jobs[i].picture, size)
                    batch.append(replace(jobs[i], picture=picture))
                edited = self.edit_batch(batch, chosen, tick)
                results.update(zip(part, edited, strict=True))
                if chosen.restore:
                    for i in part:
                        results[i] = restored(results[i], jobs[i].picture.size)
        return [results[i] for i in range(len(jobs))]

    def check_steps(self, steps: int) -> None:
        """Raise DataError unless the sampler can make so many steps; an editor with a sampler tries it out."""
        if steps < 1:
            raise DataError(f"--steps {steps}: at least 1")

    def _check(self, settings: EditSettings) -> None:
        problems: list[str] = []
        hint = ""
        try:
            self.check_steps(settings.steps or 0)
        except DataError as error:
            problems = list(error.problems)
            hint = error.hint
        resolution = settings.resolution
        least, most = self.multiple, LARGEST_RESOLUTION
        if resolution is not None and not least <= resolution <= most:
            problems.append(f"--resolution {resolution}: from {least} to {most} pixels")
        if settings.image_guidance is not None and self.defaults.image_guidance is None:
            problems.append(
                f"--image-guidance: {self.name} has no guidance by the picture"
            )
        if problems:
            raise DataError(problems, hint)


def working_size(
    size: tuple[int, int], resolution: int, multiple: int
) -> tuple[int, int]:
    """Return (width, height) with a longer edge of about `resolution`, both multiples of `multiple`.

    The shorter edge is at least an eighth of the longer one: a very long picture is squeezed.
    """
    scale = resolution / max(size)
    least = max(multiple, resolution // 8)

    def fit(length: int) -> int:
        scaled = max(least, length * scale)
        steps = round(scaled / multiple)
        return max(multiple, steps * multiple)

    width, height = size
    return fit(width), fit(height)


def restored(result: EditedPicture, size: tuple[int, int]) -> EditedPicture:
    """Return a result in the size of its picture, with a warning if it is enlarged so much that it blurs."""
    width, height = result.picture.size
    enlarged = replace(result, picture=resized(result.picture, size))
    if max(size) <= LARGEST_ENLARGEMENT * max(width, height):
        return enlarged
    warning = (
        f"the model worked at {width} x {height} pixels and the result is enlarged to {size[0]} x {size[1]}, "
        "so it is blurred: --working-size leaves it small, --resolution works larger where the model can"
    )
    return replace(enlarged, warnings=(*result.warnings, warning))


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the picture in another size, or itself if it has that size."""
    if picture.size == size:
        return picture
    return picture.resize(size, Image.Resampling.LANCZOS)
