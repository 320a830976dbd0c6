"""A folder of learned concepts: they are learned into it, listed, forgotten, and loaded into a model.

A folder holds one safetensors file for each concept, and an `index.json` that names them, the method and the model.
All of its concepts were learned by one method for one model. The index is written last, so a crash loses no concept.
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

from mmedit_cli import registry
from mmedit_cli.errors import StateError, UserError, near_miss
from mmedit_cli.identity import same_model
from mmedit_cli.output import Output
from mmedit_cli.pictures import picture_digest
from mmedit_cli.reading import Record, digest_of, parse_json_object, read_json_object
from mmedit_cli.records import CONCEPT_INDEX
from mmedit_cli.runtime import LoadOptions, resolve_device
from mmedit_cli.storage import (
    is_link,
    read_tensors,
    remove_file,
    sha256_of,
    sole_writer,
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
_FEWEST_PHOTOS = 3  # usual for a concept
_MOST_PHOTOS = 6


@dataclass(frozen=True)
class LearnOptions(LoadOptions):
    """What to learn, how, and into which folder.

    `model` is a name, a folder or a hub id. `covariance` is a file of `mmedit covariance` (None: its usual place).
    `force` replaces a concept of the same token. `low_memory` learns with gradient checkpointing.
    """

    editor: str
    model: str
    concept: Concept
    folder: Path
    hparams: Path | None = None
    overrides: tuple[str, ...] = ()
    covariance: Path | None = None
    seed: int = 0
    force: bool = False
    low_memory: bool = False


class ConceptFolder:
    """The concepts of a folder; `entries` are their descriptions in the index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head: dict[str, Any] = {}
        self.entries: list[dict[str, Any]] = []
        self._leaving: list[str] = []  # files of replaced concepts, to be removed
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
        """Return the entry of a concept; raise StateError if it is not in the folder."""
        for entry in self.entries:
            if entry["token"] == token:
                return entry
        raise StateError(
            f"{self.folder}: no concept {token}{near_miss(token, self.tokens)}",
            f"there are: {', '.join(self.tokens) or 'none'}",
        )

    def select(self, which: str) -> list[str]:
        """Return the tokens that a text names, or the `last`, or `all`; raise StateError for an unknown one."""
        if which == "all":
            return self.tokens
        if which == "last":
            return self.tokens[-1:]
        named = re.findall(r"<[^<>\s]+>", which) or [which]
        tokens = []
        for token in dict.fromkeys(named):
            entry = self.entry(token)
            tokens.append(entry["token"])
        return tokens

    def check_takes(
        self, editor: str, model: ModelRef, token: str, *, force: bool = False
    ) -> None:
        """Raise StateError unless a concept of this method, model and token may be put here."""
        head = self.head
        if head:
            same = same_model(head["fingerprint"], model.fingerprint, model.former)
            if head["editor"] != editor or not same:
                what = f"holds concepts of {head['editor']} for {head['model']}"
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
            other = entry["token"]
            if other != token and entry.get("covariance") != covariance.digest:
                raise StateError(
                    f"{self.folder}: {other} was learned with another covariance",
                    "name that with --covariance, or choose another folder",
                )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the folder inside the block, with the index as it is now."""
        with sole_writer(self.folder, CONCEPT_INDEX):
            if (self.folder / CONCEPT_INDEX).exists():
                self._read()
            self._finish()
            yield

    def put(
        self,
        personalizer: Personalizer,
        concept: Concept,
        model: str,
        info: dict[str, Any],
    ) -> dict[str, Any]:
        """Save a concept that is in a personalizer, with the name its model is found by; return its entry."""
        token = concept.token
        name, saved = self._save(personalizer, token)
        replaced = [e for e in self.entries if e["token"] == token]
        others = [e for e in self.entries if e["token"] != token]
        facts = personalizer.concepts[token].facts
        images = []
        for path in concept.images:
            images.append({"name": path.name, "sha256": picture_digest(path)})
        entry = {
            "token": token,
            "superclass": concept.superclass,
            "file": name,
            **saved,
            "seed": personalizer.seed,
            "identifier": facts.get("identifier", token),
            "images": images,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **info,
        }
        self.head = {
            "format": FORMAT,
            "editor": personalizer.name,
            "model": model,
            "fingerprint": personalizer.model.fingerprint,
        }
        self.entries = [*others, entry]
        self._write(leaving=[old["file"] for old in replaced])
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
            digest = sha256_of(temporary)
            size = temporary.stat().st_size
            same = self._files_of(token, digest)
            if same and _CONCEPT_FILE.fullmatch(same[0]):
                name = same[0]  # the concept was learned again, as after a kill
            elif any(entry["file"] == name for entry in self.entries):
                name = f"{Path(name).stem}-{digest[:8]}.safetensors"
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        return name, {"bytes": size, "sha256": digest}

    def _files_of(self, token: str, digest: str) -> list[str]:
        """Return the files that the index names for a concept with this digest."""
        files = []
        for entry in self.entries:
            if entry["token"] == token and entry["sha256"] == digest:
                files.append(entry["file"])
        return files

    def _finish(self) -> None:
        """Remove the files of replaced and forgotten concepts, if this program made their names.

        The index lists them until they are gone, so that the next writer finishes what a kill interrupts.
        """
        if not self._leaving:
            return
        named = {entry["file"] for entry in self.entries}
        for name in self._leaving:
            if name not in named and _CONCEPT_FILE.fullmatch(name):
                remove_file(self.folder / name)
        self._write(leaving=[])

    def forget(self, which: str) -> list[str]:
        """Take concepts out of the folder and return their tokens; raise StateError for an unknown one.

        See `select` for the text. All of them are forgotten, or none.
        """
        with self.writing():
            tokens = self.select(which)
            files = [self.entry(token)["file"] for token in tokens]
            self.entries = [e for e in self.entries if e["token"] not in tokens]
            self._write(leaving=files)
            self._finish()
        return tokens

    def plain(self, prompt: str) -> str:
        """Return a prompt with the plain word for each concept, as the base model is given it."""
        for entry in self.entries:
            prompt = prompt.replace(entry["token"], entry["superclass"])
        return prompt

    def load(
        self,
        model: StableDiffusion,
        *,
        tokens: Sequence[str] | None = None,
        overrides: Sequence[str] = (),
    ) -> Personalizer:
        """Put concepts into a model, all or those of `tokens`; raise StateError if a file was changed or does not fit.

        The hyper-parameters are those that the concepts were learned with; `overrides` are KEY=VALUE texts. If another
        process learns or forgets at the same time, the concepts are those before or after its change.
        """
        while True:
            try:
                return self._load(model, tokens, overrides)
            except StateError:
                before = self.entries
                self._read()
                unchanged = self.entries == before
                if unchanged:  # so the folder is damaged
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
        entries = self.entries
        if tokens is not None:
            entries = [self.entry(token) for token in tokens]
        learned_with: dict[str, Any] = {}
        for entry in entries:
            text = self._metadata(entry).get("hparams", "{}")
            place = f"{self._file(entry)}: hparams"
            learned_with |= parse_json_object(text, place, error=StateError).values
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
        """Return the metadata of a concept's file; raise StateError unless it is the one that was saved."""
        path = self._file(entry)
        hint = f"learn {entry['token']} again, with --force"
        size = path.stat().st_size
        if size != entry.get("bytes", size):
            raise StateError(f"{path}: not the file that was saved", hint)
        digest = digest_of(
            path,
            limit=_LARGEST_CONCEPT,
            error=StateError,
            hint=hint,
        )
        if digest != entry["sha256"]:
            raise StateError(f"{path}: not the file that was saved", hint)
        _, metadata = read_tensors(path)
        return metadata

    def _file(self, entry: dict[str, Any]) -> Path:
        token = entry["token"]
        name: str = entry["file"]
        path = self.folder / name
        if not path.is_file() or is_link(path):
            index = self.folder / CONCEPT_INDEX
            raise StateError(
                f"{index}: {token}: no file {name!r} in the folder",
                f"learn {token} again, with --force",
            )
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
            "editor": content.text("editor"),
            "model": content.text("model"),
            "fingerprint": content.text("fingerprint"),
            "format": content.integer("format"),
        }
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
        self.head = head
        self.entries = entries
        self._leaving = leaving

    def _write(self, *, leaving: Sequence[str]) -> None:
        self._leaving = list(leaving)
        content = {**self.head, "concepts": self.entries}
        if leaving:
            content["leaving"] = self._leaving
        text = json.dumps(
            content,
            indent=2,
            ensure_ascii=False,
        )
        write_atomic(self.folder / CONCEPT_INDEX, text + "\n")


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
    from mmedit_cli.shapes import hparams_for, told

    out = out or Output()
    concept = options.concept
    folder = ConceptFolder(options.folder)
    cls = registry.personalizers.get(options.editor)
    check_concept(concept)
    ref = find_model(options.model, revision=options.revision)
    check_draws(ref)
    folder.check_takes(
        cls.name,
        ref,
        concept.token,
        force=options.force,
    )
    hparams, variant = hparams_for(
        options.editor,
        cls.Hparams,
        ref,
        options.hparams,
        overrides=options.overrides,
    )
    out.note(told(cls.name, variant))
    photos = len(concept.images)
    if not _FEWEST_PHOTOS <= photos <= _MOST_PHOTOS:
        out.note(f"{photos} photos: {_FEWEST_PHOTOS} to {_MOST_PHOTOS} are usual")
    out.note(loading(ref.name))
    model = load_stable_diffusion(
        ref,
        device=options.device,
        dtype=training_dtype(options.device, options.dtype),
        low_memory=options.low_memory,
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
    """Return a personalizer that can learn; Perfusion also gets its covariance."""
    if cls.name != "perfusion":
        return cls(model, hparams, seed=seed)
    needs: dict[str, Any] = {"covariance": covariance_for(model, covariance, out)}
    return cls(model, hparams, seed=seed, **needs)


def learn_into(
    folder: ConceptFolder,
    personalizer: Personalizer,
    concept: Concept,
    model: str,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """Learn a concept, put it into the folder, and return its entry; the caller holds the folder's lock.

    `model` is the name or folder that the model was found by. No two concepts of a folder get the same identifier.
    """
    info: dict[str, Any] = {}
    covariance = getattr(personalizer, "covariance", None)
    if covariance is not None:
        folder.check_covariance(covariance, concept.token)
        info["covariance"] = covariance.digest
    personalizer.identifiers = set()
    for entry in folder.entries:
        if entry["token"] != concept.token:
            identifier = entry.get("identifier", entry["token"])
            personalizer.identifiers.add(identifier)
    started = time.perf_counter()
    learned = personalizer.learn(concept, tick=tick)
    seconds = time.perf_counter() - started
    info = {**learned.info, **info, "seconds": round(seconds, 3)}
    return folder.put(
        personalizer,
        concept,
        found_anywhere(model),
        info,
    )


def export_concepts(
    folder: ConceptFolder, to: Path, model: str | None, device: str, out: Output
) -> dict[str, Any]:
    """Write each concept as a LoRA file that diffusers loads, named by its token, and return what was written.

    Raises StateError for a method whose concepts are no LoRA, UserError for a folder that exists already.
    """
    from mmedit_cli.catalog import loading
    from mmedit_cli.drawing.methods.base import ExportsLora
    from mmedit_cli.drawing.models.loading import load_stable_diffusion

    name = folder.head["editor"]
    if not hasattr(registry.personalizers.get(name), "export"):
        raise StateError(
            f"{folder.folder}: concepts of {name} are no LoRA",
            "draw them with mmedit generate --edits",
        )
    if to.exists():
        raise UserError(f"{to}: there already", "name a new folder")
    found_by = model or folder.head["model"]
    out.note(loading(found_by))
    loaded = load_stable_diffusion(found_by, device=device)
    written = []
    with staged_folder(to) as fresh, folder.load(loaded) as personalizer:
        assert isinstance(personalizer, ExportsLora)
        for entry in folder.entries:
            token = entry["token"]
            file = _file_name(token)
            personalizer.export(token, fresh / file)
            identifier = personalizer.concepts[token].facts["identifier"]
            called = f"{identifier} {entry['superclass']}"
            written.append({"token": token, "file": str(to / file), "called": called})
    return {"editor": name, "model": loaded.name, "written": written}


def covariance_for(
    model: StableDiffusion, path: Path | None, out: Output
) -> Covariance:
    """Return the covariance of a model's text encodings: from a file or its usual place, or computed and put there."""
    from mmedit_cli.drawing import covariance as moments

    file = path or moments.default_path(model)
    if path is not None or file.exists():
        found = moments.Covariance.load(file)
        moments.check(found, model)
        return found
    out.note(
        "no covariance for this text encoder yet: computing it from captions about the things of EmojiKB"
    )
    out.note("with captions of your own: mmedit covariance --captions FILE --force")
    file.parent.mkdir(parents=True, exist_ok=True)
    _, count = moments.survey(None)
    with out.progress({"captions": count}) as tick:
        return moments.estimate(
            model,
            None,
            file,
            tick=lambda n: tick("captions", n),
        )


def training_dtype(device: str, dtype: str) -> str:
    """Return the dtype to learn in; raise UserError for one that loses small gradients."""
    if dtype == "float16":
        raise UserError(
            "--dtype float16: small gradients vanish in it",
            "learn in bfloat16 or float32; draw in any",
        )
    on_cpu = resolve_device(device).type == "cpu"
    return dtype if dtype != "auto" or on_cpu else "bfloat16"


def found_anywhere(model: str) -> str:
    """Return a name by which the model is found from any working directory."""
    from mmedit_cli.catalog import MODELS, bundled

    has_name = model in MODELS or model in bundled()
    if has_name or not Path(model).is_dir():
        return model
    return str(Path(model).resolve())


def _is_name(name: str) -> bool:
    """Tell whether a text names a file of the folder itself, on every system."""
    return name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)


def _file_name(token: str) -> str:
    """Return a file name for a token; if its characters had to be changed, a short hash makes the name unique."""
    inner = token.strip("<>")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", inner).strip("-")
    if name == inner:
        return f"{name}.safetensors"
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f"{name}-{digest[:8]}.safetensors".lstrip("-")
