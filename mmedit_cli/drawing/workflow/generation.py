"""Pictures from prompts: with and without one's own concepts, side by side, on one sheet or file by file."""

from __future__ import annotations

import io
import math
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli.catalog import loading
from mmedit_cli.drawing.workflow.concepts import ConceptFolder
from mmedit_cli.errors import DataError, UserError, near_miss
from mmedit_cli.output import Output
from mmedit_cli.storage import write_atomic

if TYPE_CHECKING:
    from PIL import Image

    from mmedit_cli.drawing.models.stable_diffusion import Sampling, StableDiffusion

SHEETS = (".png", ".jpg", ".jpeg", ".webp")
LONGEST = {
    ".webp": 16383,
    ".jpg": 65535,
    ".jpeg": 65535,
}  # pixels of a side that a format holds
GAP, LINE, INK, GREY = (
    8,
    16,
    "#202020",
    "#707070",
)  # pixels between things, height of a line of text; colours


@dataclass(frozen=True)
class DrawOptions:
    """What to draw: each prompt with each seed, with the concepts of the folder `edits` if there is one.

    `compare` also draws with the base model, where each concept is its plain word. `overrides` change how concepts
    are used (KEY=VALUE). `output` is a picture for a sheet of all, or a folder for a file each.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    model: str | None = None
    edits: Path | None = None
    compare: bool = False
    overrides: tuple[str, ...] = ()
    force: bool = False
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    low_memory: bool = False


@dataclass(frozen=True)
class Row:
    """The pictures of one prompt, by one side: `base` or `edited`; `told` is what each of their windows was told."""

    prompt: str
    told: tuple[str, ...]
    side: str
    seeds: tuple[int, ...]
    images: tuple[Any, ...]

    @property
    def said(self) -> str:
        """What the model was told, in a line."""
        return " | ".join(self.told)


def draw(options: DrawOptions, sampling: Sampling, out: Output) -> dict[str, Any]:
    """Draw, write the pictures, and return what was written.

    Raises UserError for an output that is there already, DataError for a prompt with an unknown token, StateError.
    """
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    for option, given in (("--compare", options.compare), ("--set", options.overrides)):
        if given and options.edits is None:
            raise UserError(
                f"{option}: there are no concepts to use", "give them with --edits DIR"
            )
    check_output(options)
    folder = None if options.edits is None else ConceptFolder.existing(options.edits)
    check_tokens(options.prompts, folder)
    name = options.model or (folder.head["model"] if folder is not None else None)
    assert name is not None
    out.note(loading(name))
    model = load_stable_diffusion(
        name,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        low_memory=options.low_memory,
    )
    pictures = len(options.prompts) * len(options.seeds) * (1 + options.compare)
    with out.progress({"steps": pictures * sampling.steps}) as tick:
        rows = _rows(model, folder, options, sampling, lambda n: tick("steps", n))
    windows = {row.prompt: list(row.told) for row in rows if len(row.told) > 1}
    for prompt, told in windows.items():
        out.note(
            f"{prompt!r} has a window for each subject: {', '.join(map(repr, told))}"
        )
    facts = {
        "model": model.name, "steps": sampling.steps, "guidance": model.guidance_scale(sampling),
        "edits": None if folder is None else str(options.edits),
        "concepts": [] if folder is None else folder.tokens,
    }  # fmt: skip
    return {**facts, "prompts": list(options.prompts), "windows": windows, "seeds": list(options.seeds),
            "files": [str(path) for path in write(rows, options.output, facts)]}  # fmt: skip


def is_sheet(output: Path) -> bool:
    """Whether all pictures go into one file; else it is a folder for a file each."""
    return output.suffix.lower() in SHEETS and not output.is_dir()


def check_output(options: DrawOptions) -> None:
    """Raise UserError for an output that would overwrite something, or that has no folder to lie in."""
    path = options.output
    if is_sheet(path):
        if path.exists() and not options.force:
            raise UserError(
                f"{path}: there already", "--force replaces it, -o FILE writes another"
            )
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path.parent}: no such folder", "make it first")
    elif path.suffix and not path.is_dir():
        raise UserError(
            f"{path}: not a kind of picture",
            f"use one of {', '.join(SHEETS)}, or a folder",
        )
    elif path.is_file() or (
        path.is_dir() and any(path.glob("*.png")) and not options.force
    ):
        raise UserError(
            f"{path}: there already", "--force adds to it, -o FOLDER takes another"
        )
    folder = path.absolute().parent if is_sheet(path) else path.absolute()
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "cannot be written to" if above.is_dir() else "not a folder"
        raise UserError(f"{above}: {what}", "name another place with -o")


def check_tokens(prompts: Sequence[str], folder: ConceptFolder | None) -> None:
    """Raise DataError for every token in angle brackets that no concept of the folder has."""
    known = [] if folder is None else folder.tokens
    problems = [
        f"{prompt!r}: no concept {token}{near_miss(token, known)}"
        for prompt in prompts
        for token in re.findall(r"<[^<>\s]+>", prompt)
        if token not in known
    ]
    if problems:
        raise DataError(
            problems,
            f"there are: {', '.join(known)}"
            if known
            else "give the concepts with --edits DIR",
        )


def _rows(
    model: StableDiffusion,
    folder: ConceptFolder | None,
    options: DrawOptions,
    sampling: Sampling,
    tick: Any,
) -> list[Row]:
    """Draw everything; both sides in the same batches, so that what an edit leaves alone is the same bit for bit."""
    prompts = [prompt for prompt in options.prompts for _ in options.seeds]
    seeds = list(options.seeds) * len(options.prompts)
    sides: dict[str, list[Any]] = {}
    told = {"base": {prompt: (_plain(prompt, folder),) for prompt in options.prompts}}
    if options.compare or folder is None:
        plain = [told["base"][prompt][0] for prompt in prompts]
        sides["base"] = model.generate(plain, seeds, sampling, tick=tick)
    if folder is not None:
        with folder.load(model, overrides=options.overrides):
            told["edited"] = {
                prompt: tuple(model.window_prompts(prompt))
                for prompt in options.prompts
            }
            sides["edited"] = model.generate(prompts, seeds, sampling, tick=tick)
    count = len(options.seeds)
    return [
        Row(
            prompt,
            told[side][prompt],
            side,
            options.seeds,
            tuple(images[i * count : (i + 1) * count]),
        )
        for i, prompt in enumerate(options.prompts)
        for side, images in sides.items()
    ]


def _plain(prompt: str, folder: ConceptFolder | None) -> str:
    """Return a prompt with the plain word for each concept."""
    for entry in [] if folder is None else folder.entries:
        prompt = prompt.replace(entry["token"], entry["superclass"])
    return prompt


def write(rows: Sequence[Row], output: Path, facts: dict[str, Any]) -> list[Path]:
    """Write all pictures on one sheet, or each into a folder; return the files."""
    if is_sheet(output):
        single = len(rows) == 1 and len(rows[0].images) == 1
        whole = rows[0].images[0] if single else sheet(rows)
        if max(whole.size) > LONGEST.get(
            output.suffix.lower(), math.inf
        ):  # then it would be lost
            output = output.with_name(f"{output.name}.png")
        write_atomic(output, _encoded(whole, output.suffix, _said(rows, facts)))
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    files = []
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    for row in rows:
        for seed, image in zip(row.seeds, row.images, strict=True):
            files.append(
                output / f"{prompts.index(row.prompt):03d}-{seed}-{row.side}.png"
            )
            write_atomic(
                files[-1],
                _encoded(image, ".png", {**facts, "prompt": row.said, "seed": seed}),
            )
    return files


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Return all pictures on one: a row of seeds for each prompt and side, with its words above it."""
    from PIL import Image, ImageDraw, ImageFont

    cell, side = (
        max(getattr(image, edge) for row in rows for image in row.images)
        for edge in ("width", "height")
    )
    width = GAP + len(rows[0].images) * (cell + GAP)
    font = ImageFont.load_default(12)
    several = len({row.side for row in rows}) > 1
    texts = []
    for row in rows:
        words = f"{row.side}: {row.said}" if several else row.said
        texts.append(textwrap.wrap(words, max(8, (width - 2 * GAP) // 7)) or [""])
    heights = [len(lines) * LINE + LINE + side + GAP for lines in texts]
    whole = Image.new("RGB", (width, GAP + sum(heights)), "white")
    pen = ImageDraw.Draw(whole)
    top = GAP
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for i, line in enumerate(lines):
            pen.text((GAP, top + i * LINE), line, INK, font)
        for j, (seed, image) in enumerate(zip(row.seeds, row.images, strict=True)):
            left = GAP + j * (cell + GAP)
            pen.text((left, top + len(lines) * LINE), f"seed {seed}", GREY, font)
            whole.paste(image, (left, top + (len(lines) + 1) * LINE))
        top += height
    return whole


def _said(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    prompts = " | ".join(dict.fromkeys(row.prompt for row in rows))
    return {**facts, "prompt": prompts, "seed": ",".join(map(str, rows[0].seeds))}


def _encoded(image: Image.Image, suffix: str, facts: dict[str, Any]) -> bytes:
    """Return the bytes of a picture; a PNG carries how it was made."""
    from PIL.PngImagePlugin import PngInfo

    file, options = io.BytesIO(), {}
    if suffix.lower() == ".png":
        info = PngInfo()
        for key, value in facts.items():
            info.add_itxt(f"mmedit:{key}", str(value))
        options = {"pnginfo": info}
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(suffix.lower(), "PNG")
    image.save(file, kind, **options)
    return file.getvalue()
