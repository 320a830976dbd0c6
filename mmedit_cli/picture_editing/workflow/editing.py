"""`mmedit image-edit`: resolve what is asked, edit, and write the pictures with a record of how each came about."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageColor

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import CHECKPOINT, loading
from mmedit_cli.errors import DataError, MmeditError, RunError, UserError
from mmedit_cli.gallery import edit_sheet
from mmedit_cli.knowledge.trained_networks import (
    TrainedNetworks,
    chosen_networks,
    described,
    networks_line,
)
from mmedit_cli.output import Output
from mmedit_cli.picture_editing.methods.base import (
    EditedPicture,
    EditJob,
    EditSettings,
    ImageEditor,
)
from mmedit_cli.picture_editing.methods.shared.loading import LoadOptions
from mmedit_cli.pictures import (
    Picture,
    check_picture,
    load_alpha,
    load_picture,
    picture_digest,
)
from mmedit_cli.reading import Record, parse_json_object, read_lines
from mmedit_cli.records import Run
from mmedit_cli.storage import sha256_json, write_atomic

if TYPE_CHECKING:
    from mmedit_cli.output import Tick

_MOST_PROBLEMS = 20
_KEYS = ("image", "instruction", "output", "seed", "expressive")
_NO_ALPHA = ("JPEG", "BMP")


@dataclass(frozen=True)
class RequestedEdit:
    """One picture to make: from `image`, as `instruction` says, into `output`; `place` is where it was asked for."""

    image: Path
    instruction: str
    output: Path
    seed: int = 0
    expressive: str | None = None
    place: str = ""


@dataclass(frozen=True)
class PictureEditOptions:
    """How pictures are edited; the defaults are those of `mmedit image-edit`."""

    editor: str
    model: str | None = None
    load: LoadOptions = field(default_factory=LoadOptions)
    settings: EditSettings = field(default_factory=EditSettings)
    background: str = "#ffffff"
    keep_alpha: bool = False
    batch_size: int = 1
    force: bool = False
    records: Path = Path("records")
    checkpoint: str | None = None


def samples(wish: RequestedEdit, count: int) -> list[RequestedEdit]:
    """Return a wish with `count` seeds in a row; several outputs have their seed behind the name."""
    if count == 1:
        return [wish]
    seeds = range(wish.seed, wish.seed + count)
    named = [wish.output.with_stem(f"{wish.output.stem}-{seed}") for seed in seeds]
    return [
        RequestedEdit(wish.image, wish.instruction, output, seed, wish.expressive)
        for output, seed in zip(named, seeds, strict=True)
    ]


def read_wishes(file: Path, out: Path, seed: int) -> list[RequestedEdit]:
    """Read a JSONL file, one object a line: image, instruction and, if you like, output, seed, expressive.

    Images are named relative to the file, outputs relative to the folder `out`, which none of them leaves. Raises
    DataError with every bad line.
    """
    form = 'a line is {"image": ..., "instruction": ...}'
    wishes: list[RequestedEdit] = []
    problems: list[str] = []
    for number, line in read_lines(file, hint=form):
        if line.strip() and len(problems) < _MOST_PROBLEMS:
            place = f"{file}:{number}"
            try:
                found = _read_line(
                    parse_json_object(line, place), number, file.parent, out, seed
                )
                wishes.append(RequestedEdit(**{**vars(found), "place": place}))
            except DataError as error:
                problems += error.problems
    outputs: dict[Path, str] = {}
    for wish in wishes:
        if wish.output in outputs:
            problems.append(
                f"{wish.place}: the output {wish.output.name} is that of {outputs[wish.output]} too"
            )
        outputs.setdefault(wish.output, wish.place)
    if problems or not wishes:
        raise DataError(problems[:_MOST_PROBLEMS] or f"{file}: nothing in it", form)
    return wishes


def _read_line(
    record: Record, number: int, images: Path, out: Path, seed: int
) -> RequestedEdit:
    """Return the wish of a line; raise DataError for what is wrong with it."""
    record.only(*_KEYS)
    image = record.path("image")
    name = record.path("output", "") or f"{number:05d}-{Path(image).stem}.png"
    output = out / name
    if (
        not output.resolve().is_relative_to(out.resolve())
        or output.resolve() == out.resolve()
    ):
        record.fail("output", f"{name!r} is not inside {out}")
    own = record.integer("seed", seed, low=0)
    return RequestedEdit(
        images / image,
        record.text("instruction"),
        output,
        own,
        record.text("expressive", None),
    )


def check(
    wishes: Sequence[RequestedEdit],
    options: PictureEditOptions,
    done: frozenset[Path] = frozenset(),
) -> None:
    """Look at every input and output before a model is loaded; raise DataError with all that is wrong."""
    problems: list[str] = []
    overwriting = False
    suffixes = Image.registered_extensions()
    Image.init()
    for wish in wishes:
        place = f"{wish.place}: " if wish.place else ""
        kind = suffixes.get(wish.output.suffix.lower())
        try:
            check_picture(wish.image)
        except MmeditError as error:
            problems += [place + problem for problem in error.problems]
        if kind not in Image.SAVE:
            problems.append(
                f"{place}{wish.output}: {wish.output.suffix or 'no ending'} is no format of pictures"
            )
        elif options.keep_alpha and kind in _NO_ALPHA:
            problems.append(
                f"{place}{wish.output}: {kind} has no transparency for --keep-alpha"
            )
        if wish.output.is_dir():
            problems.append(f"{place}{wish.output}: is a folder")
        elif wish.output.exists() and wish.output.resolve() == wish.image.resolve():
            problems.append(f"{place}{wish.output}: the output is the input")
        elif wish.output.exists() and not options.force and wish.output not in done:
            problems.append(f"{place}{wish.output}: exists already")
            overwriting = True
    if problems:
        raise DataError(
            problems[:20], "--force overwrites outputs" if overwriting else ""
        )


def load_editor(options: PictureEditOptions, out: Output) -> ImageEditor:
    """Load the editor, saying so: it may take a while. Raises UnknownName, ModelError, UserError."""
    cls, model = registry.image_editors.get(options.editor), options.model
    networks = own_networks(options)
    if networks is not None:
        out.note(networks_line(networks.facts()))
        model = str(networks.path.parent)
    out.note(loading(model or options.editor))
    editor: ImageEditor = cls.load(model, options.load)
    return editor


def own_networks(options: PictureEditOptions) -> TrainedNetworks | None:
    """Return the training that `--checkpoint` names; None without the option. Raises UserError."""
    checkpoint = options.checkpoint
    if checkpoint is None:
        return None
    if not registry.image_editors.get(options.editor).trains:
        raise UserError(
            f"--checkpoint {checkpoint}: {options.editor} is not trained here",
            "leave the option out",
        )
    if options.model is not None:
        raise UserError(
            "--model and --checkpoint: the training names its model",
            "leave one of the two out",
        )
    path = chosen_networks(
        checkpoint, options.records, options.editor, kind="image_editors"
    )
    if path.name != CHECKPOINT:
        raise UserError(
            f"--checkpoint {checkpoint}: not called {CHECKPOINT}",
            "name the folder of the training",
        )
    return described(path)


def edit_pictures(
    wishes: Sequence[RequestedEdit],
    options: PictureEditOptions,
    out: Output,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Make pictures of one picture and return the report; with `sheet`, draw it and them beside each other there.

    Raises a UserError for bad input, before a model is loaded.
    """
    registry.image_editors.get(options.editor)
    drawn = (
        []
        if sheet is None
        else [RequestedEdit(wishes[0].image, wishes[0].instruction, sheet)]
    )
    check([*wishes, *drawn], options)
    editor = load_editor(options, out)
    with out.progress({"steps": len(wishes) * _steps(editor, options)}) as tick:
        edits = []
        for part in _edited(editor, wishes, options, tick):
            for made in part:
                _write(made)
                edits.append(made.record)
    if sheet is not None:
        edit_sheet(wishes[0].image, options.background, edits, sheet)
    return {
        **_head(editor, options),
        "edits": edits,
        "peak_memory": runtime.peak_memory(editor.device),
    }


