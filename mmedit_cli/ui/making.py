"""Pictures that visitors let be made: drawn from a text, or changed by an instruction."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

from PIL import Image

from mmedit_cli.catalog import DRAWING_DEFAULTS, default_model
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.stable_diffusion import Sampling, StableDiffusion
from mmedit_cli.drawing.workflow.generation import DrawOptions, draw, edits_in
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output
from mmedit_cli.picture_editing.methods.base import (
    EditedPicture,
    EditJob,
    EditSettings,
    ImageEditor,
)
from mmedit_cli.picture_editing.workflow.editing import (
    PictureEditOptions,
    load_editor,
)
from mmedit_cli.pictures import Picture, check_picture, load_picture
from mmedit_cli.runtime import LoadOptions

MOST_STEPS = 100
_LONGEST = 1000  # characters of a prompt or an instruction


class Drawing:
    """Draws with concepts, beside what the base model draws, or without any; `home` is for what lies between.

    `concepts` is a folder that is drawn with unless another one is named. The model is loaded when the first picture
    is asked for.
    """

    def __init__(
        self, model: str | None, concepts: Path | None, home: Path, load: LoadOptions
    ) -> None:
        self.concepts = concepts
        self.load = load
        self.home = home
        self.tokens: list[str] = []
        if concepts is not None:
            edits = edits_in(concepts)
            self.tokens = list(edits.tokens)
            model = model or str(edits.head["model"])
        self.model = model or default_model(DRAWING_DEFAULTS)
        self._loaded: StableDiffusion | None = None
        self._turn = threading.Lock()

    def draw(
        self, prompt: str, seed: int, steps: int, concepts: Path | None = None
    ) -> Image.Image:
        """Return a picture of a prompt, with the concepts of a folder if one is named or given; raise UserError."""
        _check(prompt, "what to draw")
        _check_steps(steps)
        folder = concepts or self.concepts
        file = self.home / f"{secrets.token_hex(16)}.png"
        options = DrawOptions(
            device=self.load.device,
            dtype=self.load.dtype,
            prompts=(prompt.strip(),),
            seeds=(seed,),
            output=file,
            model=self.model,
            edits=folder,
            compare=folder is not None,
        )
        sampling = Sampling(steps=steps)
        out = Output(quiet=True)
        with self._turn:
            draw(options, sampling, out, self._model())
        drawn = load_picture(Picture(file))
        file.unlink()
        return drawn

    def _model(self) -> StableDiffusion:
        """Return the model, which is loaded once."""
        if self._loaded is None:
            self._loaded = load_stable_diffusion(
                self.model,
                device=self.load.device,
                dtype=self.load.dtype,
            )
        return self._loaded


class Changing:
    """Changes pictures by instruction; its editor is loaded when the first one is asked for."""

    def __init__(self, editor: str, load: LoadOptions) -> None:
        self.options = PictureEditOptions(editor, load=load)
        self._editor: ImageEditor | None = None
        self._turn = threading.Lock()

    def change(
        self, picture: str | None, instruction: str, seed: int, steps: int
    ) -> EditedPicture:
        """Return a picture after a change, with the instruction that the editor derived, if it derives one."""
        if not picture:
            raise UserError("no picture: choose one first")
        _check(instruction, "what to change")
        _check_steps(steps)
        file = Path(picture)
        check_picture(file)
        image: Image.Image = load_picture(Picture(file))
        job = EditJob(image, instruction.strip(), seed)
        with self._turn:
            if self._editor is None:
                self._editor = load_editor(self.options, Output(quiet=True))
            (done,) = self._editor.edit([job], EditSettings(steps=steps))
        return done


def _check(text: str, what: str) -> None:
    if not text.strip():
        raise UserError(f"say {what}")
    if len(text) > _LONGEST:
        raise UserError(f"{what}: longer than {_LONGEST:,} characters")


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"steps: {steps} is not from 1 to {MOST_STEPS}")
