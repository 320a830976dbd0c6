"""An evaluation as a run file: the options of `mmedit eval` that make the same run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

# names of options, by the part of `EvalOptions` that has them
OF_DATA = ("root", "images", "template", "subset", "skip_missing", "skip_long")
OF_PROTOCOL = (
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
OF_RUN = ("hparams", "checkpoint", "limit", "seed", "intervals_by", "ability")


def as_run_file(options: Any) -> dict[str, Any]:
    """Return `EvalOptions` by the names of options on the command line, without those that are empty or off."""
    values: dict[str, Any] = {"editor": options.editor}
    values |= asdict(options.model)
    values["data"] = options.data
    if options.data_options is not None:
        values |= _some(options.data_options, OF_DATA)
    values |= _some(options.protocol, OF_PROTOCOL)
    values |= _some(options, OF_RUN)
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
