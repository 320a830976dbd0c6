"""A folder of concept edits: they are made into it, listed, undone, redone, drawn with and exported.

A folder holds one safetensors file for each edit, and a `concept-edits.json` that names them, the method, its
hyper-parameters and the model. The index is written last, so a crash loses no edit. Undo and redo change the index
alone: the weights are always computed from those of the base model and from all edits that are active.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import registry
from mmedit_cli.drawing.models.foreign_lora import ldm_key
from mmedit_cli.drawing.workflow.concepts import found_anywhere
from mmedit_cli.errors import StateError, UserError
from mmedit_cli.identity import same_model
from mmedit_cli.output import Output
from mmedit_cli.reading import Record, read_json_object
from mmedit_cli.records import CONCEPT_EDITS
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.storage import (
    is_link,
    refuse_link,
    sha256_of,
    sole_writer,
    staged_folder,
    write_json,
    write_tensors,
)
from mmedit_cli.types import ConceptChange

if TYPE_CHECKING:
    from mmedit_cli.catalog import ModelRef
    from mmedit_cli.drawing.methods.shared.concept_editor import ConceptEditor
    from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion

FORMAT = 1
CHANGED = (
    "changed.safetensors"  # in an export: the changed weights, as diffusers names them
)
CHANGED_LDM = (
    "changed.ldm.safetensors"  # and as programs do that read checkpoints of one file
)
_SETTINGS = "settings.json"  # of a model that comes along
_EDIT_FILE = re.compile(r"edit-\d{6}\.safetensors")


@dataclass(frozen=True)
class ConceptEditOptions(LoadOptions):
    """What to change, how, and into which folder; `model` is a name, a folder or a hub id, empty for the folder's."""

    editor: str
    model: str
    changes: tuple[ConceptChange, ...]
    folder: Path
    hparams: Path | None = None
    overrides: tuple[str, ...] = ()


