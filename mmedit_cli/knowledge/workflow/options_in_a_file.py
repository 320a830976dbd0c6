"""The options of an evaluation as a file says them: the way back from `run_file.as_run_file`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.knowledge.workflow.evaluation import EvalOptions
from mmedit_cli.knowledge.workflow.run_file import OF_DATA, OF_PROTOCOL, OF_RUN
from mmedit_cli.reading import Record

# what `from_run_file` reads, but for the hyper-parameters a list or a text
KNOWN = (
    "editor",
    "model",
    "device",
    "dtype",
    "device-map",
    "revision",
    "data",
    *(name.replace("_", "-") for name in (*OF_DATA, *OF_PROTOCOL, *OF_RUN)),
    "set",
)


def from_run_file(values: Mapping[str, Any], place: str, records: Path) -> EvalOptions:
    """Return the `EvalOptions` of an evaluation by the names of options on the command line, with its defaults.

    `place` names the file in errors. Raises UserError for an option that is unknown or of another type.
    """
    from mmedit_cli.knowledge.data.base import DataOptions

    given = Record(dict(values), place, error=UserError, hint="mmedit eval --help")
    given.only(*KNOWN)
    model = ModelOptions(
        given.text("model", ""),
        given.text("device", "auto"),
        given.text("dtype", "auto"),
        given.text("device-map", None),
        given.text("revision", None),
    )
    data = DataOptions(
        _path(given, "root"),
        _path(given, "images"),
        given.text("template", ""),
        given.text("subset", ""),
        given.flag("skip-missing", False),
        given.flag("skip-long", False),
    )
    return EvalOptions(
        given.text("editor", empty=False),
        model,
        given.text("data", "emojikb"),
        _protocol(given),
        data,
        _path(given, "hparams"),
        tuple(given.array("set", str, [])),
        given.text("checkpoint", None),
        given.integer("limit", None, low=1),
        given.integer("seed", 0, low=0),
        records,
        intervals_by=given.text("intervals-by", None),
        ability=given.flag("ability", False),
    )


def _path(given: Record, key: str) -> Path | None:
    named = given.path(key, None)
    return None if named is None else Path(named)


def _protocol(given: Record) -> Any:
    """Return how edits are made and asked about, with the defaults of the command line."""
    from mmedit_cli.knowledge.evaluation.protocol import Protocol, milestones

    sequential = given.integer("sequential", 1, low=1)
    report_at = milestones(sequential)
    if "report-at" in given:
        report_at = tuple(sorted(given.array("report-at", int)))
    protocols = ("ar", "tf_liveedit", "tf_easyedit", "tf_em")
    if "protocols" in given:
        protocols = tuple(given.array("protocols", str))
    return Protocol(
        sequential,
        report_at,
        given.integer("edit-batch", 1, low=1),
        protocols,
        given.integer("max-new-tokens", 16, low=1),
        given.integer("batch-size", 32, low=1),
    )
