"""An evaluation as a run file: the options of `mmedit eval` that make the same run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.reading import Record

_OF_DATA = ("root", "images", "template", "subset", "skip_missing", "skip_long")
_OF_PROTOCOL = (
    "sequential",
    "report_at",
    "edit_batch",
    "protocols",
    "max_new_tokens",
    "batch_size",
)
# what means nothing for a model that was edited elsewhere
OF_AN_EDITOR = (
    "editor",
    "sequential",
    "report_at",
    "edit_batch",
    "hparams",
    "set",
    "checkpoint",
    "seed",
)
_OF_RUN = ("hparams", "checkpoint", "limit", "seed", "intervals_by", "ability")


def as_run_file(options: Any) -> dict[str, Any]:
    """Return `EvalOptions` by the names of options on the command line, without those that are empty or off."""
    values: dict[str, Any] = {"editor": options.editor}
    values |= asdict(options.model)
    values["data"] = options.data
    if options.data_options is not None:
        values |= _some(options.data_options, _OF_DATA)
    values |= _some(options.protocol, _OF_PROTOCOL)
    values |= _some(options, _OF_RUN)
    values["set"] = list(options.overrides)
    if not values["report_at"]:
        values["report_at"] = [options.protocol.sequential]
    if options.edited is not None:
        values["edited"] = options.edited
        for name in OF_AN_EDITOR:
            del values[name]
    return _plain(values)


def _some(source: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that YAML can hold, by the names of options; what is empty or off is left out."""
    plain = {}
    for name, value in values.items():
        if value is None or value is False or value in ("", [], ()):
            continue
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        plain[name.replace("_", "-")] = value
    return plain


# what `from_run_file` reads, but for the hyper-parameters a list or a text
KNOWN = (
    "editor",
    "model",
    "device",
    "dtype",
    "device-map",
    "revision",
    "data",
    *(name.replace("_", "-") for name in (*_OF_DATA, *_OF_PROTOCOL, *_OF_RUN)),
    "set",
)


def from_run_file(values: Mapping[str, Any], place: str, records: Path) -> Any:
    """Return the `EvalOptions` of an evaluation by the names of options on the command line, with its defaults.

    `place` names the file in errors. Raises UserError for an option that is unknown or of another type.
    """
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.workflow.evaluation import EvalOptions

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
