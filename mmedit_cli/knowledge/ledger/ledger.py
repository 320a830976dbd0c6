"""Ledger: a folder that keeps edits: the requests, the settings of the editor, and the tensors that were made.

    run.yaml              the editor, its hyper-parameters, and the fingerprint of the model it edits
    edits.jsonl           one line an operation, only ever appended to: add, undo, redo, pack
    shards/<sha256>.safetensors    tensors of edits; a line names the shard that it needs, and so its digest
    pictures/<sha256>.png          the pictures of the requests, so that an edit can be made again anywhere
    networks.safetensors  the trained networks of the editor, if it has any
    seal.json             length and SHA-256 of the lines: lost or changed lines are noticed before anything is written

A shard is on disk before the line that names it, and a line is whole or cut off: an edit is in, or it is not. Files
that no line names stay until `compact`, because the lines may have been lost. What a line named and a later one
replaced is removed by the command that replaced it; readers that meet the gap begin again with the new lines.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from mmedit_cli.errors import RunError, StateError, UserError
from mmedit_cli.knowledge.ledger.seal import SEAL, Beginning, Seal
from mmedit_cli.knowledge.ledger.shards import SHARD_FILE, Shards, grouped
from mmedit_cli.reading import LARGEST_PICTURE, read_bytes, read_yaml
from mmedit_cli.records import CONCEPT_INDEX, Run, encode_lines
from mmedit_cli.storage import (
    is_link,
    is_temporary,
    remove_file,
    remove_temporaries,
    sha256_json,
    sweep,
    unnamed,
    write_atomic,
)
from mmedit_cli.types import Query

_LARGEST_NETWORKS = 1 << 34
FORMAT = 1  # of the folder; a newer one is refused
NETWORKS = "networks.safetensors"
LINES = "edits.jsonl"
_PARTS = ("shards", "pictures")
_SHARD = re.compile(r"[0-9a-f]{64}")
PICTURE_FILE = re.compile(r"[0-9a-f]{64}(\.[a-z0-9]{1,5})?")
_SHARD_ROWS = 4096  # of a shard that compacting writes
# edits: the newest shards below such a size are packed into one as soon as they hold as many
_PACKED = (32, 1024)


@dataclass(frozen=True)
class LedgerEdit:
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

    def __init__(
        self,
        folder: Path,
        run: Run,
        config: dict[str, Any],
        records: Sequence[Mapping[str, Any]],
    ) -> None:
        self.folder = folder
        self.config = config
        self.edits: dict[int, LedgerEdit] = {}
        self.began = False  # by this process
        self._run = run
        self._writing = False
        self.files = Shards(folder)
        self._seal = Seal(folder)
        # the tensors that a reader found together with the lines
        self._held: dict[str, Any] | None = None
        self._kept_pictures: list[Path] = []  # written by this process
        # the shard that stands for all active edits
        self.state: str | None = None
        # the edits whose rows are in a shard, the newest shard last
        self._shards: dict[str, list[int]] = {}
        # shards that a line named and a later one made superfluous
        self._replaced: set[str] = set()
        for number, record in enumerate(records, 1):
            try:
                self.take(record)
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
        ours = {".lock", NETWORKS, SEAL, LINES, *_PARTS}
        if folder.exists() and not folder.is_dir():
            raise UserError(
                f"{folder}: not a folder", "name a new folder for the edits"
            )
        if folder.exists() and any(
            p.name not in ours and not is_temporary(p.name) for p in folder.iterdir()
        ):
            raise UserError(
                f"{folder}: neither empty nor a ledger of edits",
                "name a new folder for the edits",
            )
        return False

    @classmethod
    def create(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        networks: Path | None = None,
        run: Run | None = None,
    ) -> Ledger:
        """Begin a ledger and return it, open for writing; `networks` are copied.

        `run` holds the lock of the folder already. `run.yaml`, which makes the folder a ledger, is written last.
        """
        run = run or Run.lock(folder)
        try:
            _refuse_links(folder)
            if networks is not None:
                write_atomic(
                    folder / NETWORKS, read_bytes(networks, limit=_LARGEST_NETWORKS)
                )
            began = not (folder / "run.yaml").exists()
            if began and not (folder / SEAL).exists() and not run.lines("edits"):
                seal = Seal(folder)
                seal.start(b"")
                seal.write()
            ledger = cls._prepared(
                folder, {"kind": "edits", "ledger": FORMAT, **config}, environment, run
            )
        except BaseException:
            run.close()
            raise
        ledger.began = began
        return ledger

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        writing: bool = False,
        tensors: bool = False,
        run: Run | None = None,
    ) -> Ledger:
        """Open a ledger; writing takes the lock (unless `run` holds it) and mends what a killed writer left.

        With `tensors` a reader also holds the tensors of the active edits, which a writer may replace at any moment.
        Raises UserError if there is no ledger, StateError for a newer format or lost lines, RunError if it is damaged
        or being written.
        """
        config = _read_config(folder)
        if not writing:
            return cls._viewed(folder, config, tensors)
        run = run or _hinted(lambda: Run.lock(folder))
        try:
            return cls._prepared(folder, config, {}, run)
        except BaseException:
            run.close()
            raise

    @classmethod
    def _prepared(
        cls,
        folder: Path,
        config: dict[str, Any],
        environment: Mapping[str, Any],
        run: Run,
    ) -> Ledger:
        """Return the ledger of a folder whose lock is held; nothing is written before it is known to be whole."""
        _refuse_links(folder)
        accepted = Seal(folder).read()
        lines = Run.view(folder).lines("edits")  # a torn line is not cut off yet
        ledger = cls(
            folder,
            run,
            config,
            _hinted(lambda: run.decode("edits", lines)),
        )
        ledger._check_seal(lines, accepted)
        _hinted(lambda: run.prepare(config, environment))
        for part in _PARTS:
            (folder / part).mkdir(exist_ok=True)
            remove_temporaries(
                folder / part
            ) if part == "pictures" else ledger.files.recover(ledger.current())
        ledger._seal.start(lines)
        if not ledger._seal.is_current(accepted):
            ledger._seal.write()
        ledger._writing = True
        return ledger

    @classmethod
    @contextmanager
    def open_damaged(cls, folder: Path) -> Iterator[tuple[Ledger, bytes]]:
        """Yield a ledger for writing in which no line was read, and the lines, which may be damaged."""
        config = _read_config(folder)
        run = _hinted(lambda: Run.lock(folder))
        with run:
            _refuse_links(folder)
            ledger = cls(folder, run, config, [])
            for part in _PARTS:
                (folder / part).mkdir(exist_ok=True)
            ledger._writing = True
            yield ledger, run.lines("edits")

    def seal_again(self, lines: bytes) -> None:
        """Accept the lines as they are."""
        self._check_writing()
        self._seal.start(lines)
        self._seal.write()

    @classmethod
    def _viewed(cls, folder: Path, config: dict[str, Any], tensors: bool) -> Ledger:
        """Return the ledger for reading, as it is between two changes of a writer; take no lock."""
        run = Run.view(folder)
        seen: tuple[Any, bytes] | None = None
        while True:
            accepted = Seal(folder).read()
            lines = run.lines("edits")
            again = seen == (accepted, lines)
            seen = accepted, lines
            try:
                ledger = cls(
                    folder,
                    run,
                    config,
                    _hinted(lambda lines=lines: run.decode("edits", lines)),
                )
                ledger._check_seal(lines, accepted)
                if tensors:
                    ledger._held = ledger.tensors()
            except StateError:
                if again:  # nobody has changed anything meanwhile: it is damaged
                    raise
            else:
                return ledger

    def _check_seal(self, lines: bytes, accepted: list[Beginning] | None) -> None:
        path = self.folder / LINES
        torn = path.exists() and path.stat().st_size > len(lines)
        self._seal.check(
            lines,
            accepted,
            torn=torn,
            shards=accepted is None and bool(self.shard_files()),
        )

    def close(self) -> None:
        """Let go of the folder; closing twice is fine."""
        self._writing = False
        self._run.close()

    def discard(self) -> None:
        """Let go of the folder, and remove the ledger if this process began it and no edit got in."""
        if self._writing and self.began and not self.edits:
            written = [
                self.folder / name for name in (NETWORKS, LINES, SEAL, "run.yaml")
            ]
            for path in (*self._kept_pictures, *written):
                remove_file(path)
            for part in _PARTS:
                with suppress(OSError):  # somebody else's files are in it
                    (self.folder / part).rmdir()
            self._run.discard()
        self.close()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.discard()  # what cannot be used leaves no new ledger behind
            return
        if self._writing:
            self.remove_replaced()
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
    def active(self) -> list[LedgerEdit]:
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
        wanted = [
            i
            for i, edit in self.edits.items()
            if active is None or edit.active == active
        ]
        for part in text.split(","):
            bounds = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            if part.strip() in ("all", "last"):
                found += wanted if part.strip() == "all" else wanted[-1:]
            elif bounds is None:
                raise UserError(
                    f"{part.strip()!r}: not edits",
                    "e.g. 3, or 3-7, or 1,4, or last, or all",
                )
            elif bounds[2]:
                found += [i for i in wanted if int(bounds[1]) <= i <= int(bounds[2])]
            else:
                found.append(self._one(int(bounds[1]), active))
        if not found:
            state = {True: "active ", False: "undone ", None: ""}[active]
            raise UserError(
                f"{text}: no {state}edits there in {self.folder}",
                f"mmedit edits list {self.folder}",
            )
        return sorted(set(found))

    def operations(
        self, *, undone: bool = False, also: Sequence[int] = ()
    ) -> list[tuple[tuple[int, ...], tuple[Query, ...]]]:
        """Return (ids, requests) of each operation: of the active edits, of those in `also`, or of all edits."""
        groups: dict[int, list[LedgerEdit]] = {}
        more = set(also)
        for edit in self.edits.values():
            if edit.active or undone or edit.id in more:
                groups.setdefault(edit.first, []).append(edit)
        return [
            (tuple(e.id for e in group), tuple(e.request for e in group))
            for group in groups.values()
        ]

    def tensors(self, *, undone: bool = False) -> dict[str, Any]:
        """Return the tensors of the active edits (or of all), on the CPU; raise StateError if a shard is damaged."""
        if self._held is not None and not undone:
            # they are wanted once, and may be large
            held, self._held = self._held, None
            return held
        if not self.rows:
            return {} if self.state is None else self.files.read(self.state)
        wanted = list(self.edits.values())
        if not undone:
            wanted = [edit for edit in wanted if edit.active]
        return self._rows(wanted)

    def shard_files(self) -> list[Path]:
        """Return the files of tensors, whether a line names them or not."""
        return unnamed(self.folder / "shards", SHARD_FILE, ())

    def current(self) -> set[str]:
        """Return the digests of the shards that are needed now."""
        if not self.rows:
            return set() if self.state is None else {self.state}
        return set(self._shards)

    def _rows(self, edits: Iterable[LedgerEdit]) -> dict[str, Any]:
        """Return the tensors of some edits, a row each in their order."""
        import torch

        parts = []
        for shard, run in groupby(edits, key=lambda edit: str(edit.shard)):
            whole = self.files.read(shard)
            rows = [edit.row for edit in run]
            everything = rows == list(range(len(next(iter(whole.values())))))
            parts.append(
                whole
                if everything
                else {name: tensor[rows] for name, tensor in whole.items()}
            )
        return (
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if parts
            else {}
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def keep_picture(self, query: Query) -> Query:
        """Copy the picture of a query into the ledger and return the query with the copy."""
        self._check_writing()
        if query.image is None:
            return query
        data = read_bytes(query.image, limit=LARGEST_PICTURE)
        digest = hashlib.sha256(data).hexdigest()
        suffix = query.image.suffix.lower()
        name = digest + (suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else "")
        path = self.folder / "pictures" / name
        if not path.exists():
            write_atomic(path, data)
            self._kept_pictures.append(path)
        return replace(query, image=path)

    def add(
        self,
        requests: Sequence[Query],
        tensors: Mapping[str, Any],
        *,
        before: Sequence[str],
        names: Sequence[str],
    ) -> list[int]:
        """Append one operation and return its ids; afterwards it survives a crash of the machine.

        `requests` have their pictures in the ledger; `tensors` hold a row for each, or stand for all active edits.
        `before` are the answers so far, `names` what the user calls the pictures.
        """
        first = self.next_id
        now = _now()
        edits = [
            LedgerEdit(
                first + row,
                request,
                now,
                said,
                name,
                True,
                first,
                None,
                row,
            )
            for row, (request, said, name) in enumerate(
                zip(requests, before, names, strict=True)
            )
        ]
        with self._writing_shards():
            shard = self._write_shard(tensors, edits)
            self._append(self.record(edits, shard, 0))
        if self.rows:
            # the edit is in; a damaged shard is reported where it is read
            with suppress(StateError, RunError):
                self._pack()
        return [edit.id for edit in edits]

    def mark(
        self, do: str, ids: Sequence[int], tensors: Mapping[str, Any] | None = None
    ) -> None:
        """Append an undo or a redo; `tensors` stand for all edits that are active then, where `rows` is false."""
        self._check_writing()
        active = do == "redo"
        record = {"do": do, "time": _now(), "ids": list(ids)}
        changed = {}
        for i in ids:
            changed[i] = replace(self.edits[i], active=active)
        with self._writing_shards():
            shard = self._write_shard(tensors or {}, (), changed)
            self._append({**record, "shard": shard})

    def rewrite(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Write everything anew, in few shards and without the history of undo and redo; return what was removed.

        `tensors` are those of all edits, undone ones included, or stand for all active edits. Old or new, nothing
        between: the new shards are on disk before `edits.jsonl` is replaced, the old ones go afterwards, and with them
        the files that no line named.
        """
        self._check_writing()
        with self._writing_shards():
            self.replace_lines(self._anew(tensors))
        return self._remove_unnamed()

    def _anew(self, tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Write the shards of all edits and return the lines that name them."""
        operations = [
            [self.edits[i] for i in ids] for ids, _ in self.operations(undone=True)
        ]
        records: list[dict[str, Any]] = []
        if self.rows:
            start = 0
            for group in grouped(operations, _SHARD_ROWS):
                edits = [edit for operation in group for edit in operation]
                part = {
                    name: tensor[start : start + len(edits)]
                    for name, tensor in tensors.items()
                }
                records += self._records(group, self._write_shard(part, edits))
                start += len(edits)
            whole = None
        else:
            whole = self._write_shard(tensors, ())
            records += self._records(operations, whole)
        undone = [i for i, edit in self.edits.items() if not edit.active]
        if undone:
            records.append(
                {"do": "undo", "time": _now(), "ids": undone, "shard": whole}
            )
        return records

    def _records(
        self, operations: Sequence[Sequence[LedgerEdit]], shard: str | None
    ) -> list[dict[str, Any]]:
        """Return the lines of operations whose tensors are in one shard."""
        records = []
        row = 0
        for edits in operations:
            records.append(
                self.record(
                    edits,
                    shard,
                    row if self.rows else 0,
                )
            )
            row += len(edits)
        return records

    def replace_lines(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace all lines, and take over what they say."""
        self._check_writing()
        lines = encode_lines(self.folder / LINES, records)
        old = self.current() | self._replaced
        self._seal.write(lines)
        self._run.rewrite("edits", records)
        self._seal.start(lines)
        self._seal.write()
        self.edits.clear()
        self._shards.clear()
        self.state = None
        for record in records:
            self.take(record)
        self._replaced = old - self.current()

    def remove_replaced(self) -> None:
        """Remove the shards that lines named and later ones replaced."""
        for shard in self._replaced - self.current():
            with suppress(OSError):
                self.files.remove(shard)
        self._replaced.clear()

    def _remove_unnamed(self) -> dict[str, Any]:
        """Remove the files that no line names; return their names and sizes, those that were replaced apart."""
        current = {f"{shard}.safetensors" for shard in self.current()}
        replaced = {f"{shard}.safetensors" for shard in self._replaced}
        pictures = {
            edit.request.image.name
            for edit in self.edits.values()
            if edit.request.image is not None
        }
        sizes = {
            path: path.stat().st_size
            for path in unnamed(self.folder / "shards", SHARD_FILE, current)
        }
        sizes |= {
            path: path.stat().st_size
            for path in unnamed(self.folder / "pictures", PICTURE_FILE, pictures)
        }
        gone = sweep(self.folder / "shards", SHARD_FILE, keep=current)
        gone += sweep(self.folder / "pictures", PICTURE_FILE, keep=pictures)
        self._replaced.clear()
        lost = [path for path in gone if path.name not in replaced]
        return {
            "replaced": len(gone) - len(lost),
            "unnamed": [
                {"file": f"{path.parent.name}/{path.name}", "bytes": sizes[path]}
                for path in lost
            ],
        }

    def _pack(self) -> None:
        """Put the newest shards into one where they hold enough edits together, as in a log-structured merge.

        So a row is written a few times at most, and many edits made one by one lie in few files. The files that are
        replaced stay until the ledger is closed.
        """
        for size in _PACKED:
            ids: list[int] = []
            for some in reversed(self._shards.values()):
                if len(some) >= size:
                    break
                ids = [*some, *ids]
            if len(ids) >= size:
                edits = [self.edits[i] for i in ids]
                with self._writing_shards():
                    shard = self._write_shard(self._rows(edits), edits)
                    self._append(
                        {"do": "pack", "time": _now(), "ids": ids, "shard": shard}
                    )

    # -- inside -------------------------------------------------------------------------------------------------

    def _check_writing(self) -> None:
        if not self._writing:
            raise RunError(
                f"{self.folder}: open for reading only", "open_edits(..., writing=True)"
            )

    def _one(self, i: int, active: bool | None) -> int:
        if i not in self.edits:
            raise UserError(
                f"no edit {i} in {self.folder}",
                f"it has {len(self.edits)}; mmedit edits list",
            )
        if active is not None and self.edits[i].active != active:
            raise UserError(
                f"edit {i} is {'undone already' if active else 'not undone'}",
                "mmedit edits list --all",
            )
        return i

    def take(self, record: Mapping[str, Any]) -> None:
        """Take over what a line says; raise KeyError, TypeError or ValueError if it is not one of a ledger."""
        do = record["do"]
        shard = record["shard"]
        if shard is not None and not _SHARD.fullmatch(shard):
            raise ValueError(f"shard {shard!r}")
        if do == "add":
            self._take_new_edits(record)
        elif do in ("undo", "redo"):
            for i in record["ids"]:
                self.edits[i] = replace(self.edits[i], active=do == "redo")
        elif do == "pack" and self.rows:
            self._take_pack(record["ids"], shard)
        else:
            raise ValueError(f"do {do!r}")
        if not self.rows:
            if self.state is not None:
                self._replaced.add(self.state)
            self.state = shard
        self._replaced.discard(shard)

    def _take_new_edits(self, record: Mapping[str, Any]) -> None:
        """Take over the edits of one operation."""
        edits = record["edits"]
        if not edits:
            raise ValueError("edits: none")
        first = edits[0]["id"]
        shard = record["shard"] if self.rows else None
        for row, edit in enumerate(edits, record["row"]):
            request = self._request_of(edit)
            i = int(edit["id"])
            self.edits[i] = LedgerEdit(
                i,
                request,
                time=record["time"],
                before=edit["before"],
                picture=edit["picture"],
                active=True,
                first=first,
                shard=shard,
                row=row,
            )
            if shard is not None:
                self._shards.setdefault(shard, []).append(i)

    def _take_pack(self, ids: Sequence[int], shard: str) -> None:
        """Take over that the rows of some edits are in a new shard now."""
        former = {str(self.edits[i].shard) for i in ids}
        for old in former:
            del self._shards[old]
            self._replaced.add(old)
        for row, i in enumerate(ids):
            self.edits[i] = replace(self.edits[i], shard=shard, row=row)
        self._shards[shard] = list(ids)

    def _request_of(self, edit: Mapping[str, Any]) -> Query:
        """Return the request of an edit as it stands in a line; raise ValueError for a picture of another name."""
        name = edit["image"]
        image = None
        if name is not None:
            if not PICTURE_FILE.fullmatch(name):
                raise ValueError(f"image {name!r}")
            image = self.folder / "pictures" / name
        return Query(
            edit["prompt"],
            edit["target"],
            image,
            edit["background"],
            edit["chat"],
        )

    def record(
        self, edits: Sequence[LedgerEdit], shard: str | None, row: int
    ) -> dict[str, Any]:
        """Return the line of one operation."""
        made = {
            "editor": self.config["editor"],
            "hparams": sha256_json(self.config["hparams"])[:12],
        }
        rows = [_as_row(edit) for edit in edits]
        return {
            "do": "add",
            "time": edits[0].time,
            **made,
            "edits": rows,
            "shard": shard,
            "row": row,
        }

    def _append(self, record: dict[str, Any]) -> None:
        """Put a line on disk, seal it, and give the shard that it names its name."""
        self._check_writing()
        before = self.state
        self._seal.extend(self._run.append("edits", [record]))
        self.take(record)
        self.files.finalize()
        if not self.rows and before is not None and before != self.state:
            # it belongs to an earlier state, and may be as large as a model
            with suppress(OSError):
                self.files.remove(before)

    @contextmanager
    def _writing_shards(self) -> Iterator[None]:
        """Give the shards that are written in the block their names, or remove them if it fails."""
        self._check_writing()
        try:
            yield
            self.files.finalize()
        finally:
            self.files.drop()

    def _write_shard(
        self,
        tensors: Mapping[str, Any],
        edits: Sequence[LedgerEdit],
        changed: Mapping[int, LedgerEdit] | None = None,
    ) -> str | None:
        """Write the tensors of `edits`, or of all edits, and return the digest that names the file.

        The file also says whose tensors they are, so that `repair` can use it if the lines are lost. `changed` are
        edits as they will be with the line that follows.
        """
        if not tensors:
            return None
        if self.rows:
            return self.files.write(
                tensors, {"edits": [_as_row(edit) for edit in edits]}
            )
        everything = {
            **self.edits,
            **{edit.id: edit for edit in edits},
            **(changed or {}),
        }
        rows = [{**_as_row(edit), "first": edit.first} for edit in everything.values()]
        undone = [edit.id for edit in everything.values() if not edit.active]
        return self.files.write(tensors, {"edits": rows, "undone": undone})


def _as_row(edit: LedgerEdit) -> dict[str, Any]:
    """Return an edit as it stands in the line of its operation."""
    image = edit.request.image and edit.request.image.name
    return {
        "id": edit.id,
        **vars(edit.request),
        "image": image,
        "picture": edit.picture,
        "before": edit.before,
    }


def _refuse_links(folder: Path) -> None:
    """Raise StateError if a part of a ledger is a link: what lies behind it is not the ledger's."""
    for name in (*_PARTS, NETWORKS, SEAL, LINES, "run.yaml"):
        if is_link(folder / name):
            raise StateError(
                f"{folder / name}: a link, where a ledger has its own files",
                "replace it by what it links to",
            )


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in `run.yaml`; raise UserError or StateError if it is not that of a ledger."""
    path = folder / "run.yaml"
    if (folder / CONCEPT_INDEX).is_file():
        hint = f"mmedit generate --edits {folder} draws with them; mmedit edits list, undo and export work on them"
        raise UserError(
            f"{folder}: concepts of a text-to-image model, no edits of answers", hint
        )
    if not path.is_file():
        raise UserError(
            f"{folder}: no edits here",
            f"mmedit edit EDITOR ... --into {folder} begins a ledger",
        )
    try:
        config = read_yaml(path, halves=True, error=StateError)["config"]
        version = config["ledger"]
        missing = {
            "editor",
            "hparams",
            "model",
            "dtype",
            "seed",
            "rows",
            "state",
        } - set(config)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise StateError(
            f"{path}: does not describe a ledger of edits", "put it back from a copy"
        ) from error
    if version > FORMAT:
        raise StateError(
            f"{folder}: a ledger of format {version}, newer than {FORMAT}",
            "upgrade mmedit",
        )
    if missing:
        raise StateError(
            f"{path}: says nothing about {', '.join(sorted(missing))}",
            "put it back from a copy",
        )
    return dict(config)


def _hinted(action: Any) -> Any:
    """Run `action`; the hint for a damaged file is that of a ledger, not that of an evaluation."""
    try:
        return action()
    except RunError as error:
        if "--force" not in error.hint:
            raise
        hint = "put it back from a copy; tensors and pictures are as they were"
        raise RunError(error.problems, hint) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