def edit_batch(
    wishes: Sequence[RequestedEdit],
    folder: Path,
    options: PictureEditOptions,
    out: Output,
) -> dict[str, Any]:
    """Make the pictures of a list in a folder and return the report; what is there already is not made again.

    `edits.jsonl` in the folder tells how each came about. The line of a picture is written before the picture, so
    that a picture without a line is never the program's own and the same command continues after a kill at any moment.
    Raises a UserError for bad input.
    """
    registry.image_editors.get(options.editor)
    recorded = (
        Run.view(folder).read("edits") if folder.is_dir() and not options.force else []
    )
    made = frozenset(folder / record["output"] for record in recorded)
    check(wishes, options, made)
    editor = load_editor(options, out)
    head = _head(editor, options)
    environment = runtime.environment(editor.device)
    with Run.open(
        folder, {"command": "image-edit", **head}, environment, force=options.force
    ) as run:
        known = _known(run, {_key(wish, folder) for wish in wishes})
        left = [wish for wish in wishes if _key(wish, folder) not in known]
        other = {r["output"] for r in known.values()} & {
            str(wish.output.relative_to(folder)) for wish in left
        }
        if other:
            raise RunError(
                f"{folder / min(other)}: was made from another picture, instruction or seed",
                "name other outputs, or replace all with --force",
            )
        if len(left) < len(wishes):
            out.note(f"{len(wishes) - len(left)} of {len(wishes)} are there already")
        with out.progress({"steps": len(left) * _steps(editor, options)}) as tick:
            for part in _edited(editor, left, options, tick):
                if (
                    options.force
                ):  # a line must not speak of the picture that it replaces
                    for made in part:
                        made.wish.output.unlink(missing_ok=True)
                lines = [
                    {
                        **made.record,
                        "output": str(made.wish.output.relative_to(folder)),
                        "key": _key(made.wish, folder),
                    }
                    for made in part
                ]
                run.append("edits", lines)
                for made in part:
                    _write(made)
                known |= {line["key"]: line for line in lines}
    return {
        **head,
        "made": len(left),
        "edits": [known[_key(wish, folder)] for wish in wishes],
    }


