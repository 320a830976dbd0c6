"""`mmedit image-edit`: resolve the options, edit, and write the pictures with a record of each."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageColor

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import loading
from mmedit_cli.errors import DataError, MmeditError, RunError, UserError
from mmedit_cli.gallery import edit_sheet
from mmedit_cli.knowledge.trained_networks import (
    TrainedNetworks,
    chosen_networks,
    described,
    networks_line,
)
from mmedit_cli.model_folder import CHECKPOINT
from mmedit_cli.output import Output
from mmedit_cli.picture_editing.methods.base import (
    EditedPicture,
    EditJob,
    EditSettings,
    ImageEditor,
)
from mmedit_cli.pictures import (
    Picture,
    check_picture,
    load_alpha,
    load_picture,
    picture_digest,
)
from mmedit_cli.reading import Record, parse_json_object, read_lines
from mmedit_cli.records import Run
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.storage import sha256_json, write_atomic

if TYPE_CHECKING:
    from mmedit_cli.output import Tick

_MOST_PROBLEMS = 20
_KEYS = ("image", "instruction", "output", "seed", "expressive")
_NO_ALPHA = ("JPEG", "BMP")


@dataclass(frozen=True)
class RequestedEdit:
    """A picture to make: `image`, edited by `instruction`, is written to `output`; `place` is that of the request."""

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
    low_memory: bool = False


def samples(request: RequestedEdit, count: int) -> list[RequestedEdit]:
    """Return a request with `count` seeds in a row; several outputs get their seed behind the name."""
    if count == 1:
        return [request]
    found = []
    for seed in range(request.seed, request.seed + count):
        output = request.output.with_stem(f"{request.output.stem}-{seed}")
        found.append(replace(request, output=output, seed=seed, place=""))
    return found


def read_requests(file: Path, out: Path, seed: int) -> list[RequestedEdit]:
    """Read a JSONL file, one object a line: image, instruction and, if you like, output, seed, expressive.

    Images are named relative to the file, outputs relative to the folder `out`; no output may leave it. Raises
    DataError with every bad line.
    """
    form = 'a line is {"image": ..., "instruction": ...}'
    requests: list[RequestedEdit] = []
    problems: list[str] = []
    for number, line in read_lines(file, hint=form):
        if line.strip() and len(problems) < _MOST_PROBLEMS:
            place = f"{file}:{number}"
            try:
                record = parse_json_object(line, place)
                request = _read_line(
                    record,
                    number,
                    file.parent,
                    out,
                    seed,
                )
                requests.append(replace(request, place=place))
            except DataError as error:
                problems += error.problems
    first_places: dict[Path, str] = {}
    for request in requests:
        output = request.output
        first = first_places.setdefault(output, request.place)
        if first != request.place:
            problems.append(
                f"{request.place}: the output {output.name} is that of {first} too"
            )
    if problems or not requests:
        raise DataError(problems[:_MOST_PROBLEMS] or f"{file}: nothing in it", form)
    return requests


def _read_line(
    record: Record, number: int, images: Path, out: Path, seed: int
) -> RequestedEdit:
    """Return the request of a line; raise DataError for what is wrong with it."""
    record.only(*_KEYS)
    image = record.path("image")
    name = record.path("output", "") or f"{number:05d}-{Path(image).stem}.png"
    output = out / name
    folder = out.resolve()
    target = output.resolve()
    if target == folder or not target.is_relative_to(folder):
        record.fail("output", f"{name!r} is not inside {out}")
    return RequestedEdit(
        seed=record.integer("seed", seed, low=0),
        image=images / image,
        instruction=record.text("instruction"),
        output=output,
        expressive=record.text("expressive", None),
    )


def check(
    requests: Sequence[RequestedEdit],
    options: PictureEditOptions,
    done: frozenset[Path] = frozenset(),
) -> None:
    """Check every input and output before a model is loaded; raise DataError with all that is wrong."""
    problems: list[str] = []
    overwrites = False
    for request in requests:
        place = f"{request.place}: " if request.place else ""
        try:
            check_picture(request.image)
        except MmeditError as error:
            problems += [place + problem for problem in error.problems]
        output = request.output
        problem = _format_problem(output, options)
        if problem:
            problems.append(f"{place}{output}: {problem}")
        if output.is_dir():
            problems.append(f"{place}{output}: is a folder")
        elif not output.exists():
            continue
        elif output.resolve() == request.image.resolve():
            problems.append(f"{place}{output}: the output is the input")
        elif not options.force and output not in done:
            problems.append(f"{place}{output}: exists already")
            overwrites = True
    if problems:
        hint = "--force overwrites outputs" if overwrites else ""
        raise DataError(problems[:_MOST_PROBLEMS], hint)


def _format_problem(output: Path, options: PictureEditOptions) -> str:
    """Return what is wrong with the format of an output, or nothing."""
    suffixes = Image.registered_extensions()
    Image.init()
    kind = suffixes.get(output.suffix.lower())
    if kind not in Image.SAVE:
        return f"{output.suffix or 'no ending'} is no format of pictures"
    if options.keep_alpha and kind in _NO_ALPHA:
        return f"{kind} has no transparency for --keep-alpha"
    return ""


def load_editor(options: PictureEditOptions, out: Output) -> ImageEditor:
    """Load the editor, and say so, because it may take a while. Raises UnknownName, ModelError, UserError."""
    cls = registry.image_editors.get(options.editor)
    model = options.model
    networks = own_networks(options)
    if networks is not None:
        out.note(networks_line(networks.facts()))
        model = str(networks.path.parent)
    out.note(loading(model or options.editor))
    editor: ImageEditor = cls.load(model, options.load)
    if options.low_memory:
        editor.save_memory()
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
    requests: Sequence[RequestedEdit],
    options: PictureEditOptions,
    out: Output,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Edit one picture in several ways and return the report; `sheet` becomes a picture of all of them.

    Raises a UserError for bad input, before a model is loaded.
    """
    registry.image_editors.get(options.editor)
    first = requests[0]
    outputs = list(requests)
    if sheet is not None:
        outputs.append(RequestedEdit(first.image, first.instruction, sheet))
    check(outputs, options)
    editor = load_editor(options, out)
    edits = []
    with out.progress({"steps": len(requests) * _steps(editor, options)}) as tick:
        for batch in _edit_in_batches(editor, requests, options, tick):
            for file in batch:
                _write(file)
                edits.append(file.record)
    if sheet is not None:
        edit_sheet(first.image, options.background, edits, sheet)
    return {
        **_head(editor, options),
        "edits": edits,
        "peak_memory": runtime.peak_memory(editor.device),
    }


