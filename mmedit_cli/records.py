"""Run: a records folder with one writer, written so that a kill at any moment leaves something to continue from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout

from mmedit_cli.errors import DataError, RunError, StateError
from mmedit_cli.reading import (
    parse_json_object,
    read_bytes,
    read_json_object,
    read_yaml,
)
from mmedit_cli.runtime import Processes
from mmedit_cli.storage import (
    dump_json,
    file_errors,
    read_tensors,
    refuse_link,
    remove_file,
    remove_temporaries,
    sha256_json,
    sync_folder,
    write_atomic,
    write_tensors,
)

_LARGEST_LINES = 1 << 30  # bytes of all records of a run together
# the file that tells a folder of concepts from one of a run or of a ledger
CONCEPT_INDEX = "index.json"
CONCEPT_EDITS = "concept-edits.json"
_START_ANEW = "start it anew with --force"
_RECORDS = (
    "ability",
    "asked",
    "cases",
    "edits",
    "expressive",
    "jobs",
    "learned",
    "log",
    "questions",
)
_TENSORS = ("editor", "last")
# everything that a run writes itself; nothing else in its folder is ever cut or removed
_WRITTEN = (
    *(f"{name}.jsonl" for name in _RECORDS),
    *(f"{name}.safetensors" for name in _TENSORS),
    "hparams.yaml",
    "report.json",
    "run.yaml",
)


class Run:
    """One run on disk: `run.yaml` (what was asked), `<name>.jsonl`, `<name>.safetensors`, and `report.json` last.

    Made by `Run.open`, which takes the lock of the folder; the lock goes with `close` or with the process. What a
    method has written when it returns survives a crash of the machine.
    """

    def __init__(self, folder: Path, lock: BaseFileLock) -> None:
        self.folder = folder
        self._lock = lock
        self._made = False  # the folder, by this process

    @staticmethod
    def locate(root: Path, parts: Sequence[str], config: Mapping[str, Any]) -> Path:
        """Return `root`/parts/<12 digits of the config's hash>; the parts are made safe as file names."""
        return root.joinpath(*map(_safe_name, parts), sha256_json(config)[:12])

    @staticmethod
    def finished(folder: Path) -> dict[str, Any] | None:
        """Return the report of a finished run, None where there is none yet. Takes no lock.

        Raises RunError if the report cannot be read.
        """
        path = folder / "report.json"
        if not path.exists():
            return None
        return read_json_object(
            path, halves=True, error=RunError, hint=_START_ANEW
        ).values

    @staticmethod
    def read_report(folder: Path) -> dict[str, Any]:
        """Return the report of a finished run; raise RunError if there is none yet, or if it cannot be read."""
        report = Run.finished(folder)
        if report is None:
            raise RunError(
                f"{folder}: no finished run here",
                "`mmedit report` lists the finished ones",
            )
        return report

    @classmethod
    def done_before(
        cls, folder: Path, *, force: bool, say: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Return the report of a finished run, and say so; None if the run is not finished, or with `force`."""
        report = None if force else cls.finished(folder)
        if report is not None:
            say(f"already done: {folder} (--force does it again)")
        return report

    @classmethod
    def report_once(
        cls,
        folder: Path,
        make: Callable[[], dict[str, Any]],
        *,
        force: bool,
        say: Callable[[str], None],
    ) -> dict[str, Any]:
        """Return the report of a finished run, or that of `make()` if the run is not finished, or with `force`."""
        return cls.done_before(folder, force=force, say=say) or make()

    @classmethod
    def open(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> Run:
        """Create or continue the run in `folder`; `force` removes what an earlier run left there.

        `environment` is kept as the run began, and `options`, with which a command would make the same run. What a
        killed writer left half written is removed.

        Raises RunError if another process writes the folder, or if it holds a run with another config.
        """
        run = cls.lock(folder)
        try:
            run.prepare(config, environment, options=options, force=force)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def lock(cls, folder: Path) -> Run:
        """Take the lock of a folder, which is made if need be, and return its run, not prepared yet.

        Raises RunError if another process writes the folder.
        """
        made = not folder.exists()
        with file_errors(folder, "create the folder"):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / ".lock"
        refuse_link(path)
        lock = FileLock(path, timeout=0, thread_local=False)
        with file_errors(folder, "lock the folder"):
            try:
                lock.acquire()
            except Timeout as error:
                raise RunError(
                    f"another process is writing {folder}",
                    "wait for it to end, or stop it",
                ) from error
        run = cls(folder, lock)
        run._made = made
        return run

    @classmethod
    def view(cls, folder: Path) -> Run:
        """Return a run that another process writes, to read from."""
        return cls(folder, FileLock(folder / ".lock", timeout=0, thread_local=False))

    @property
    def environment(self) -> dict[str, Any]:
        """The environment the run began in."""
        return dict(_read_yaml(self.folder / "run.yaml")["environment"])

    def close(self) -> None:
        """Let go of the folder; closing twice is fine."""
        self._lock.release()

    def discard(self) -> None:
        """Let go of a folder in which nothing came about; remove it if `lock` made it and it is empty."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows removes no open file
                remove_file(self.folder / ".lock")
        self.close()
        if self._made:
            with suppress(OSError):
                self.folder.rmdir()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> bytes:
        """Add the records to `<name>.jsonl` in one write and return it: after a failure none of them is there."""
        path = self._path(name, ".jsonl")
        data = encode_lines(path, records)
        with file_errors(path, "write"), path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError("disk full")
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
            if size == 0:
                sync_folder(self.folder)
        return data

    def lines(self, name: str) -> bytes:
        """Return the whole lines of `<name>.jsonl`; what follows the last newline was torn by a kill.

        Who holds the lock also cuts it off the file.
        """
        path = self._path(name, ".jsonl")
        with file_errors(path, "read"):
            data = (
                read_bytes(path, limit=_LARGEST_LINES, error=RunError)
                if path.exists()
                else b""
            )
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data) and self._lock.is_locked:
            with file_errors(path, "mend"):
                os.truncate(path, len(whole))
        return whole

    def read(self, name: str) -> list[dict[str, Any]]:
        """Return all records of `<name>.jsonl`; raise RunError for a line that is no JSON object."""
        return self.decode(name, self.lines(name))

    def decode(self, name: str, lines: bytes) -> list[dict[str, Any]]:
        """Return the records in lines of `<name>.jsonl`; raise RunError for a line that is no JSON object."""
        records = []
        for number, line in enumerate(lines.split(b"\n")[:-1], 1):
            try:
                records.append(_decode(line))
            except (ValueError, RecursionError) as error:
                path = self._path(name, ".jsonl")
                raise RunError(
                    f"{path}:{number}: not a record: {error}", _START_ANEW
                ) from error
        return records

    def rewrite(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace `<name>.jsonl` atomically."""
        path = self._path(name, ".jsonl")
        write_atomic(path, encode_lines(path, records))

    def save_tensors(
        self, name: str, tensors: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> Path:
        """Replace `<name>.safetensors` atomically and return its path; metadata is text only."""
        path = self._path(name, ".safetensors")
        write_tensors(path, tensors, metadata)
        return path

    def load_tensors(self, name: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        """Return (tensors on the CPU, metadata) of `<name>.safetensors`, or None where there is no such file.

        Raises RunError if the file is damaged.
        """
        path = self._path(name, ".safetensors")
        if not path.exists():
            return None
        try:
            return read_tensors(path)
        except StateError as error:
            raise RunError(f"{path}: damaged: {error}", _START_ANEW) from error

    def remove_tensors(self, name: str) -> None:
        """Remove `<name>.safetensors`, if it is there."""
        path = self._path(name, ".safetensors")
        with file_errors(path, "remove"):
            remove_file(path)

    def finish(self, report: Mapping[str, Any]) -> Path:
        """Write `report.json` and return its path; everything else is on disk by then, so it means "complete"."""
        path = self.folder / "report.json"
        write_atomic(path, _encode(path, report, indent=2) + b"\n")
        return path

    def _path(self, name: str, suffix: str) -> Path:
        if name not in (_RECORDS if suffix == ".jsonl" else _TENSORS):
            raise ValueError(
                f"{name}{suffix}: name it in records.py, so that --force removes it"
            )
        return self.folder / f"{name}{suffix}"

    def prepare(
        self,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> None:
        """Begin or continue the run of a config; `force` removes what an earlier one left.

        Raises RunError if the folder holds a run with another config.
        """
        for name in _WRITTEN:
            refuse_link(self.folder / name)
        with file_errors(self.folder, "clear"):
            remove_temporaries(self.folder)
            for name in _WRITTEN if force else ():
                remove_file(self.folder / name)
        path = self.folder / "run.yaml"
        said = {"config": config, "environment": environment}
        if options is not None:
            said["options"] = options
        ours = json.loads(_encode(path, said))
        if not path.exists():
            write_atomic(
                path,
                yaml.safe_dump(ours, sort_keys=False, allow_unicode=True, width=119),
            )
        theirs = _read_yaml(path)["config"]
        if theirs != ours["config"]:
            both = theirs | ours["config"]
            keys = sorted(
                str(key)
                for key in both
                if theirs.get(key, ...) != ours["config"].get(key, ...)
            )
            raise RunError(
                f"{self.folder}: holds a run with another config (different: {', '.join(keys)})",
                "choose another folder, or replace that run with --force",
            )
        for name in _RECORDS:
            self.lines(name)  # cuts a torn line off before anything is appended to it


@contextmanager
def shared_run(
    folder: Path,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    processes: Processes,
    **how: Any,
) -> Iterator[Run]:
    """Yield the run in `folder`: the first process opens and writes it, the others read what it has written.

    `how` are the options of `Run.open`.
    """
    with ExitStack() as stack:
        if processes.first:
            opened = Run.open(folder, config, environment, **how)
            run = stack.enter_context(opened)
        processes.wait()
        yield run if processes.first else Run.view(folder)


def _safe_name(part: str) -> str:
    """Return a file name for any text; where the text had to be changed a short hash keeps it distinct."""
    name = re.sub(r"[^A-Za-z0-9._+=-]+", "-", part).strip(".-")[:60]
    if name and name == part:
        return name
    return f"{name}-{hashlib.sha256(part.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip(
        "-"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return what `run.yaml` holds; raise RunError unless it describes a run."""
    try:
        saved = read_yaml(path, halves=True, error=RunError, hint=_START_ANEW)
    except yaml.YAMLError as error:
        raise RunError(f"{path}: not valid YAML", _START_ANEW) from error
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(k), dict) for k in ("config", "environment")
    ):
        raise RunError(f"{path}: does not describe a run", _START_ANEW)
    return saved


def _encode(path: Path, obj: Any, indent: int | None = None) -> bytes:
    try:
        return dump_json(obj, indent=indent)
    except ValueError as error:
        raise RunError(f"{path}: cannot be written as JSON: {error}") from error


def encode_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return records as JSON lines; raise RunError naming `path` for what JSON does not have."""
    return b"".join(_encode(path, record) + b"\n" for record in records)


def _decode(data: bytes) -> dict[str, Any]:
    """Return the JSON object; anything else is a ValueError."""
    try:
        return parse_json_object(data, "", halves=True).values
    except DataError as error:
        raise ValueError(error.problems[0].removeprefix(": ")) from error
