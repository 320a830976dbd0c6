"""Draw pictures from prompts, with and without learned concepts, on one sheet or in single files."""

from __future__ import annotations

import io
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli.catalog import loading
from mmedit_cli.drawing.models.foreign_embeddings import read_embedding, split_token
from mmedit_cli.drawing.models.foreign_lora import (
    lora_file,
    put,
    read_lora,
    split_weight,
)
from mmedit_cli.drawing.models.prompts import Word
from mmedit_cli.drawing.workflow.concept_edits import ConceptEdits
from mmedit_cli.drawing.workflow.concepts import ConceptFolder
from mmedit_cli.errors import DataError, UserError, near_miss
from mmedit_cli.output import Output
from mmedit_cli.patch import Patch
from mmedit_cli.records import CONCEPT_EDITS
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.storage import write_atomic

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmedit_cli.drawing.models.stable_diffusion import Sampling, StableDiffusion

SHEETS = (".png", ".jpg", ".jpeg", ".webp")
LONGEST = {
    ".webp": 16383,
    ".jpg": 65535,
    ".jpeg": 65535,
}  # pixels of a side that a format holds
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
GAP = 8  # pixels between things
LINE = 16  # height of a line of text in pixels
INK = "#202020"
GREY = "#707070"
Edits = ConceptFolder | ConceptEdits


