"""Options that several commands share: one spelling, one help text, one way to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmedit_cli.commands import completion
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output

Editor = Annotated[
    str,
    typer.Argument(
        metavar="EDITOR",
        help="A method of `mmedit list`.",
        autocompletion=completion.editors,
    ),
]


def picture(text: str) -> Path:
    """Return the file of a picture that is named by a path or by its address in the web."""
    if "://" not in text:
        return Path(text)
    from mmedit_cli.in_hand import as_file

    return as_file(text)


Image = Annotated[
    Path | None,
    typer.Option(
        "--image",
        "-i",
        metavar="FILE|URL",
        parser=picture,
        help="The picture.",
        show_default=False,
    ),
]
Ledger = Annotated[
    Path, typer.Argument(metavar="LEDGER", help="The folder of the edits.")
]
WhichEdits = Annotated[
    str, typer.Argument(metavar="EDITS", help="3, or 3-7, or 1,4-6, or last, or all.")
]
Into = Annotated[
    Path,
    typer.Option(
        "--into",
        "--edits",
        help="The folder to keep it in: it is begun, or added to.",
        show_default=False,
    ),
]
NewFolder = Annotated[Path, typer.Option(help="A new folder.", show_default=False)]
RunFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A run.yaml of the records, or a YAML file of options: does that run again; options given here count.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        autocompletion=completion.models,
        help="A name of `mmedit list`, a folder, or a hub id such as owner/name. [default: one that comes along]",
        show_default=False,
    ),
]
DrawingModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        autocompletion=completion.models,
        help="A text-to-image model of `mmedit list`, a folder of diffusers, or a hub id. [default: one that comes "
        "along]",
        show_default=False,
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        autocompletion=completion.models,
        help="A name, a folder or a hub id. [default: the editor's own]",
        show_default=False,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        autocompletion=completion.data,
        help="A data set of `mmedit list` (NAME or NAME:SPLIT), a folder with a cases.jsonl, or a .jsonl, .json, "
        ".csv or .tsv file; several, joined by +, take turns.",
    ),
]
Pairs = Annotated[
    str,
    typer.Option(
        "--data",
        help="A set of edit pairs of `mmedit list`, a folder of pairs or parquet files, or a .jsonl file.",
    ),
]
Subjects = Annotated[
    str,
    typer.Option(
        "--data",
        help="A set of subjects of `mmedit list`, or a folder with a subjects.yaml.",
    ),
]
Facts = Annotated[
    str,
    typer.Option(
        "--data",
        help="Facts about drawings of `mmedit list`: emojikb-facts, timed or road, each with :SPLIT.",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root",
        help="Folder of a published data set. [default: where it is downloaded to]",
        show_default=False,
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        help="Folder the pictures are named in, if not beside the data.",
        show_default=False,
    ),
]
SkipMissing = Annotated[
    bool,
    typer.Option(
        "--skip-missing", help="Go on without the queries whose picture is missing."
    ),
]
SkipLong = Annotated[
    bool,
    typer.Option(
        "--skip-long",
        help="Go on without the queries that are longer than the model reads.",
    ),
]
Template = Annotated[
    str,
    typer.Option(
        "--template",
        help="How texts become prompts: liveedit, easyedit, verbatim, plain or chat. [default: as published]",
        show_default=False,
    ),
]
Subset = Annotated[
    str,
    typer.Option(
        "--subset",
        help="Use the cases of a list: clean (`mmedit doctor DATA` writes it) or a file.",
        show_default=False,
    ),
]
HparamsFile = Annotated[
    Path | None,
    typer.Option(
        "--hparams",
        help="A YAML file instead of hparams/EDITOR.yaml.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one hyper-parameter; repeatable.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="latest|FILE|RUN",
        help="Networks of your own: the newest training, a file, or the folder or id of a run; for eval also "
        "`untrained`. [default: those that come along]",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Use the first so many cases.", show_default=False
    ),
]
Validation = Annotated[
    str | None,
    typer.Option(
        "--validation",
        help="Cases that choose the checkpoint. [default: the val split, else every 20th case]",
        show_default=False,
    ),
]
CacheGib = Annotated[
    float,
    typer.Option(
        "--cache-gib",
        min=0,
        help="Memory for frozen activations; more goes to disk.",
    ),
]
Tensorboard = Annotated[
    bool,
    typer.Option("--tensorboard", help="Also write the curves for TensorBoard."),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Also upload the folder.",
        show_default=False,
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="Make the hub repository private.")
]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread the model as transformers does, e.g. auto.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Branch, tag or commit of the hub repository.",
        show_default=False,
    ),
]
Records = Annotated[
    Path,
    typer.Option("--records", envvar="MMEDIT_RECORDS", help="Where runs are kept."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Throw an earlier run away and do it again.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved plan and stop.")
]
LowMemory = Annotated[
    bool,
    typer.Option("--low-memory", help="Use less memory, and take more time."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def output_of_process(as_json: bool) -> Output:
    """Return the printer of a command; of several processes that share a run, only the first has one that prints."""
    from mmedit_cli.runtime import is_first_process

    return Output(as_json=as_json, silent=not is_first_process())


def named(model: str | None, out: Output) -> str:
    """Return the model that was named; else the default one, which is printed."""
    if model is not None:
        return model
    from mmedit_cli.catalog import default_model

    out.note(f"no --model: {default_model()}")
    return default_model()


def named_drawing(model: str | None, out: Output) -> str:
    """Return the text-to-image model that was named; else the default one, which is printed."""
    if model is not None:
        return model
    from mmedit_cli.catalog import DRAWING_DEFAULTS, default_model

    out.note(f"no --model: {default_model(DRAWING_DEFAULTS)}")
    return default_model(DRAWING_DEFAULTS)


def numbers(
    text: str, option: str, *, example: str = "1,10,100", once: bool = True
) -> tuple[int, ...]:
    """Read whole numbers separated by commas, in their order and each `once`; raise UserError for anything else."""
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
        if found and max(map(abs, found)) < 2**63:
            return tuple(dict.fromkeys(found)) if once else found
    except ValueError:
        pass
    raise UserError(
        f"{option} {text}: not whole numbers separated by commas",
        f"e.g. {option} {example}",
    )


def ranges(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers and ranges, such as 3 or 8-23 or 1,4-6; raise UserError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first, last] if dash else [first]
        if not all(end.isdecimal() and len(end) < 5 for end in ends):
            problem = f"{option} {text}: not whole numbers or ranges"
            raise UserError(problem, f"e.g. {option} 8-23, or {option} 3,7,11")
        found += range(int(ends[0]), int(ends[-1]) + 1)
    return tuple(dict.fromkeys(found))


def cache_bytes(gib: float) -> int:
    """Return the bytes of --cache-gib; raise UserError for what is no size."""
    if not 0 <= gib < 2**20:  # neither infinite nor NaN
        raise UserError(
            f"--cache-gib {gib}: not a size of memory", "e.g. --cache-gib 4"
        )
    return int(gib * (1 << 30))
