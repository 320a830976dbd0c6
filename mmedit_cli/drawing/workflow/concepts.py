"""Concepts of one's own, kept in a folder: learned, listed, forgotten, and put into a model again.

A folder holds one safetensors file a concept and an `index.json` that names them, the method and the model. All of its
concepts were learned by one method for one model. The index is written last, so a crash loses no concept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from mmedit_cli import registry
from mmedit_cli.errors import StateError, UserError, near_miss
from mmedit_cli.identity import same_model
from mmedit_cli.output import Output
from mmedit_cli.pictures import picture_digest
from mmedit_cli.reading import Record, digest_of, parse_json_object, read_json_object
from mmedit_cli.records import CONCEPT_INDEX
from mmedit_cli.runtime import resolve_device
from mmedit_cli.storage import (
    is_link,
    read_tensors,
    refuse_link,
    remove_file,
    remove_temporaries,
    sha256_of,
    staged_folder,
    temporary_beside,
    write_atomic,
)
from mmedit_cli.types import Concept

if TYPE_CHECKING:
    from mmedit_cli.catalog import ModelRef
    from mmedit_cli.drawing.covariance import Covariance
    from mmedit_cli.drawing.methods.base import Personalizer
    from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion

FORMAT = 1
_CONCEPT_FILE = re.compile(r"[A-Za-z0-9_-]+\.safetensors")  # what `_file_name` makes
_LARGEST_CONCEPT = 1 << 34  # bytes: a whole UNet of SDXL in float32
_USUAL = range(3, 7)  # photos a concept


@dataclass(frozen=True)
class LearnOptions:
    """What to learn, how, and where to keep it.

    `model` is a name, a folder or a hub id; `covariance` a file of `mmedit covariance` (None: where that puts it).
    With `force` a concept of the same token is replaced; `low_memory` learns with gradient checkpointing.
    """

    editor: str
    model: str
    concept: Concept
    folder: Path
    hparams: Path | None = None
    overrides: tuple[str, ...] = ()
    covariance: Path | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    force: bool = False
    low_memory: bool = False


class ConceptFolder:
    """The concepts of a folder; `entries` are what the index says of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head: dict[str, Any] = {}
        self.entries: list[dict[str, Any]] = []
        self._leaving: list[
            str
        ] = []  # files that the index has ceased to name and that are to be removed
        if (folder / CONCEPT_INDEX).exists():
            self._read()

    @classmethod
    def existing(cls, folder: Path) -> ConceptFolder:
        """Return the concepts of a folder; raise StateError if there are none."""
        found = cls(folder)
        if not found.head and (folder / "run.yaml").is_file():
            raise StateError(
                f"{folder}: edits of answers, no concepts",
                f"mmedit ask --edits {folder} asks with them",
            )
        if not found.head:
            raise StateError(
                f"{folder}: no concepts here (no {CONCEPT_INDEX})",
                "learn one into it first",
            )
        return found

    @property
    def tokens(self) -> list[str]:
        """The tokens of the concepts, in the order they were learned."""
        return [entry["token"] for entry in self.entries]

    def entry(self, token: str) -> dict[str, Any]:
        """Return what is known of a concept; raise StateError if it is not there."""
        for entry in self.entries:
            if entry["token"] == token:
                return entry
        raise StateError(f"{self.folder}: no concept {token}{near_miss(token, self.tokens)}",
                         f"there are: {', '.join(self.tokens) or 'none'}")  # fmt: skip

    def select(self, which: str) -> list[str]:
        """Return the tokens that a text names, or the `last`, or `all`; raise StateError for one that is not there."""
        if which in ("last", "all"):
            return self.tokens[-1:] if which == "last" else self.tokens
        named = dict.fromkeys(re.findall(r"<[^<>\s]+>", which) or [which])
        return [self.entry(token)["token"] for token in named]

    def check_takes(
        self, editor: str, model: ModelRef, token: str, *, force: bool = False
    ) -> None:
        """Raise StateError unless a concept of this method, model and token may be put here."""
        if self.head:
            same = same_model(self.head["fingerprint"], model.fingerprint, model.former)
            if self.head["editor"] != editor or not same:
                what = (
                    f"holds concepts of {self.head['editor']} for {self.head['model']}"
                )
                raise StateError(
                    f"{self.folder}: {what}",
                    "choose another folder for another method or model",
                )
        if token in self.tokens and not force:
            raise StateError(
                f"{self.folder}: {token} is there already",
                "another token, or --force to replace it",
            )
        others = [other for other in self.tokens if other != token]
        if others and not registry.personalizers.get(editor).several:
            raise StateError(
                f"{self.folder}: holds {others[0]}, and {editor} one concept",
                "choose another folder",
            )

    def check_covariance(self, covariance: Covariance, token: str) -> None:
        """Raise StateError if a concept beside `token` was learned with another covariance: they could not mix."""
        for entry in self.entries:
            if entry["token"] != token and entry.get("covariance") != covariance.digest:
                raise StateError(f"{self.folder}: {entry['token']} was learned with another covariance",
                                 "name that with --covariance, or choose another folder")  # fmt: skip

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the folder inside the block, with the index as it is now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (".lock", CONCEPT_INDEX):
            refuse_link(self.folder / name)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                remove_temporaries(self.folder)
                if (self.folder / CONCEPT_INDEX).exists():
                    self._read()
                self._finish()
                yield
        except Timeout as error:
            raise StateError(
                f"another process is writing {self.folder}", "wait for it to end"
            ) from error

    def put(
        self,
        personalizer: Personalizer,
        concept: Concept,
        model: str,
        info: dict[str, Any],
    ) -> dict[str, Any]:
        """Save a concept that is in a personalizer, with the name its model is found by; return its entry."""
        name, saved = self._save(personalizer, concept.token)
        before = [
            entry["file"] for entry in self.entries if entry["token"] == concept.token
        ]
        entry = {
            "token": concept.token,
            "superclass": concept.superclass,
            "file": name,
            **saved,
            "seed": personalizer.seed,
            "identifier": personalizer.concepts[concept.token].facts.get(
                "identifier", concept.token
            ),
            "images": [
                {"name": path.name, "sha256": picture_digest(path)}
                for path in concept.images
            ],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **info,
        }
        self.head = {
            "format": FORMAT,
            "editor": personalizer.name,
            "model": model,
            "fingerprint": personalizer.model.fingerprint,
        }
        self.entries = [
            *(other for other in self.entries if other["token"] != concept.token),
            entry,
        ]
        self._write(leaving=before)
        self._finish()
        return entry

    def _save(
        self, personalizer: Personalizer, token: str
    ) -> tuple[str, dict[str, Any]]:
        """Save a concept and return the name of its file, and its size and digest.

        A file that the index names is never written over: somebody may be reading it, and a kill must lose nothing.
        """
        name = _file_name(token)
        temporary = temporary_beside(self.folder / name)
        try:
            personalizer.save(token, temporary)
            digest, size = sha256_of(temporary), temporary.stat().st_size
            same = [
                entry["file"]
                for entry in self.entries
                if (entry["token"], entry["sha256"]) == (token, digest)
            ]
            if same and _CONCEPT_FILE.fullmatch(
                same[0]
            ):  # learned again, as after a kill
                name = same[0]
            elif any(entry["file"] == name for entry in self.entries):
                name = f"{Path(name).stem}-{digest[:8]}.safetensors"
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        return name, {"bytes": size, "sha256": digest}

    def _finish(self) -> None:
        """Remove the files that the index has ceased to name, if their names are of this program.

        The index says which they are until they are gone, so that the next writer does what a kill prevents.
        """
        if not self._leaving:
            return
        named = {entry["file"] for entry in self.entries}
        for name in self._leaving:
            if name not in named and _CONCEPT_FILE.fullmatch(name):
                remove_file(self.folder / name)
        self._write(leaving=[])

    def forget(self, which: str) -> list[str]:
        """Take what a text names out of the folder and return the tokens; raise StateError for one that is not there.

        See `select` for the text. All of them go, or none.
        """
        with self.writing():
            gone = self.select(which)
            files = [self.entry(token)["file"] for token in gone]
            self.entries = [
                entry for entry in self.entries if entry["token"] not in gone
            ]
            self._write(leaving=files)
            self._finish()
        return gone

    def load(
        self,
        model: StableDiffusion,
        *,
        tokens: Sequence[str] | None = None,
        overrides: Sequence[str] = (),
    ) -> Personalizer:
        """Put concepts into a model, all or those of `tokens`; raise StateError if a file was changed or does not fit.

        The hyper-parameters are those the concepts were learned with; `overrides` are KEY=VALUE texts. Where another
        process learns or forgets at the same time, they are the concepts as they were before or as they are then.
        """
        while True:
            try:
                return self._load(model, tokens, overrides)
            except StateError:
                before = self.entries
                self._read()
                if (
                    self.entries == before
                ):  # nobody has changed anything meanwhile: it is damaged
                    raise

    def _load(
        self,
        model: StableDiffusion,
        tokens: Sequence[str] | None,
        overrides: Sequence[str],
    ) -> Personalizer:
        from mmedit_cli.hparams import load_hparams

        name = self.head["editor"]
        cls = registry.personalizers.get(name)
        learned_with: dict[str, Any] = {}
        entries = (
            self.entries if tokens is None else [self.entry(token) for token in tokens]
        )
        for entry in entries:
            text = self._metadata(entry).get("hparams", "{}")
            learned_with |= parse_json_object(
                text, f"{self._file(entry)}: hparams", error=StateError
            ).values
        hparams = load_hparams(
            registry.hparams_file(name),
            cls.Hparams,
            stored=learned_with,
            stored_in=f"{self.folder}: hparams",
            overrides=overrides,
        )
        personalizer: Personalizer = cls(model, hparams)
        try:
            for entry in entries:
                personalizer.load(self._file(entry))
        except BaseException:
            personalizer.close()
            raise
        return personalizer

    def _metadata(self, entry: dict[str, Any]) -> dict[str, str]:
        """Return what the file of a concept says of itself; raise StateError unless it is the one that was saved."""
        path = self._file(entry)
        way_out = f"learn {entry['token']} again, with --force"
        size = path.stat().st_size
        same = size == entry.get("bytes", size)
        if (
            not same
            or digest_of(path, limit=_LARGEST_CONCEPT, error=StateError, hint=way_out)
            != entry["sha256"]
        ):
            raise StateError(f"{path}: not the file that was saved", way_out)
        return read_tensors(path)[1]

    def _file(self, entry: dict[str, Any]) -> Path:
        path = self.folder / entry["file"]
        if not path.is_file() or is_link(path):
            problem = f"{self.folder / CONCEPT_INDEX}: {entry['token']}: no file {entry['file']!r} in the folder"
            raise StateError(problem, f"learn {entry['token']} again, with --force")
        return path

    def _read(self) -> None:
        path = self.folder / CONCEPT_INDEX
        content = read_json_object(
            path,
            halves=True,
            error=StateError,
            hint="choose another folder, or put it back from a copy",
        )
        head: dict[str, Any] = {
            key: content.text(key) for key in ("editor", "model", "fingerprint")
        }
        head["format"] = content.integer("format")
        entries = [_checked_entry(entry) for entry in content.records("concepts")]
        leaving = content.array("leaving", str, [])
        if head["format"] != FORMAT:
            raise StateError(
                f"{path}: format {head['format']}, this program reads {FORMAT}",
                "upgrade mmedit",
            )
        for entry in entries:
            if not _is_name(entry["file"]):
                problem = f"{path}: {entry['token']}: no file {entry['file']!r} in the folder can be meant"
                raise StateError(
                    problem, "concepts lie beside their index; put it back from a copy"
                )
        self.head, self.entries, self._leaving = head, entries, leaving

    def _write(self, *, leaving: Sequence[str]) -> None:
        self._leaving = list(leaving)
        content = {
            **self.head,
            "concepts": self.entries,
            **({"leaving": self._leaving} if leaving else {}),
        }
        write_atomic(
            self.folder / CONCEPT_INDEX,
            json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        )


