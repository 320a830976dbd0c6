"""Trained networks of an editor: those that come along with mmedit, or of a training of the user's own."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli import registry
from mmedit_cli.catalog import DEFAULTS, find_model
from mmedit_cli.errors import RunError, UserError
from mmedit_cli.model_folder import CHECKPOINT
from mmedit_cli.reading import Record, whole_number
from mmedit_cli.records import Run
from mmedit_cli.storage import read_tensors

LATEST = "latest"  # the newest finished training
# the folders of trainings below the records
TRAININGS = {"editors": "train-editor", "image_editors": "train-image-editor"}
_ID = re.compile(r"[0-9a-f]{4,12}")  # of a run, or its beginning
_SHIPPED = "comes along"
_RUN = "run"
_FILE = "file"


@dataclass(frozen=True)
class TrainedNetworks:
    """A file of trained networks, and what is known about it.

    `source` is "comes along", "run" or "file"; `run` is the id of a training that was recorded; `steps` is how long it
    trained and `step` where these networks were kept; `trained_on` names its data. None: unknown.
    """

    path: Path
    source: str
    run: str | None = None
    steps: int | None = None
    step: int | None = None
    trained_on: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return what a report says about them."""
        known = ("source", "run", "steps", "step", "trained_on")
        return {"file": self.path.name, **{key: getattr(self, key) for key in known}}


def find_networks(
    editor: str, model: str, records: Path, checkpoint: Path | str | None = None
) -> TrainedNetworks:
    """Return the networks of an editor for a model: those that come along, or the ones that `checkpoint` names.

    `checkpoint` is "latest" (the newest training in `records`), a file, the folder of a run, or the id of a run.
    Raises UserError if there are none.
    """
    if checkpoint is not None:
        return described(chosen_networks(checkpoint, records, editor, model))
    path = registry.share_dir("data") / "editors" / editor / f"{model}.safetensors"
    if path.is_file():
        return described(path, source=_SHIPPED)
    own = trained_networks(records, editor, model)
    if own:
        hint = f"--checkpoint {LATEST} takes the newest of your own trainings ({own[0].parent.name})"
    else:
        hint = f"mmedit train-editor {editor} --model {model} --data ..., or --checkpoint FILE"
    raise UserError(
        f"{editor} has not been trained for {model}: no networks come along", hint
    )


def chosen_networks(
    checkpoint: Path | str,
    records: Path,
    editor: str = "*",
    model: str = "*",
    kind: str = "editors",
) -> Path:
    """Return the file that `--checkpoint` names; raise UserError if there is none."""
    text = str(checkpoint)
    path = Path(text)
    if path.is_dir():
        path = path / CHECKPOINT
    if text != LATEST and path.is_file():
        return path
    trained = trained_networks(records, editor, model, kind)
    if text == LATEST and trained:
        return trained[0]
    if _ID.fullmatch(text):
        found = [own for own in trained if own.parent.name.startswith(text)]
        if len(found) == 1:
            return found[0]
    runs = ", ".join(own.parent.name for own in trained[:5]) or "none"
    problem = "neither a file, nor the folder or the id of a finished training"
    if text == LATEST:
        problem = "no finished training"
    raise UserError(
        f"--checkpoint {text}: {problem}",
        f"finished trainings in {records} that fit: {runs}",
    )


def described(path: Path, source: str | None = None) -> TrainedNetworks:
    """Return what the file itself and the report of its training say about networks."""
    _, metadata = read_tensors(path)
    step = whole_number(metadata.get("step", ""))
    report = Run.finished(path.parent) if path.name == CHECKPOINT else None
    if report is None or "steps" not in report:
        return TrainedNetworks(
            path,
            source or _FILE,
            run=metadata.get("run"),
            steps=whole_number(metadata.get("steps", "")),
            step=step,
        )
    record = Record(
        report,
        str(path.with_name("report.json")),
        error=RunError,
    )
    return TrainedNetworks(
        path,
        source or _RUN,
        run=path.parent.name,
        steps=record.integer("steps"),
        step=step,
        trained_on=record.record("data", {}).text("name", None),
    )


def networks_line(facts: Mapping[str, Any]) -> str:
    """Say in one line which networks answered."""
    if facts["source"] == _SHIPPED:
        said = "come along with mmedit"
    else:
        said = f"run {facts['run']}" if facts["run"] else f"file {facts['file']}"
    if facts["steps"] is not None:
        said += f", trained {facts['steps']:,} steps"
    if facts["trained_on"]:
        said += f" on {facts['trained_on']}"
    if facts["step"] is not None and facts["step"] != facts["steps"]:
        said += f", kept at step {facts['step']:,}"
    return f"networks: {said}"


def default_editor(
    records: Path, model: str | None = None, checkpoint: Path | str | None = None
) -> tuple[str, str]:
    """Return (editor, model) to use where no editor is named: one with networks that come along.

    With `checkpoint` it is the editor that they belong to. Raises UserError if no networks come along for a model that
    is named.
    """
    if checkpoint is not None:
        return _editor_of(checkpoint, records, model)
    share = registry.share_dir("data") / "editors"
    for name in DEFAULTS if model is None else (model,):
        if (share / "liveedit" / f"{name}.safetensors").is_file():
            return "liveedit", name
    wanted = "*" if model is None else find_model(model).name
    own = trained_networks(records, model=wanted)
    problem = "no EDITOR named, and none comes trained"
    hint = "e.g. mmedit eval ft"
    if model:
        problem += f" for {model}"
    if own:
        newest = own[0].parent.name
        hint = f"--checkpoint {LATEST} takes your newest training, {newest}"
    raise UserError(problem, hint)


def _editor_of(
    checkpoint: Path | str, records: Path, model: str | None
) -> tuple[str, str]:
    wanted = "*" if model is None else find_model(model).name
    path = chosen_networks(checkpoint, records, model=wanted)
    report = Record(
        Run.finished(path.parent) or {},
        str(path.with_name("report.json")),
        error=RunError,
    )
    editor = report.text("editor", "")
    if not editor:
        _, metadata = read_tensors(path)
        editor = metadata.get("editor", "")
    if editor not in registry.editors.names():
        raise UserError(
            f"--checkpoint {checkpoint}: does not say which editor it belongs to",
            "name the EDITOR",
        )
    trained_for = report.record("model", {}).text("name", None)
    if model is None and trained_for is None:
        raise UserError(
            f"--checkpoint {checkpoint}: does not say which model it belongs to",
            "name it with --model",
        )
    return editor, model or trained_for


def trained_networks(
    records: Path, editor: str = "*", model: str = "*", kind: str = "editors"
) -> Sequence[Path]:
    """Return the networks of all finished trainings in a records folder that fit, the newest first.

    `kind` is "editors" or "image_editors".
    """
    wanted = model
    if model != "*":
        # a hub id stands there with a hyphen for its slash, and a digest behind it
        wanted = glob.escape(model.replace("/", "-"))
        if "/" in model:
            wanted += "*"
    reports = records.glob(f"{TRAININGS[kind]}/{editor}/{wanted}/*/*/report.json")
    found = sorted(
        reports,
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    networks = [path.with_name(CHECKPOINT) for path in found]
    return [path for path in networks if path.is_file()]
