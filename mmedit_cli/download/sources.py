"""One function a kind of source: each brings an item's files into a folder, or says in one line why it cannot."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urljoin, urlsplit

from mmedit_cli import hub
from mmedit_cli.download import receipt, transfer
from mmedit_cli.download.catalogue import PATH, File, Item, Source, is_inside
from mmedit_cli.output import TransferTick
from mmedit_cli.registry import share_dir

DRIVE = "https://drive.usercontent.google.com/download"


class SourceError(Exception):
    """A source does not give an item; the text says why in one line."""


def _silent(what: str, count: int, total: int | None) -> None:
    """Say nothing of the progress."""


@dataclass
class Fetched:
    """What came: the exact revision where there is one, and what the source itself says of the files."""

    revision: str | None = None
    files: tuple[File, ...] = ()


@dataclass
class Courier:
    """What the sources share: how to behave, where progress is told, and the HTTP connections."""

    manners: transfer.Manners = field(default_factory=transfer.Manners)
    tick: TransferTick = _silent

    def bring(self, source: Source, item: Item, folder: Path) -> Fetched:
        """Bring the files of an item into `folder`.

        Raises SourceError.
        """
        if source.kind in ("hub", "url", "drive") and hub.is_offline():
            raise SourceError("HF_HUB_OFFLINE is set, so the network is not used")
        kinds: dict[str, Callable[[Courier, Source, Item, Path], Fetched]] = {
            "hub": _from_hub,
            "url": _from_url,
            "drive": _from_drive,
            "bundled": _from_data,
        }
        try:
            return kinds[source.kind](self, source, item, folder)
        except transfer.TransferError as error:
            raise SourceError(str(error)) from error

    def fetch(self, url: str, target: Path, size: int | None = None) -> None:
        """Transfer one file, unless it is there."""
        if target.is_file():  # it came in an earlier attempt, which may have been killed before it could tidy up
            transfer.forget_part(target)
            return
        with transfer.client(self.manners) as session:
            transfer.Transfer(session, url, target, size, self.manners, self.tick).run()


def check_room(folder: Path, count: int) -> None:
    """Raise SourceError unless the disk has room for so many bytes below `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if count > free:
        raise SourceError(
            f"needs {count:,} bytes, and the disk of {folder} has {free:,} free"
        )


def repository_of(source: Source, revision: str | None = None) -> hub.Repository:
    """Return the repository behind a source of the hub."""
    return hub.Repository(source.where, source.type, revision or source.revision)


def hub_files(
    source: Source, revision: str | None = None
) -> tuple[str, tuple[File, ...], str]:
    """Ask the hub for the commit behind a source, the files wanted of it with size and digest, and the licence.

    Raises SourceError.
    """
    from huggingface_hub import HfApi

    repository = repository_of(source, revision)
    info: Any
    hub.prepare()
    try:
        info = HfApi().repo_info(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            files_metadata=True,
        )
        siblings = [(str(entry.rfilename), entry) for entry in info.siblings or ()]
    except Exception as error:  # the transport below differs between releases of the hub client, and so do its errors
        raise SourceError(str(hub.trouble(error, repository))) from error
    files = []
    for path, entry in siblings:
        if not is_inside(path):
            raise SourceError(f"{path}: a file that does not stay in its folder")
        if not source.include or any(
            fnmatch.fnmatch(path, pattern) for pattern in source.include
        ):
            sha256 = entry.lfs.sha256 if entry.lfs is not None else None
            files.append(
                File(path, entry.size, sha256, None if sha256 else entry.blob_id)
            )
    if not files:
        raise SourceError(f"no file there matches {', '.join(source.include)}")
    licence = (
        getattr(info.card_data, "license", None) if info.card_data is not None else None
    )
    return str(info.sha), tuple(files), str(licence or "not stated on its card")


def _from_hub(courier: Courier, source: Source, item: Item, folder: Path) -> Fetched:
    from huggingface_hub import snapshot_download

    wanted = Source(
        **{
            **vars(source),
            "include": source.include or tuple(file.path for file in item.files),
        }
    )
    commit, files, _ = hub_files(wanted)
    check_room(folder, sum(file.bytes or 0 for file in files))
    for unfinished in (folder / ".cache").rglob(
        "*.incomplete"
    ):  # of a download that was killed: never continued
        unfinished.unlink()
    try:
        snapshot_download(
            source.where,
            repo_type=source.type,
            revision=commit,
            local_dir=folder,
            allow_patterns=[file.path for file in files],
        )
    except Exception as error:  # as above
        raise SourceError(str(hub.trouble(error, repository_of(source)))) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return Fetched(commit, files)


def _from_url(courier: Courier, source: Source, item: Item, folder: Path) -> Fetched:
    if PATH not in source.where:
        courier.fetch(source.where, folder / _name_of(source.where, item))
        return Fetched()

    for file in item.files:
        target = folder / file.path
        if target.is_file() and receipt.difference(target, file):
            target.unlink()  # an earlier attempt brought something else
        try:
            courier.fetch(
                source.where.replace(PATH, quote(file.path)), target, file.bytes
            )
        except transfer.TransferError as error:
            raise SourceError(f"{file.path}: {error}") from error
    return Fetched()


def _from_drive(courier: Courier, source: Source, item: Item, folder: Path) -> Fetched:
    url = f"{DRIVE}?{urlencode({'id': source.where, 'export': 'download', 'confirm': 't'})}"
    target = folder / item.name
    try:
        courier.fetch(url, target)
    except transfer.PageInstead as error:
        form = _Form(
            error.text
        )  # Drive asks before it gives large files that it has not scanned for viruses
        if not form.fields:
            raise SourceError(
                "Google Drive gives a page instead: the file is gone, private, or over its quota"
            ) from error
        try:
            courier.fetch(
                f"{urljoin(url, form.action)}?{urlencode(form.fields)}", target
            )
        except transfer.PageInstead as again:
            raise SourceError(
                "Google Drive refuses the download; its quota may be used up, try tomorrow"
            ) from again
    return Fetched()


class _Form(HTMLParser):
    """Where the form of a page leads, and its hidden fields."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "form":
            self.action = found.get("action") or ""
        if tag != "input" or found.get("type") != "hidden":
            return
        name = found.get("name")
        if name:
            self.fields[name] = found.get("value") or ""


def _from_data(courier: Courier, source: Source, item: Item, folder: Path) -> Fetched:
    home = share_dir("data")
    origin = home / source.where
    if not is_inside(source.where) or not origin.resolve().is_relative_to(
        home.resolve()
    ):
        raise SourceError(f"{source.where} leads out of the data that come along")
    if not origin.is_dir():
        raise SourceError(source.note or f"{origin} is not there")
    shutil.copytree(origin, folder, dirs_exist_ok=True)
    return Fetched()


def _name_of(url: str, item: Item) -> str:
    """Return the file name at the end of a URL, the item's name where there is none fit to use."""
    name = urlsplit(url).path.rpartition("/")[2]
    return name if is_inside(name) else item.name
