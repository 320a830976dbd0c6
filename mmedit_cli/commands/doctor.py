"""`mmedit doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def doctor(
    data: Annotated[
        str | None,
        typer.Argument(
            help="Also check the cases and images of this data, or how this model works.",
            show_default=False,
        ),
    ] = None,
    root: options.Root = None,
    images: options.Images = None,
    skip_missing: options.SkipMissing = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check the installation, and the data or the model that is named; exit 1 if something is wrong.

    Published data are also compared with their training side, and the list for `--subset clean` is written. A model
    is loaded and compared with its own processor and `generate`; what was found is kept.

    Examples:

      mmedit doctor emojikb

      mmedit doctor evqa --root easy-edit-mm --images coco

      mmedit doctor my_facts.csv

      mmedit doctor HuggingFaceTB/SmolVLM-256M-Instruct
    """
    from mmedit_cli import doctor as checks
    from mmedit_cli import kinds
    from mmedit_cli.catalog import is_model, loading
    from mmedit_cli.knowledge.data.base import DataOptions

    out = Output(as_json=as_json)
    if data is None:
        well = checks.run(out)
    elif is_model(data):
        out.note(loading(data))
        well = checks.run(out, checks.check_model(data))
    else:
        out.note(f"checking {data}: every picture is opened, which may take a while")
        where = DataOptions(root, images, skip_missing=skip_missing)
        findings = kinds.kind_of_data(data).check_data(data, where)
        well = checks.run(out, findings)
    raise typer.Exit(0 if well else 1)