def _checked_entry(entry: Record) -> dict[str, Any]:
    """Return an entry of the index; raise StateError unless every field that is used has its type."""
    for key in ("token", "superclass", "file", "sha256", "time"):
        entry.text(key)
    entry.integer("bytes", low=0)
    entry.array("images", dict)
    entry.number("seconds", 0.0)
    return entry.values


def learn_concept(options: LearnOptions, out: Output | None = None) -> dict[str, Any]:
    """Learn a concept from its photos, put it into the folder, and return its entry.

    Raises DataError for photos, a token or a superclass that cannot be used, StateError if the folder holds concepts
    of another method or model, HparamsError, or ModelError.
    """
    from mmedit_cli.catalog import find_model, loading
    from mmedit_cli.drawing.methods.base import check_concept
    from mmedit_cli.drawing.models.loading import check_draws, load_stable_diffusion
    from mmedit_cli.hparams import load_hparams
    from mmedit_cli.shapes import pick_variant, shape_of, told

    out = out or Output()
    concept, folder = options.concept, ConceptFolder(options.folder)
    cls = registry.personalizers.get(options.editor)
    check_concept(concept)
    ref = find_model(options.model, revision=options.revision)
    check_draws(ref)
    folder.check_takes(cls.name, ref, concept.token, force=options.force)
    file = options.hparams or registry.hparams_file(options.editor)
    variant = pick_variant(file, shape_of(ref), ref.name)
    hparams = load_hparams(
        file, cls.Hparams, variant=variant, overrides=options.overrides
    )
    out.note(told(cls.name, variant))
    if len(concept.images) not in _USUAL:
        out.note(
            f"{len(concept.images)} photos: {_USUAL.start} to {_USUAL.stop - 1} are usual"
        )
    out.note(loading(ref.name))
    dtype = training_dtype(options.device, options.dtype)
    model = load_stable_diffusion(
        ref, device=options.device, dtype=dtype, low_memory=options.low_memory
    )
    personalizer = personalizer_for(
        model, cls, hparams, options.seed, options.covariance, out
    )
    with folder.writing():
        folder.check_takes(cls.name, ref, concept.token, force=options.force)
        with out.progress({"steps": personalizer.steps}) as tick:
            return learn_into(
                folder, personalizer, concept, options.model, lambda n: tick("steps", n)
            )