class ConceptEdits:
    """The edits of a folder; `entries` are their descriptions in the index, `tokens` is empty: no prompt needs one."""

    tokens: Sequence[str] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head: dict[str, Any] = {}
        self.entries: list[dict[str, Any]] = []
        if (folder / CONCEPT_EDITS).exists():
            self._read()

    @classmethod
    def existing(cls, folder: Path) -> ConceptEdits:
        """Return the edits of a folder; raise StateError if there are none."""
        found = cls(folder)
        if not found.head:
            raise StateError(
                f"{folder}: no concept edits here (no {CONCEPT_EDITS})",
                "make one into it first",
            )
        return found

    @property
    def active(self) -> list[dict[str, Any]]:
        """The entries of the edits that are not undone."""
        return [entry for entry in self.entries if entry["active"]]

    def plain(self, prompt: str) -> str:
        """Return a prompt as the base model is given it: as it is."""
        return prompt

    def check_takes(
        self, editor: str, ref: ModelRef, hparams: Mapping[str, Any] | None
    ) -> None:
        """Raise StateError unless edits of this method, model and hyper-parameters may be put here."""
        if not self.head:
            return
        same = same_model(self.head["fingerprint"], ref.fingerprint, ref.former)
        if self.head["editor"] != editor or not same:
            what = f"holds edits of {self.head['editor']} for {self.head['model']}"
            raise StateError(
                f"{self.folder}: {what}",
                "choose another folder for another method or model",
            )
        if hparams is not None and hparams != self.head["hparams"]:
            ours = self.head["hparams"]
            other = [key for key in hparams if hparams[key] != ours.get(key)]
            raise StateError(
                f"{self.folder}: its edits were made with other values of {', '.join(other)}",
                "all edits of a folder are solved together; choose another folder",
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the folder inside the block, with the index as it is now."""
        with sole_writer(self.folder, CONCEPT_EDITS):
            if (self.folder / CONCEPT_EDITS).exists():
                self._read()
            yield

    def put(
        self, editor: ConceptEditor, ids: Sequence[int], head: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Save new edits of an editor and return their entries; the caller holds the lock."""
        first = max((entry["id"] for entry in self.entries), default=0) + 1
        added = []
        for number, i in enumerate(ids, first):
            file = self.folder / f"edit-{number:06d}.safetensors"
            refuse_link(file)
            edit = editor.edits[i]
            editor.save(edit, file)
            added.append(
                {
                    "id": number,
                    "source": edit.change.source,
                    "targets": list(edit.change.targets),
                    "keep": list(edit.kept),
                    "file": file.name,
                    "bytes": file.stat().st_size,
                    "sha256": sha256_of(file),
                    "active": True,
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            )
        self.head = dict(head)
        self.entries = [*self.entries, *added]
        self._write()
        return added

    def mark(self, which: str, *, active: bool) -> list[int]:
        """Undo edits or bring them back, and return their ids; raise UserError for one that is not there."""
        with self.writing():
            ids = self.select(which, active=not active)
            for entry in self.entries:
                if entry["id"] in ids:
                    entry["active"] = active
            self._write()
        return ids

    def select(self, which: str, *, active: bool) -> list[int]:
        """Return the ids that `3`, `3-7`, `1,4-6`, `last` or `all` stand for, of edits that are (not) active."""
        there = [entry["id"] for entry in self.entries if entry["active"] == active]
        found: list[int] = []
        for part in which.split(","):
            bounds = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            if part.strip() in ("all", "last"):
                found += there if part.strip() == "all" else there[-1:]
            elif bounds is None:
                raise UserError(
                    f"{part.strip()!r}: not edits",
                    "e.g. 3, or 3-7, or 1,4, or last, or all",
                )
            else:
                first = int(bounds[1])
                last = int(bounds[2] or first)
                named = range(first, last + 1)
                found += [i for i in there if i in named]
        if not found:
            state = "active" if active else "undone"
            raise UserError(
                f"{which}: no {state} edits there in {self.folder}",
                f"mmedit edits list {self.folder} --all",
            )
        return sorted(set(found))

    def load(
        self, model: StableDiffusion, *, overrides: Sequence[str] = ()
    ) -> ConceptEditor:
        """Put the active edits into a model; raise StateError if a file was changed or the model is another.

        `overrides` are KEY=VALUE texts that change how the edits are solved together.
        """
        from mmedit_cli.hparams import load_hparams

        name = self.head["editor"]
        if not same_model(self.head["fingerprint"], model.fingerprint, model.former):
            raise StateError(
                f"{self.folder}: made for {self.head['model']}, this is {model.name}"
            )
        cls = registry.concept_editors.get(name)
        hparams = load_hparams(
            registry.hparams_file(name),
            cls.Hparams,
            stored=self.head["hparams"],
            stored_in=f"{self.folder / CONCEPT_EDITS}: hparams",
            overrides=overrides,
        )
        editor: ConceptEditor = cls(model, hparams)
        for entry in self.active:
            editor.edits[entry["id"]] = editor.read(self._file(entry))
        editor.apply()
        return editor

    def _file(self, entry: Mapping[str, Any]) -> Path:
        """Return the file of an edit; raise StateError unless it is the one that was saved."""
        path = self.folder / str(entry["file"])
        hint = f"make edit {entry['id']} again, or put the file back from a copy"
        if not path.is_file() or is_link(path):
            raise StateError(f"{path}: no such file", hint)
        whole = path.stat().st_size == entry["bytes"]
        if not whole or sha256_of(path) != entry["sha256"]:
            raise StateError(f"{path}: not the file that was saved", hint)
        return path

    def _read(self) -> None:
        path = self.folder / CONCEPT_EDITS
        content = read_json_object(
            path,
            halves=True,
            error=StateError,
            hint="choose another folder, or put it back from a copy",
        )
        number = content.integer("format")
        if number != FORMAT:
            raise StateError(
                f"{path}: format {number}, this program reads {FORMAT}",
                "upgrade mmedit",
            )
        self.head = {
            "format": number,
            "editor": content.text("editor"),
            "model": content.text("model"),
            "fingerprint": content.text("fingerprint"),
            "hparams": dict(content.mapping("hparams")),
        }
        self.entries = [_checked(entry) for entry in content.records("edits")]

    def _write(self) -> None:
        content = {**self.head, "edits": self.entries}
        write_json(self.folder / CONCEPT_EDITS, content, indent=2)


def _checked(entry: Record) -> dict[str, Any]:
    """Return an entry of the index; raise StateError unless every field that is used has its type."""
    for key in ("source", "file", "sha256", "time"):
        entry.text(key)
    for key in ("targets", "keep"):
        entry.array(key, str)
    entry.integer("id", low=1)
    entry.integer("bytes", low=0)
    entry.flag("active")
    if not _EDIT_FILE.fullmatch(entry.text("file")):
        entry.fail("file", "not the name of an edit's file")
    return entry.values


def make_edits(
    options: ConceptEditOptions, out: Output | None = None
) -> dict[str, Any]:
    """Make edits, put them into the folder, and return what they are and what they cost.

    Raises DataError for texts that cannot be used, StateError if the folder holds edits of another method or model or
    with other hyper-parameters, HparamsError, or ModelError.
    """
    from mmedit_cli.catalog import find_model, loading
    from mmedit_cli.drawing.models.loading import check_draws, load_stable_diffusion
    from mmedit_cli.hparams import to_dict
    from mmedit_cli.shapes import hparams_for, told

    out = out or Output()
    folder = ConceptEdits(options.folder)
    cls = registry.concept_editors.get(options.editor)
    named = options.model or str(folder.head.get("model", ""))
    ref = find_model(named, revision=options.revision)
    check_draws(ref)
    folder.check_takes(cls.name, ref, None)
    # a folder that has edits says how the next ones are made, unless a file is named
    stored = folder.head.get("hparams") if options.hparams is None else None
    hparams, variant = hparams_for(
        options.editor,
        cls.Hparams,
        ref,
        options.hparams,
        stored=stored,
        stored_in=f"{folder.folder / CONCEPT_EDITS}: hparams",
        overrides=options.overrides,
    )
    out.note(told(cls.name, variant))
    head = {
        "format": FORMAT,
        "editor": cls.name,
        "model": found_anywhere(named),
        "fingerprint": ref.fingerprint,
        "hparams": _plain(to_dict(hparams)),
    }
    folder.check_takes(cls.name, ref, head["hparams"])
    out.note(loading(ref.name))
    model = load_stable_diffusion(ref, device=options.device, dtype=options.dtype)
    with folder.writing():
        folder.check_takes(cls.name, ref, head["hparams"])
        started = time.perf_counter()
        with cls(model, hparams) as editor:
            ids = editor.edit(options.changes)
            seconds = time.perf_counter() - started
            added = folder.put(editor, ids, head)
    report = {**head, "seconds": round(seconds, 3), "active": len(folder.active)}
    return {**report, "edits": added}


def export_edits(
    folder: ConceptEdits, to: Path, model: str | None, device: str, out: Output
) -> dict[str, Any]:
    """Write the edited model as a plain folder of diffusers, and the changed weights alone in two files beside it.

    Raises UserError for a folder that exists already.
    """
    from mmedit_cli.catalog import find_model, loading
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    if to.exists():
        raise UserError(f"{to}: there already", "name a new folder")
    ref = find_model(model or folder.head["model"])
    out.note(loading(ref.name))
    loaded = load_stable_diffusion(ref, device=device)
    with staged_folder(to) as fresh, folder.load(loaded) as editor:
        loaded.pipe.save_pretrained(fresh)
        if ref.folder is not None and (ref.folder / _SETTINGS).is_file():
            shutil.copy(ref.folder / _SETTINGS, fresh / _SETTINGS)
        weights = editor.changed_weights()
        part = f"{loaded.denoiser}."
        own = {path.removeprefix(part): v for path, v in weights.items()}
        about = {"method": folder.head["editor"], "model": loaded.name}
        files = {CHANGED: own}
        if part == "unet.":
            per_block = int(loaded.unet.config.layers_per_block)
            by_ldm = {ldm_key(path, per_block): v for path, v in own.items()}
            files[CHANGED_LDM] = by_ldm
        for name, tensors in files.items():
            write_tensors(fresh / name, tensors, about)
    return {
        "folder": str(to),
        "editor": folder.head["editor"],
        "model": loaded.name,
        "edits": len(folder.active),
        "changed": len(weights),
        "files": [str(to / name) for name in files],
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters as JSON has them."""
    plain = {}
    for key, value in values.items():
        if isinstance(value, tuple):
            value = list(value)
        plain[key] = value
    return plain