def _known(run: Run, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Return the lines of the pictures that are there, by key; those of wanted pictures that are not are removed."""
    lines = run.read("edits")
    known = {
        line["key"]: line for line in lines if (run.folder / line["output"]).is_file()
    }
    kept = [line for line in lines if line["key"] in known or line["key"] not in wanted]
    if len(kept) < len(lines):
        run.rewrite("edits", kept)
    return known


@dataclass(frozen=True)
class _Made:
    """An edited picture as the bytes of its file, and how it came about."""

    wish: RequestedEdit
    data: bytes
    record: dict[str, Any]


def _edited(
    editor: ImageEditor,
    wishes: Sequence[RequestedEdit],
    options: PictureEditOptions,
    tick: Tick,
) -> Iterator[list[_Made]]:
    """Edit and yield the pictures, as many at a time as go through the model together; nothing is written."""
    import torch

    settings = options.settings.over(editor.defaults)
    for start in range(0, len(wishes), options.batch_size):
        part = wishes[start : start + options.batch_size]
        began = time.monotonic()
        pictures = [
            load_picture(Picture(wish.image, options.background)) for wish in part
        ]
        jobs = [
            EditJob(p, w.instruction, w.seed, w.expressive)
            for p, w in zip(pictures, part, strict=True)
        ]
        try:
            results = editor.edit(
                jobs,
                settings,
                batch_size=options.batch_size,
                tick=lambda n: tick("steps", n),
            )
        except torch.OutOfMemoryError as error:
            size = settings.resolution or editor.resolution
            raise MmeditError(
                f"the device's memory is too small for {len(part)} pictures of {size} pixels",
                "lower --batch-size or --resolution, or try --dtype bfloat16",
            ) from error
        seconds = (time.monotonic() - began) / len(part)
        made = []
        for wish, result in zip(part, results, strict=True):
            data = _encoded(wish, result, options)
            record = {
                "image": str(wish.image),
                "output": str(wish.output),
                "instruction": wish.instruction,
                "expressive": result.expressive,
                "expressive_source": result.source,
                "seed": wish.seed,
                "rows": result.rows,
                "size": list(result.picture.size),
                "seconds": round(seconds, 3),
                "input_sha256": picture_digest(wish.image),
                "output_sha256": _sha256(data),
                "warnings": list(result.warnings),
            }
            made.append(_Made(wish, data, record))
        yield made


def _encoded(
    wish: RequestedEdit, result: EditedPicture, options: PictureEditOptions
) -> bytes:
    """Return the bytes of the file of an edited picture."""
    picture = result.picture
    alpha = load_alpha(wish.image) if options.keep_alpha else None
    if alpha is not None:
        picture = picture.convert("RGBA")
        picture.putalpha(alpha.resize(picture.size))
    file = io.BytesIO()
    picture.save(file, Image.registered_extensions()[wish.output.suffix.lower()])
    return file.getvalue()


def _write(made: _Made) -> None:
    output = made.wish.output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{output.parent}: cannot create the folder: {error.strerror}"
        ) from error
    write_atomic(output, made.data)


def _head(editor: ImageEditor, options: PictureEditOptions) -> dict[str, Any]:
    settings = options.settings.over(editor.defaults)
    return {
        "editor": options.editor,
        "model": {"name": editor.model, "fingerprint": editor.fingerprint},
        "settings": {
            **asdict(settings),
            "resolution": settings.resolution or editor.resolution,
        },
        "background": options.background,
        "keep_alpha": options.keep_alpha,
        "dtype": options.load.dtype,
        "versions": runtime.versions(),
    }


def _steps(editor: ImageEditor, options: PictureEditOptions) -> int:
    return options.settings.over(editor.defaults).steps or 1


def _key(wish: RequestedEdit, folder: Path) -> str:
    """Return a digest of all that a picture depends on, apart from what the whole folder shares."""
    facts = [
        wish.instruction,
        wish.seed,
        wish.expressive,
        str(wish.output.relative_to(folder)),
    ]
    return sha256_json([picture_digest(wish.image), *facts])[:16]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def colour(text: str) -> str:
    """Return a colour as #rrggbb; raise UserError for what is none."""
    try:
        return "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(text)[:3])
    except ValueError as error:
        raise UserError(
            f"--background {text}: not a colour", "e.g. white, '#ffe0c0'"
        ) from error


def one_of(image: Path | None, instruction: str | None, batch: Path | None) -> None:
    """Check that a command asks for one picture or for a list of them; raise UserError."""
    if batch is None and (image is None or instruction is None):
        raise UserError(
            "no " + ("--image" if image is None else "INSTRUCTION"),
            'mmedit image-edit EDITOR --image in.png "make it winter" -o out.png, or --batch FILE',
        )
    if batch is not None and (image is not None or instruction is not None):
        raise UserError(
            "--batch: the pictures and instructions stand in the file",
            "leave out --image and INSTRUCTION",
        )