def personalizer_for(
    model: StableDiffusion,
    cls: type[Personalizer],
    hparams: Any,
    seed: int,
    covariance: Path | None,
    out: Output,
) -> Personalizer:
    """Return a personalizer that can learn, with what its method needs beside the model."""
    needs = (
        {"covariance": covariance_for(model, covariance, out)}
        if cls.name == "perfusion"
        else {}
    )
    return cls(model, hparams, seed=seed, **needs)


def learn_into(
    folder: ConceptFolder,
    personalizer: Personalizer,
    concept: Concept,
    model: str,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """Learn a concept, put it into the folder, which is being written, and return its entry.

    `model` is what the model was found by. No two concepts of a folder get one identifier.
    """
    more = {}
    if (covariance := getattr(personalizer, "covariance", None)) is not None:
        folder.check_covariance(covariance, concept.token)
        more["covariance"] = covariance.digest
    others = (entry for entry in folder.entries if entry["token"] != concept.token)
    personalizer.identifiers = {
        entry.get("identifier", entry["token"]) for entry in others
    }
    started = time.perf_counter()
    learned = personalizer.learn(concept, tick=tick)
    info = {**learned.info, **more, "seconds": round(time.perf_counter() - started, 3)}
    return folder.put(personalizer, concept, _findable(model), info)


def export_concepts(
    folder: ConceptFolder, to: Path, model: str | None, device: str, out: Output
) -> dict[str, Any]:
    """Write each concept as a LoRA file that diffusers loads, named by its token, and return what was written.

    Raises StateError for a method whose concepts are no LoRA, UserError for a folder that is there already.
    """
    from mmedit_cli.catalog import loading
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    name = folder.head["editor"]
    if not hasattr(registry.personalizers.get(name), "export"):
        raise StateError(
            f"{folder.folder}: concepts of {name} are no LoRA",
            "draw them with mmedit generate --edits",
        )
    if to.exists():
        raise UserError(f"{to}: there already", "name a new folder")
    out.note(loading(model or folder.head["model"]))
    loaded = load_stable_diffusion(model or folder.head["model"], device=device)
    written = []
    with staged_folder(to) as fresh, folder.load(loaded) as personalizer:
        for entry in folder.entries:
            file = _file_name(entry["token"])
            personalizer.export(entry["token"], fresh / file)  # type: ignore[attr-defined]
            called = f"{personalizer.concepts[entry['token']].facts['identifier']} {entry['superclass']}"
            written.append(
                {"token": entry["token"], "file": str(to / file), "called": called}
            )
    return {"editor": name, "model": loaded.name, "written": written}


def covariance_for(
    model: StableDiffusion, path: Path | None, out: Output
) -> Covariance:
    """Return the covariance of a model's text encodings: of a file, of the usual place, or computed and put there."""
    from mmedit_cli.drawing import covariance as moments

    usual = moments.default_path(model)
    if path is None and not usual.exists():
        out.note(
            "no covariance for this text encoder yet: computing it from captions about the things of EmojiKB"
        )
        out.note("with captions of your own: mmedit covariance --captions FILE --force")
        usual.parent.mkdir(parents=True, exist_ok=True)
        with out.progress({"captions": moments.survey(None)[1]}) as tick:
            return moments.estimate(
                model, None, usual, tick=lambda n: tick("captions", n)
            )
    found = moments.Covariance.load(path or usual)
    moments.check(found, model)
    return found


def training_dtype(device: str, dtype: str) -> str:
    """Return the number format to learn in; raise UserError for one that loses small gradients."""
    if dtype == "float16":
        raise UserError(
            "--dtype float16: small gradients vanish in it",
            "learn in bfloat16 or float32; draw in any",
        )
    on_cpu = resolve_device(device).type == "cpu"
    return dtype if dtype != "auto" or on_cpu else "bfloat16"


def _findable(model: str) -> str:
    """Return a name by which the model is found from any folder."""
    from mmedit_cli.catalog import MODELS, bundled

    own = model not in MODELS and model not in bundled() and Path(model).is_dir()
    return str(Path(model).resolve()) if own else model


def _is_name(name: str) -> bool:
    """Tell whether a text names a file of the folder itself, on every system."""
    return name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)


def _file_name(token: str) -> str:
    """Return a file name for a token; where the token had to be changed a short hash keeps it distinct."""
    inner = token.strip("<>")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", inner).strip("-")
    if name == inner:
        return f"{name}.safetensors"
    return (
        f"{name}-{hashlib.sha256(token.encode()).hexdigest()[:8]}.safetensors".lstrip(
            "-"
        )
    )