@dataclass(frozen=True)
class DrawOptions(LoadOptions):
    """What to draw: each prompt with each seed, with the concepts of the folder `edits` if there is one.

    `compare` also draws with the base model, where each concept is its plain word. `overrides` change how concepts
    are used (KEY=VALUE). `lora` are FILE[:WEIGHT] and `embeddings` FILE[:TOKEN] of others. `output` is a picture file
    for a sheet of all pictures, or a folder for single files.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    model: str | None = None
    edits: Path | None = None
    compare: bool = False
    overrides: tuple[str, ...] = ()
    force: bool = False
    low_memory: bool = False
    lora: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()

    @property
    def adds(self) -> bool:
        """Whether anything is added to the base model."""
        return bool(self.edits is not None or self.lora or self.embeddings)


@dataclass(frozen=True)
class DrawnPrompt:
    """The pictures of one prompt by one side, `base` or `edited`; each of their windows has a prompt of its own."""

    prompt: str
    window_prompts: tuple[str, ...]
    side: str
    seeds: tuple[int, ...]
    images: tuple[Any, ...]

    @property
    def caption(self) -> str:
        """The prompts of all windows in one line."""
        return " | ".join(self.window_prompts)


def draw(
    options: DrawOptions,
    sampling: Sampling,
    out: Output,
    loaded: StableDiffusion | None = None,
) -> dict[str, Any]:
    """Draw, write the pictures, and return what was written; `loaded` is the model, if it is in memory already.

    Raises UserError for an output that exists already, DataError for a prompt with an unknown token, StateError for
    concepts that do not fit the model.
    """
    for option, unused in (
        ("--compare", options.compare and not options.adds),
        ("--set", options.overrides and options.edits is None),
    ):
        if unused:
            raise UserError(
                f"{option}: there are no concepts to use", "give them with --edits DIR"
            )
    check_output(options)
    folder = None if options.edits is None else edits_in(options.edits)
    loras = [split_weight(text) for text in options.lora]
    for path, _ in loras:
        lora_file(path)
    if not options.embeddings:
        check_tokens(options.prompts, folder)
    model = loaded or _loaded(options, folder, out)
    added = Added(folder, [(read_lora(path, model), by) for path, by in loras])
    for text in options.embeddings:
        path, token = split_token(text)
        token, word = read_embedding(path, token, model)
        added.words[token] = word
    check_tokens(options.prompts, folder, list(added.words))
    pictures = len(options.prompts) * len(options.seeds) * (1 + options.compare)
    with out.progress({"steps": pictures * sampling.steps}) as tick:
        rows = _draw_all(model, added, options, sampling, lambda n: tick("steps", n))
    windows: dict[str, list[str]] = {}
    for row in rows:
        if len(row.window_prompts) > 1:
            windows[row.prompt] = list(row.window_prompts)
    for prompt, window_prompts in windows.items():
        quoted = ", ".join(map(repr, window_prompts))
        out.note(f"{prompt!r} has a window for each subject: {quoted}")
    facts = {
        "model": model.name,
        "steps": sampling.steps,
        "guidance": model.guidance_scale(sampling),
        "edits": None if folder is None else str(options.edits),
        "concepts": [] if folder is None else list(folder.tokens),
        "lora": list(options.lora),
        "embeddings": list(added.words),
    }
    files = write(rows, options.output, facts)
    return {
        **facts,
        "prompts": list(options.prompts),
        "windows": windows,
        "seeds": list(options.seeds),
        "files": [str(path) for path in files],
    }


def _loaded(options: DrawOptions, folder: Edits | None, out: Output) -> StableDiffusion:
    """Load the model that is named, else that of the concepts."""
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    name = options.model
    if not name:
        assert folder is not None
        name = str(folder.head["model"])
    out.note(loading(name))
    return load_stable_diffusion(
        name,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        low_memory=options.low_memory,
    )


def edits_in(folder: Path) -> Edits:
    """Return the concepts or the concept edits of a folder; raise StateError if there are none."""
    if (folder / CONCEPT_EDITS).exists():
        return ConceptEdits.existing(folder)
    return ConceptFolder.existing(folder)


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


def check_tokens(
    prompts: Sequence[str], folder: Edits | None, others: Sequence[str] = ()
) -> None:
    """Raise DataError for every token in angle brackets that no concept of the folder has, and no other word."""
    known = [*([] if folder is None else folder.tokens), *others]
    problems = []
    for prompt in prompts:
        for token in re.findall(r"<[^<>\s]+>", prompt):
            if token not in known:
                near = near_miss(token, known)
                problems.append(f"{prompt!r}: no concept {token}{near}")
    if problems:
        hint = "give the concepts with --edits DIR"
        if known:
            hint = f"there are: {', '.join(known)}"
        raise DataError(problems, hint)


@dataclass(frozen=True)
class Added:
    """What is added to the base model: edits, what LoRAs add to its weights with their weights, and words by token."""

    folder: Edits | None
    loras: Sequence[tuple[Mapping[str, Tensor], float]] = ()
    words: dict[str, Word] = field(default_factory=dict)

    def plain(self, prompt: str) -> str:
        """Return a prompt with the plain word for each concept and embedding."""
        if self.folder is not None:
            prompt = self.folder.plain(prompt)
        for token, word in self.words.items():
            prompt = prompt.replace(token, word.text)
        return prompt

    @contextmanager
    def to(self, model: StableDiffusion, overrides: Sequence[str]) -> Iterator[None]:
        """Inside the block a model has all of it; concepts and edits work on weights with the LoRAs."""
        with ExitStack() as stack:
            put(stack.enter_context(Patch(model.model)), self.loras)
            for token in self.words:
                if token in model.words:
                    raise DataError(f"{token}: named twice", "name it with FILE:TOKEN")
                model.words[token] = self.words[token]
                stack.callback(model.words.pop, token)
            if self.folder is not None:
                stack.enter_context(self.folder.load(model, overrides=overrides))
            yield


def _draw_all(
    model: StableDiffusion,
    added: Added,
    options: DrawOptions,
    sampling: Sampling,
    tick: Any,
) -> list[DrawnPrompt]:
    """Draw every prompt on every side, in the same batches: what an edit does not change is the same bit for bit."""
    prompts = [prompt for prompt in options.prompts for _ in options.seeds]
    seeds = list(options.seeds) * len(options.prompts)
    images: dict[str, list[Any]] = {}
    window_prompts: dict[str, list[tuple[str, ...]]] = {}
    if options.compare or not options.adds:
        plain = [added.plain(prompt) for prompt in prompts]
        images["base"] = model.generate(plain, seeds, sampling, tick=tick)
        window_prompts["base"] = [(added.plain(p),) for p in options.prompts]
    if options.adds:
        with added.to(model, options.overrides):
            by_prompt = [model.window_prompts(prompt) for prompt in options.prompts]
            window_prompts["edited"] = [tuple(texts) for texts in by_prompt]
            images["edited"] = model.generate(prompts, seeds, sampling, tick=tick)
    count = len(options.seeds)
    rows = []
    for i, prompt in enumerate(options.prompts):
        for side in images:
            row = DrawnPrompt(
                prompt,
                window_prompts[side][i],
                side,
                options.seeds,
                tuple(images[side][i * count : (i + 1) * count]),
            )
            rows.append(row)
    return rows


def write(
    rows: Sequence[DrawnPrompt], output: Path, facts: dict[str, Any]
) -> list[Path]:
    """Write all pictures on one sheet, or each into a folder; return the files."""
    if is_sheet(output):
        return [_write_sheet(rows, output, facts)]
    output.mkdir(parents=True, exist_ok=True)
    files = []
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    for row in rows:
        number = prompts.index(row.prompt)
        for seed, image in zip(row.seeds, row.images, strict=True):
            file = output / f"{number:03d}-{seed}-{row.side}.png"
            about = {**facts, "prompt": row.caption, "seed": seed}
            write_atomic(file, _encode(image, ".png", about))
            files.append(file)
    return files


def _write_sheet(
    rows: Sequence[DrawnPrompt], output: Path, facts: dict[str, Any]
) -> Path:
    """Write all pictures on one sheet, or a single picture as it is; return the file."""
    first = rows[0]
    single = len(rows) == 1 and len(first.images) == 1
    picture = first.images[0] if single else sheet(rows)
    longest = LONGEST.get(output.suffix.lower(), math.inf)
    if max(picture.size) > longest:  # the format could not hold it
        output = output.with_name(f"{output.name}.png")
    prompts = dict.fromkeys(row.prompt for row in rows)
    about = {
        **facts,
        "prompt": " | ".join(prompts),
        "seed": ",".join(map(str, first.seeds)),
    }
    write_atomic(output, _encode(picture, output.suffix, about))
    return output


def sheet(rows: Sequence[DrawnPrompt]) -> Image.Image:
    """Return all pictures on one: a row of seeds for each prompt and side, with its words above it."""
    from PIL import Image

    images = [image for row in rows for image in row.images]
    cell_width = max(image.width for image in images)
    cell_height = max(image.height for image in images)
    width = GAP + len(rows[0].images) * (cell_width + GAP)
    characters = max(8, (width - 2 * GAP) // 7)
    show_side = len({row.side for row in rows}) > 1
    captions = []
    for row in rows:
        text = f"{row.side}: {row.caption}" if show_side else row.caption
        lines = textwrap.wrap(text, characters)
        captions.append(lines or [""])
    tops = [GAP]
    for lines in captions:
        height = len(lines) * LINE + LINE + cell_height + GAP
        tops.append(tops[-1] + height)
    canvas = Image.new("RGB", (width, tops[-1]), "white")
    for row, lines, top in zip(rows, captions, tops, strict=False):
        _paste_row(canvas, row, lines, top, cell_width)
    return canvas


def _paste_row(
    canvas: Image.Image, row: DrawnPrompt, lines: list[str], top: int, cell_width: int
) -> None:
    """Write the caption of a row, and its pictures with their seeds below."""
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    pen = ImageDraw.Draw(canvas)
    for line in lines:
        pen.text((GAP, top), line, INK, font)
        top += LINE
    left = GAP
    for seed, image in zip(row.seeds, row.images, strict=True):
        pen.text(
            (left, top),
            f"seed {seed}",
            GREY,
            font,
        )
        canvas.paste(image, (left, top + LINE))
        left += cell_width + GAP


def _encode(image: Image.Image, suffix: str, facts: dict[str, Any]) -> bytes:
    """Return the bytes of a picture; a PNG contains how it was made."""
    from PIL.PngImagePlugin import PngInfo

    format_name = _FORMATS.get(suffix.lower(), "PNG")
    options = {}
    if suffix.lower() == ".png":
        info = PngInfo()
        for key, value in facts.items():
            info.add_itxt(f"mmedit:{key}", str(value))
        options["pnginfo"] = info
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()
