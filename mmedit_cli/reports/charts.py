"""Charts as files: the same numbers give the same bytes, so a chart changes only with what it shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mmedit_cli.errors import UserError
from mmedit_cli.storage import write_atomic

ENDINGS = (".png", ".svg")


def plotter(file: Path) -> Any:
    """Return matplotlib's pyplot, ready to draw for a file; raise UserError without it, or for another ending."""
    if file.suffix not in ENDINGS:
        raise UserError(f"{file}: a chart must end in {' or '.join(ENDINGS)}")
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            f"{file}: a chart needs matplotlib", "pip install 'mmedit-cli[plots]'"
        ) from error
    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    matplotlib.rcParams["svg.hashsalt"] = "mmedit"
    import matplotlib.pyplot as plt

    return plt


def write_chart(figure: Any, file: Path) -> None:
    """Write a figure atomically, without a date."""
    ending = file.suffix.removeprefix(".")
    undated = {"Date": None} if ending == "svg" else None
    drawn = io.BytesIO()
    figure.savefig(
        drawn,
        format=ending,
        bbox_inches="tight",
        metadata=undated,
    )
    write_atomic(file, drawn.getvalue())
