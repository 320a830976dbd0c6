"""Ledger: a folder that keeps edits. What was taught, with what, and the tensors that came of it.

    run.yaml              the editor, its hyper-parameters, and the fingerprint of the model it edits
    edits.jsonl           one line an operation, only ever appended to: add, undo, redo, pack
    shards/<sha256>.safetensors    tensors of edits; a line names the shard that it needs, and so its digest
    pictures/<sha256>.png          the pictures of the requests, so that an edit can be made again anywhere
    networks.safetensors  the trained networks of the editor, if it has any

A shard is on disk before the line that names it, and a line is whole or cut off: an edit is in, or it is not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from mmedit_cli.edits.shards import Shards, grouped, sweep
from mmedit_cli.errors import RunError, StateError, UserError
from mmedit_cli.records import Run
from mmedit_cli.storage import sha256_json, write_atomic
from mmedit_cli.types import Query
from mmedit_cli.workflows.concepts import INDEX

FORMAT = 1  # of the folder; a newer one is refused
NETWORKS = "networks.safetensors"
_SHARD, _PICTURE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{64}(\.[a-z0-9]{1,5})?")
_SHARD_ROWS = 4096  # of a shard that compacting writes
_PACKED = (32, 1024)  # edits: the newest shards below such a size are packed into one as soon as they hold as many


@dataclass(frozen=True)
class Kept:
    """One edit of a ledger. `row` is its place in the shard; `before` is what the model answered when it was made."""

    id: int
    request: Query
    time: str
    before: str
    picture: str
    active: bool
    first: int  # the first id of the operation it was made in
    shard: str | None
    row: int


class Ledger(AbstractContextManager["Ledger"]):
    """The edits of one editor on one model, with one writer and any number of readers.

    Made by `create` or `open`. `rows` says whether every edit has tensors of its own (a row of each tensor), or
    whether the tensors stand for all active edits together.
    """

    def __init__(self, folder: Path, run: Run, config: dict[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        self.folder, self.config = folder, config
        self.edits: dict[int, Kept] = {}
        self._run, self._writing = run, False
        self._files = Shards(folder)
        self._state: str | None = None  # the shard that stands for all active edits
        self._shards: dict[str, list[int]] = {}  # the edits whose rows are in a shard, the newest shard last
        for number, record in enumerate(records, 1):
            try:
                self._take(record)
            except (KeyError, TypeError, ValueError) as error:
                raise RunError(
                    f"{folder / 'edits.jsonl'}:{number}: not a record of an edit ({type(error).__name__}: {error})",
                    "put the line back from a copy; tensors and pictures are as they were",
                ) from error

    # -- opening ------------------------------------------------------------------------------------------------

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether there is a ledger in a folder; raise UserError if there is something else."""
        if (folder / "run.yaml").exists():
            return True
        ours = {".lock", NETWORKS, "shards", "pictures"}
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: not a folder", "name a new folder for the edits")
        if folder.exists() and any(p.name not in ours and p.suffix != ".tmp" for p in folder.iterdir()):
            raise UserError(f"{folder}: neither empty nor a ledger of edits", "name a new folder for the edits")
        return False

    @classmethod
    def create(
        cls, folder: Path, config: Mapping[str, Any], environment: Mapping[str, Any], networks: Path | None = None
    ) -> Ledger:
        """Begin a ledger and return it, open for writing; `networks` are copied. `run.yaml` is written last."""
        if networks is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / NETWORKS, networks.read_bytes())
        return cls._locked(folder, {"kind": "edits", "ledger": FORMAT, **config}, environment)

    @classmethod
    def open(cls, folder: Path, *, writing: bool = False) -> Ledger:
        """Open a ledger; writing takes the lock, removes what a killed writer left, and mends a torn last line.

        Raises UserError if there is none, StateError for a newer format, RunError if it is damaged or being written.
        """
        config = _read_config(folder)
        if writing:
            return cls._locked(folder, config, {})
        run = Run.view(folder)
        return cls(folder, run, config, _hinted(lambda: run.read("edits")))

    @classmethod
    def _locked(cls, folder: Path, config: dict[str, Any], environment: Mapping[str, Any]) -> Ledger:
        run = _hinted(lambda: Run.open(folder, config, environment))
        try:
            ledger = cls(folder, run, config, _hinted(lambda: run.read("edits")))
            for part in ("shards", "pictures"):
                (folder / part).mkdir(exist_ok=True)
            ledger._sweep()
            ledger._writing = True
        except BaseException:
            run.close()
            raise
        return ledger

    def close(self) -> None:
        """Let go of the folder; closing twice is fine."""
        self._writing = False
        self._run.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> bool:
        """Whether every edit has tensors of its own."""
        return bool(self.config["rows"])

    @property
    def networks(self) -> Path | None:
        """The trained networks of the editor, if it has any."""
        return self.folder / NETWORKS if self.config.get("checkpoint") else None

    @property
    def active(self) -> list[Kept]:
        """The edits that are not undone, the oldest first."""
        return [edit for edit in self.edits.values() if edit.active]

    @property
    def next_id(self) -> int:
        """The id of the edit that is made next; ids are never used again."""
        return next(reversed(self.edits), 0) + 1

    def select(self, text: str, *, active: bool | None = None) -> list[int]:
        """Return the ids that `3`, `3-7`, `1,4-6`, `last` or `all` stand for, of edits that are (not) active.

        A single edit that is not there or already (un)done is a UserError; a range takes what is in it.
        """
        found: list[int] = []
        wanted = [i for i, edit in self.edits.items() if active is None or edit.active == active]
        for part in text.split(","):
            bounds = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            if part.strip() in ("all", "last"):
                found += wanted if part.strip() == "all" else wanted[-1:]
            elif bounds is None:
                raise UserError(f"{part.strip()!r}: not edits", "e.g. 3, or 3-7, or 1,4, or last, or all")
            elif bounds[2]:
                found += [i for i in wanted if int(bounds[1]) <= i <= int(bounds[2])]
            else:
                found.append(self._one(int(bounds[1]), active))
        if not found:
            state = {True: "active ", False: "undone ", None: ""}[active]
            raise UserError(f"{text}: no {state}edits there in {self.folder}", f"mmedit edits list {self.folder}")
        return sorted(set(found))

    def operations(
        self, *, undone: bool = False, also: Sequence[int] = ()
    ) -> list[tuple[tuple[int, ...], tuple[Query, ...]]]:
        """Return (ids, requests) of each operation: of the active edits, of those in `also`, or of all edits."""
        groups: dict[int, list[Kept]] = {}
        more = set(also)
        for edit in self.edits.values():
            if edit.active or undone or edit.id in more:
                groups.setdefault(edit.first, []).append(edit)
        return [(tuple(e.id for e in group), tuple(e.request for e in group)) for group in groups.values()]

    def tensors(self, *, undone: bool = False) -> dict[str, Any]:
        """Return the tensors of the active edits (or of all), on the CPU; raise StateError if a shard is damaged."""
        if not self.rows:
            return {} if self._state is None else self._files.read(self._state)
        return self._rows(edit for edit in self.edits.values() if edit.active or undone)

    def _rows(self, edits: Iterable[Kept]) -> dict[str, Any]:
        """Return the tensors of some edits, a row each in their order."""
        import torch

        parts = []
        for shard, run in groupby(edits, key=lambda edit: str(edit.shard)):
            whole, rows = self._files.read(shard), [edit.row for edit in run]
            everything = rows == list(range(len(next(iter(whole.values())))))
            parts.append(whole if everything else {name: tensor[rows] for name, tensor in whole.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

    # -- writing ------------------------------------------------------------------------------------------------

    def keep_picture(self, query: Query) -> Query:
        """Copy the picture of a query into the ledger and return the query with the copy."""
        self._check_writing()
        if query.image is None:
            return query
        data = query.image.read_bytes()
        digest, suffix = hashlib.sha256(data).hexdigest(), query.image.suffix.lower()
        name = digest + (suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else "")
        path = self.folder / "pictures" / name
        if not path.exists():
            write_atomic(path, data)
        return replace(query, image=path)

    def add(
        self, requests: Sequence[Query], tensors: Mapping[str, Any], *, before: Sequence[str], names: Sequence[str]
    ) -> list[int]:
        """Append one operation and return its ids; afterwards it survives a crash of the machine.

        `requests` have their pictures in the ledger; `tensors` hold a row for each, or stand for all active edits.
        `before` are the answers so far, `names` what the user calls the pictures.
        """
        shard, first = self._write_shard(tensors), self.next_id
        edits = [
            Kept(first + row, request, _now(), said, name, True, first, shard, row)
            for row, (request, said, name) in enumerate(zip(requests, before, names, strict=True))
        ]
        self._append(self._record(edits, shard, 0))
        if self.rows:
            with suppress(StateError, RunError):  # the edit is in; a damaged shard is told of where it is read
                self._pack()
        return [edit.id for edit in edits]

    def mark(self, do: str, ids: Sequence[int], tensors: Mapping[str, Any] | None = None) -> None:
        """Append an undo or a redo; `tensors` stand for all edits that are active then, where `rows` is false."""
        shard = self._write_shard(tensors) if tensors else None
        self._append({"do": do, "time": _now(), "ids": list(ids), "shard": shard})

    def rewrite(self, tensors: Mapping[str, Any]) -> None:
        """Write everything anew, in few shards and without the history of undo and redo.

        `tensors` are those of all edits, undone ones included, or stand for all active edits. Old or new, nothing
        between: the new shards are on disk before `edits.jsonl` is replaced, the old ones go afterwards.
        """
        operations = [[self.edits[i] for i in ids] for ids, _ in self.operations(undone=True)]
        whole = None if self.rows else self._write_shard(tensors)
        records: list[dict[str, Any]] = []
        start = 0
        for group in grouped(operations, _SHARD_ROWS) if self.rows else [operations]:
            rows = sum(map(len, group))
            part = {name: tensor[start : start + rows] for name, tensor in tensors.items()} if self.rows else {}
            shard, row = self._write_shard(part) if self.rows else whole, 0
            for edits in group:
                records.append(self._record(edits, shard, row))
                row += len(edits)
            start += rows
        undone = [i for i, edit in self.edits.items() if not edit.active]
        if undone:
            records.append({"do": "undo", "time": _now(), "ids": undone, "shard": whole})
        self._run.rewrite("edits", records)
        self.edits.clear()
        self._shards.clear()
        for record in records:
            self._take(record)
        self._sweep()

    def _pack(self) -> None:
        """Put the newest shards into one where they hold enough edits together, as in a log-structured merge.

        So a row is written a few times at most, and many edits made one by one lie in few files. The files that are
        named no more stay until the next writer comes: somebody may be reading them.
        """
        for size in _PACKED:
            ids: list[int] = []
            for some in reversed(self._shards.values()):
                if len(some) >= size:
                    break
                ids = [*some, *ids]
            if len(ids) >= size:
                shard = self._write_shard(self._rows(self.edits[i] for i in ids))
                self._append({"do": "pack", "time": _now(), "ids": ids, "shard": shard})

    # -- inside -------------------------------------------------------------------------------------------------

    def _check_writing(self) -> None:
        if not self._writing:
            raise RunError(f"{self.folder}: open for reading only", "open_edits(..., writing=True)")

    def _one(self, i: int, active: bool | None) -> int:
        if i not in self.edits:
            raise UserError(f"no edit {i} in {self.folder}", f"it has {len(self.edits)}; mmedit edits list")
        if active is not None and self.edits[i].active != active:
            raise UserError(f"edit {i} is {'undone already' if active else 'not undone'}", "mmedit edits list --all")
        return i

    def _take(self, record: Mapping[str, Any]) -> None:
        do, shard = record["do"], record["shard"]
        if shard is not None and not _SHARD.fullmatch(shard):
            raise ValueError(f"shard {shard!r}")
        if do == "add":
            first = record["edits"][0]["id"]
            for row, edit in enumerate(record["edits"], record["row"]):
                name = edit["image"]
                if name is not None and not _PICTURE.fullmatch(name):
                    raise ValueError(f"image {name!r}")
                image = None if name is None else self.folder / "pictures" / name
                query = Query(edit["prompt"], edit["target"], image, edit["background"], edit["chat"])
                i, own = int(edit["id"]), shard if self.rows else None
                self.edits[i] = Kept(i, query, record["time"], edit["before"], edit["picture"], True, first, own, row)
                if own is not None:
                    self._shards.setdefault(own, []).append(i)
        elif do in ("undo", "redo"):
            for i in record["ids"]:
                self.edits[i] = replace(self.edits[i], active=do == "redo")
        elif do == "pack" and self.rows:
            for old in {str(self.edits[i].shard) for i in record["ids"]}:
                del self._shards[old]
            for row, i in enumerate(record["ids"]):
                self.edits[i] = replace(self.edits[i], shard=shard, row=row)
            self._shards[shard] = list(record["ids"])
        else:
            raise ValueError(f"do {do!r}")
        if not self.rows:
            self._state = shard

    def _record(self, edits: Sequence[Kept], shard: str | None, row: int) -> dict[str, Any]:
        """Return the line of one operation."""
        made = {"editor": self.config["editor"], "hparams": sha256_json(self.config["hparams"])[:12]}
        rows = [
            {"id": edit.id, **vars(edit.request), "image": edit.request.image and edit.request.image.name,
             "picture": edit.picture, "before": edit.before}
            for edit in edits
        ]  # fmt: skip
        return {"do": "add", "time": edits[0].time, **made, "edits": rows, "shard": shard, "row": row}

    def _append(self, record: dict[str, Any]) -> None:
        self._check_writing()
        before = self._state
        self._run.append("edits", [record])
        self._take(record)
        if not self.rows and before is not None and before != self._state:
            self._files.remove(before)  # it stood for edits as they no longer are

    def _write_shard(self, tensors: Mapping[str, Any]) -> str | None:
        self._check_writing()
        return self._files.write(tensors) if tensors else None

    def _sweep(self) -> None:
        """Remove what no line names: the tensors and pictures of an edit that a kill kept from getting in."""
        shards = {edit.shard for edit in self.edits.values()} | {self._state}
        pictures = {edit.request.image.name for edit in self.edits.values() if edit.request.image is not None}
        sweep(self.folder / "shards", {f"{shard}.safetensors" for shard in shards})
        sweep(self.folder / "pictures", pictures)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in `run.yaml`; raise UserError or StateError if it is not that of a ledger."""
    path = folder / "run.yaml"
    if (folder / INDEX).is_file():
        hint = f"mmedit generate --edits {folder} draws with them; mmedit edits list, undo and export work on them"
        raise UserError(f"{folder}: concepts of a text-to-image model, no edits of answers", hint)
    if not path.is_file():
        raise UserError(f"{folder}: no edits here", f"mmedit edit EDITOR ... --into {folder} begins a ledger")
    try:
        config = yaml.safe_load(path.read_bytes())["config"]
        version = config["ledger"]
        missing = {"editor", "hparams", "model", "dtype", "seed", "rows", "state"} - set(config)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise StateError(f"{path}: does not describe a ledger of edits", "put it back from a copy") from error
    if version > FORMAT:
        raise StateError(f"{folder}: a ledger of format {version}, newer than {FORMAT}", "upgrade mmedit")
    if missing:
        raise StateError(f"{path}: says nothing about {', '.join(sorted(missing))}", "put it back from a copy")
    return dict(config)


def _hinted(action: Any) -> Any:
    """Run it; a damaged file gets the way out of a ledger, not that of an evaluation."""
    try:
        return action()
    except RunError as error:
        if "--force" not in error.hint:
            raise
        hint = "put it back from a copy; tensors and pictures are as they were"
        raise RunError(error.problems, hint) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