def edit_batch(
    requests: Sequence[RequestedEdit],
    folder: Path,
    options: PictureEditOptions,
    out: Output,
) -> dict[str, Any]:
    """Make the pictures of a list in a folder and return the report; finished pictures are not made again.

    `edits.jsonl` in the folder describes how each was made. The line of a picture is written before the picture: so a
    picture without a line was not made by this program, and the same command continues after a kill at any moment.
    Raises a UserError for bad input.
    """
    registry.image_editors.get(options.editor)
    check(
        requests,
        options,
        _recorded_outputs(folder, options),
    )
    editor = load_editor(options, out)
    head = _head(editor, options)
    config = {"command": "image-edit", **head}
    environment = runtime.environment(editor.device)
    keys = [_key(request, folder) for request in requests]
    with Run.open(
        folder,
        config,
        environment,
        force=options.force,
    ) as run:
        lines = _finished_lines(run, set(keys))
        by_key = zip(keys, requests, strict=True)
        left = [request for key, request in by_key if key not in lines]
        _check_outputs_free(left, lines, folder)
        if len(left) < len(requests):
            finished = len(requests) - len(left)
            out.note(f"{finished} of {len(requests)} are there already")
        with out.progress({"steps": len(left) * _steps(editor, options)}) as tick:
            for batch in _edit_in_batches(editor, left, options, tick):
                if options.force:
                    # A line must not describe the picture that it replaces.
                    for file in batch:
                        file.request.output.unlink(missing_ok=True)
                for line in _write_with_lines(batch, folder, run):
                    lines[line["key"]] = line
    return {
        **head,
        "made": len(left),
        "edits": [lines[key] for key in keys],
    }


def _recorded_outputs(folder: Path, options: PictureEditOptions) -> frozenset[Path]:
    """Return the outputs that an earlier run recorded in a folder."""
    if options.force or not folder.is_dir():
        return frozenset()
    lines = Run.view(folder).read("edits")
    return frozenset(folder / line["output"] for line in lines)


def _check_outputs_free(
    requests: Sequence[RequestedEdit], lines: dict[str, Any], folder: Path
) -> None:
    """Raise RunError if an output belongs to a finished picture of another request."""
    used = {line["output"] for line in lines.values()}
    wanted = {str(request.output.relative_to(folder)) for request in requests}
    both = used & wanted
    if both:
        raise RunError(
            f"{folder / min(both)}: was made from another picture, instruction or seed",
            "name other outputs, or replace all with --force",
        )


