"""What every image editor does: take pictures of any size with instructions, and give pictures of that size back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL import Image

from mmedit_cli.errors import DataError

LARGEST_BLOW_UP = (
    2  # times: beyond it a result looks blurred in the size of its picture
)
LARGEST_SIDE = 2048  # pixels of the working size: beyond it attention alone fills the memory of any device
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """How an edit is made; None means the editor's own default.

    steps: denoising steps; text_guidance, image_guidance: how strongly the result follows the instruction and the
    picture; resolution: long side in pixels at which the model works; restore: give the picture back in its own size.
    """

    steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    resolution: int | None = None
    restore: bool = True

    def over(self, defaults: Settings) -> Settings:
        """Return these settings with the gaps filled from `defaults`."""
        return replace(
            defaults,
            **{name: value for name, value in vars(self).items() if value is not None},
        )


@dataclass(frozen=True)
class Job:
    """One edit to make: an upright RGB picture, an instruction, a seed.

    `expressive` takes the place of what the editor would make of the instruction, in editors that derive one.
    """

    picture: Image.Image
    instruction: str
    seed: int = 0
    expressive: str | None = None


@dataclass(frozen=True)
class Edited:
    """An edited picture and how it came about.

    `expressive` is the instruction that the editor derived, if it derives one, and `source` who it is from (model,
    user or fallback); `rows` counts the pictures that went through the denoiser; `warnings` say what was odd.
    """

    picture: Image.Image
    expressive: str = ""
    source: str = ""
    rows: int = 0
    warnings: tuple[str, ...] = ()


class ImageEditor(ABC):
    """Changes pictures as instructions say. It is a callable: nothing of it changes, so there is nothing to undo."""

    name: ClassVar[str]
    trains: ClassVar[bool] = False
    derives: ClassVar[bool] = False  # an expressive instruction
    defaults: Settings
    model: str
    fingerprint: str

    @classmethod
    @abstractmethod
    def load(cls, model: str | None, options: Any) -> ImageEditor:
        """Return the editor for a model: a known name, a folder or a hub id; None is the editor's own.

        Raises ModelError.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the denoiser is."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """The long side in pixels that the model was made for."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Both sides of a working picture are multiples of this many pixels."""

    @abstractmethod
    def edit_batch(
        self, jobs: Sequence[Job], settings: Settings, tick: Tick
    ) -> list[Edited]:
        """Edit pictures of one size, whose sides are multiples of `multiple`; `tick(B)` after each step.

        `settings` has no gaps. A job's result does not depend on the others. Raises DataError, ModelError.
        """

    @torch.no_grad()
    def edit(
        self,
        jobs: Sequence[Job],
        settings: Settings | None = None,
        *,
        batch_size: int = 1,
        tick: Tick = lambda _n: None,
    ) -> list[Edited]:
        """Edit pictures of any sizes and return the results in order; those of one working size go together.

        An empty instruction gives the picture back as it is (InstructPix2Pix does so too). Raises DataError for
        settings that make no sense or an instruction the model cannot read.
        """
        chosen = (settings or Settings()).over(self.defaults)
        self._check(chosen)
        if not self.derives and any(job.expressive for job in jobs):
            raise DataError(
                f"{self.name} derives no expressive instruction",
                "leave it out, or name another editor",
            )
        groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        done: dict[int, Edited] = {}
        for i, job in enumerate(jobs):
            if not job.instruction.strip():
                done[i] = Edited(
                    job.picture,
                    warnings=("empty instruction: the picture is returned as it is",),
                )
            else:
                groups[
                    working_size(
                        job.picture.size,
                        chosen.resolution or self.resolution,
                        self.multiple,
                    )
                ].append(i)
        for size, members in groups.items():
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                fitted = [
                    replace(jobs[i], picture=resized(jobs[i].picture, size))
                    for i in part
                ]
                for i, result in zip(
                    part, self.edit_batch(fitted, chosen, tick), strict=True
                ):
                    done[i] = (
                        restored(result, jobs[i].picture.size)
                        if chosen.restore
                        else result
                    )
        return [done[i] for i in range(len(jobs))]

    def check_steps(self, steps: int) -> None:
        """Raise DataError unless the sampler can make so many steps; an editor with a sampler tries it out."""
        if steps < 1:
            raise DataError(f"--steps {steps}: at least 1")

    def _check(self, settings: Settings) -> None:
        problems: list[str] = []
        hint = ""
        try:
            self.check_steps(settings.steps or 0)
        except DataError as error:
            problems, hint = [*error.problems], error.hint
        if (
            settings.resolution is not None
            and not self.multiple <= settings.resolution <= LARGEST_SIDE
        ):
            problems.append(
                f"--resolution {settings.resolution}: from {self.multiple} to {LARGEST_SIDE} pixels"
            )
        if settings.image_guidance is not None and self.defaults.image_guidance is None:
            problems.append(
                f"--image-guidance: {self.name} has no guidance by the picture"
            )
        if problems:
            raise DataError(problems, hint)


def working_size(
    size: tuple[int, int], resolution: int, multiple: int
) -> tuple[int, int]:
    """Return (width, height) with a long side of about `resolution`, both sides multiples of `multiple`.

    A very long picture keeps at least an eighth of its long side, and is squeezed rather than lost.
    """
    scale = resolution / max(size)
    least = max(multiple, resolution // 8)
    width, height = (
        max(multiple, round(max(least, side * scale) / multiple) * multiple)
        for side in size
    )
    return width, height


def restored(result: Edited, size: tuple[int, int]) -> Edited:
    """Return a result in the size of its picture, with a warning where it is enlarged so much that it blurs."""
    worked = result.picture.size
    enlarged = replace(result, picture=resized(result.picture, size))
    if max(size) <= LARGEST_BLOW_UP * max(worked):
        return enlarged
    warning = (
        f"the model worked at {worked[0]} x {worked[1]} pixels and the result is enlarged to {size[0]} x {size[1]}, "
        "so it is blurred: --working-size leaves it small, --resolution works larger where the model can"
    )
    return replace(enlarged, warnings=(*result.warnings, warning))


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the picture in another size, or itself if it has that size."""
    return (
        picture
        if picture.size == size
        else picture.resize(size, Image.Resampling.LANCZOS)
    )