def _write_with_lines(
    batch: Sequence[_PictureFile], folder: Path, run: Run
) -> list[dict[str, Any]]:
    """Write the lines of some pictures into the run, then the pictures; return the lines."""
    lines = []
    for file in batch:
        output = file.request.output.relative_to(folder)
        key = _key(file.request, folder)
        lines.append({**file.record, "output": str(output), "key": key})
    run.append("edits", lines)
    for file in batch:
        _write(file)
    return lines


def _finished_lines(run: Run, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Return the lines of finished pictures by key; lines of wanted pictures without a file are removed."""
    lines = run.read("edits")
    finished = {}
    for line in lines:
        if (run.folder / line["output"]).is_file():
            finished[line["key"]] = line
    orphans = wanted - finished.keys()
    remaining = [line for line in lines if line["key"] not in orphans]
    if len(remaining) < len(lines):
        run.rewrite("edits", remaining)
    return finished


@dataclass(frozen=True)
class _PictureFile:
    """An edited picture as the bytes of its file, and the record of how it was made."""

    request: RequestedEdit
    data: bytes
    record: dict[str, Any]


def _edit_in_batches(
    editor: ImageEditor,
    requests: Sequence[RequestedEdit],
    options: PictureEditOptions,
    tick: Tick,
) -> Iterator[list[_PictureFile]]:
    """Edit and yield the pictures in batches; nothing is written."""
    import torch

    settings = options.settings.over(editor.defaults)
    for start in range(0, len(requests), options.batch_size):
        batch = requests[start : start + options.batch_size]
        began = time.monotonic()
        jobs = [_job(request, options) for request in batch]
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
                f"the device's memory is too small for {len(batch)} pictures of {size} pixels",
                "lower --batch-size or --resolution, or try --dtype bfloat16",
            ) from error
        seconds = (time.monotonic() - began) / len(batch)
        files = []
        for request, result in zip(batch, results, strict=True):
            data = _encode(request, result, options)
            record = _record(request, result, data, seconds)
            files.append(_PictureFile(request, data, record))
        yield files


def _job(request: RequestedEdit, options: PictureEditOptions) -> EditJob:
    return EditJob(
        load_picture(Picture(request.image, options.background)),
        request.instruction,
        request.seed,
        request.expressive,
    )


def _record(
    request: RequestedEdit, result: EditedPicture, data: bytes, seconds: float
) -> dict[str, Any]:
    return {
        "image": str(request.image),
        "output": str(request.output),
        "instruction": request.instruction,
        "expressive": result.expressive,
        "expressive_source": result.source,
        "seed": request.seed,
        "rows": result.rows,
        "size": list(result.picture.size),
        "seconds": round(seconds, 3),
        "input_sha256": picture_digest(request.image),
        "output_sha256": hashlib.sha256(data).hexdigest(),
        "warnings": list(result.warnings),
    }


def _encode(
    request: RequestedEdit, result: EditedPicture, options: PictureEditOptions
) -> bytes:
    """Return the bytes of the file of an edited picture."""
    picture = result.picture
    alpha = load_alpha(request.image) if options.keep_alpha else None
    if alpha is not None:
        picture = picture.convert("RGBA")
        picture.putalpha(alpha.resize(picture.size))
    suffix = request.output.suffix.lower()
    file = io.BytesIO()
    picture.save(file, Image.registered_extensions()[suffix])
    return file.getvalue()


def _write(file: _PictureFile) -> None:
    folder = file.request.output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot create the folder: {error.strerror}"
        ) from error
    write_atomic(file.request.output, file.data)


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


def _key(request: RequestedEdit, folder: Path) -> str:
    """Return a digest of everything that a picture depends on, except what the whole folder shares."""
    facts = [
        picture_digest(request.image),
        request.instruction,
        request.seed,
        request.expressive,
        str(request.output.relative_to(folder)),
    ]
    return sha256_json(facts)[:16]


def colour(text: str) -> str:
    """Return a colour as #rrggbb; raise UserError for a text that is not a colour."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(text)
    except ValueError as error:
        raise UserError(
            f"--background {text}: not a colour", "e.g. white, '#ffe0c0'"
        ) from error
    return f"#{red:02x}{green:02x}{blue:02x}"


def one_of(image: Path | None, instruction: str | None, batch: Path | None) -> None:
    """Check that a command asks for one picture or for a list of them; raise UserError."""
    if batch is None and (image is None or instruction is None):
        missing = "--image" if image is None else "INSTRUCTION"
        raise UserError(
            f"no {missing}",
            'mmedit image-edit EDITOR --image in.png "make it winter" -o out.png, or --batch FILE',
        )
    if batch is not None and (image is not None or instruction is not None):
        raise UserError(
            "--batch: the pictures and instructions stand in the file",
            "leave out --image and INSTRUCTION",
        )
