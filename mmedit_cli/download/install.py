"""From a catalogue entry to checked files in their place: plan, download, verify."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmedit_cli import hub, reading
from mmedit_cli.download import receipt
from mmedit_cli.download.catalogue import File, Group, Item, Source, is_inside
from mmedit_cli.download.sources import Courier, Fetched, SourceError, hub_files
from mmedit_cli.download.unpack import SUFFIXES, ArchiveError, is_archive, unpack
from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.storage import is_link, sha256_of, write_json

STAGING = ".download"
_DEPTH = 3  # archives wrap their content in so many folders at most


class DownloadError(MmeditError):
    """What was asked for could not be had, or is not what was published."""


class Installer:
    """Brings the items of one group into one folder."""

    def __init__(
        self, group: Group, folder: Path, courier: Courier, *, force: bool = False
    ) -> None:
        self.group, self.folder, self.courier, self.force = (
            group,
            folder,
            courier,
            force,
        )
        self.staging = folder / STAGING
        self.entries = receipt.read(folder) if folder.is_dir() else {}

    def plan(self, item: Item) -> dict[str, Any]:
        """Return what `get` would do; the hub is asked for sizes if there is a network."""
        size, note = item.bytes, ""
        first = item.sources[0]
        if size is None and first.kind == "hub" and not hub.is_offline():
            try:
                size = sum(file.bytes or 0 for file in hub_files(first)[1])
            except SourceError as error:
                note = str(error)
        state = "present" if self._is_present(item) else "missing"
        sources = [str(source) for source in item.sources]
        return {
            "item": item.name,
            "state": state,
            "bytes": size,
            "sources": sources,
            "note": note,
        }

    def get(self, item: Item) -> dict[str, Any]:
        """Bring one item, from the first source that gives it; return its entry of the receipt and a `state`.

        Raises DownloadError with what was tried and what to do by hand.
        """
        if not self.force and item.name in self.entries and self._is_present(item):
            self._sweep(item)
            return {**self.entries[item.name], "state": "present"}
        with self._locked():
            area = self.staging / item.name
            if self.force:
                shutil.rmtree(area, ignore_errors=True)
            if self._finish_move(item, area):
                shutil.rmtree(area)
                return {**self.entries[item.name], "state": "downloaded"}
            if not self.force and self._is_present(item):
                self._note(item, "put there by hand", None, self._found(item))
                return {**self.entries[item.name], "state": "present"}
            tried = []
            for position, source in enumerate(self._ways(item)):
                if source.kind == "manual":
                    continue
                try:
                    self._from(item, source, area / str(position), area)
                except (SourceError, ArchiveError, OSError) as error:
                    tried.append(f"{self.group.name}/{item.name}: {source}: {error}")
                    continue
                shutil.rmtree(area)
                return {**self.entries[item.name], "state": "downloaded"}
            raise DownloadError([*tried, *by_hand(self.group, item, self.folder)])

    def verify(self, item: Item) -> list[str]:
        """Return all differences between an item's files and its receipt or the catalogue, a line each."""
        entry = self.entries.get(item.name)
        if entry is None and not (
            item.files
            and any((self.folder / file.path).exists() for file in item.files)
        ):
            return ["not downloaded"]
        problems, digests = [], {}
        noted = {
            path: File(path, size, digest)
            for path, (size, digest) in (entry["files"] if entry else {}).items()
        }
        for path, known in (noted | {file.path: file for file in item.files}).items():
            place = self.folder / path
            if not is_inside(path) or not place.is_file():
                problems.append(f"{path}: missing")
                continue
            wrong = receipt.difference(place, known) or (
                path in noted and receipt.difference(place, noted[path])
            )
            if wrong:
                problems.append(f"{path}: {wrong}")
            elif known.sha256:
                digests[path] = known.sha256
        problems += receipt.layout_problems(self.folder, item)
        if (
            item.tree is not None
            and not problems
            and (wrong := receipt.tree_difference(digests, item.tree))
        ):
            problems.append(wrong)
        return problems

    def _sweep(self, item: Item) -> None:
        """Remove the leftovers of a download that was killed after its item was complete."""
        if not self.staging.is_dir():
            return
        # another download may be at work there, or nobody may write there
        with suppress(MmeditError, OSError), self._locked():
            shutil.rmtree(self.staging / item.name, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder against a second download; remove it afterwards if it is empty."""
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written: {error.strerror}",
                "choose another with --to",
            ) from error
        for place in (self.staging, *self.staging.iterdir()):
            if is_link(place):
                raise UserError(
                    f"{place}: is a link, and what is in it would be removed",
                    "remove the link",
                )
        try:
            with FileLock(self.staging / "lock", timeout=0):
                try:
                    yield
                finally:
                    _drop_empty(self.staging)
                    if {path.name for path in self.staging.iterdir()} == {"lock"}:
                        shutil.rmtree(self.staging, ignore_errors=True)
        except Timeout as error:
            raise DownloadError(
                f"{self.folder}: another download is at work there",
                "wait for it to end",
            ) from error
        finally:
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _ways(self, item: Item) -> list[Source]:
        """Return the sources of an item; an archive that the user put into the folder comes first."""
        names = [f"{item.name}{suffix}" for suffix in SUFFIXES] if item.unpack else []
        local = [
            Source("local", name) for name in names if (self.folder / name).is_file()
        ]
        return [*local, *item.sources]

    def _from(self, item: Item, source: Source, place: Path, area: Path) -> None:
        """Fetch from one source, check everything, and only then move the files into the folder."""
        files = place / "files"
        files.mkdir(parents=True, exist_ok=True)
        try:
            if source.kind == "local":
                shutil.rmtree(
                    place / "unpacked", ignore_errors=True
                )  # of an attempt that was killed
                unpack(
                    self.folder / source.where,
                    place / "unpacked",
                    tick=self.courier.tick,
                )
                fetched, root = Fetched(), place / "unpacked"
            else:
                with self._reused(item, files):
                    fetched = self.courier.bring(source, item, files)
                root = files
                self._check(item, fetched, files)
                if item.unpack:
                    root = self._unpack_all(files, place / "unpacked")
            root = _root_of(root, item)
            digests = self._digests(root, fetched)
            if item.tree is not None and (
                wrong := receipt.tree_difference(digests, item.tree)
            ):
                raise ArchiveError(f"wrong checksum: {wrong}")
            self._check_conflicts(item, root, digests)
        except ArchiveError:
            shutil.rmtree(place)  # what is refused leaves nothing behind
            raise
        except SourceError:
            shutil.rmtree(
                place / "unpacked", ignore_errors=True
            )  # the archive itself is sound, and is kept
            raise
        sizes = {path: (root / path).stat().st_size for path in digests}
        note = {
            "source": str(source),
            "revision": fetched.revision,
            "sizes": sizes,
            "digests": digests,
        }
        shutil.rmtree(area / "ready", ignore_errors=True)
        os.replace(root, area / "ready")
        write_json(area / "ready.json", note)
        self._finish_move(item, area)

    @contextmanager
    def _reused(self, item: Item, staging: Path) -> Iterator[None]:
        """Add what lies in the folder already and is known to be right, such as a file put there by hand."""
        copies = []
        for file in item.files:
            place, copy = self.folder / file.path, staging / file.path
            known = file.sha256 or file.git_blob
            if (
                known
                and place.is_file()
                and not copy.exists()
                and not receipt.difference(place, file)
            ):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(place, copy)
                copies.append(copy)
        try:
            yield
        except SourceError:
            for copy in copies:
                copy.unlink()
            raise

    def _check(self, item: Item, fetched: Fetched, folder: Path) -> None:
        """Compare with the digests of the source and of the catalogue; a wrong file is removed at once."""
        problems: dict[str, str] = {}
        for file in (*fetched.files, *item.files):
            place = folder / file.path
            if not place.is_file():
                problems.setdefault(file.path, "did not come")
            elif wrong := receipt.difference(place, file):
                place.unlink()
                problems[file.path] = wrong
        if problems:
            path, wrong = next(iter(problems.items()))
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise SourceError(f"{path}: {wrong}{more}")

    def _unpack_all(self, files: Path, target: Path) -> Path:
        """Unpack each archive among the files into one folder; without any, what came is that folder already."""
        archives = [path for _, path in receipt.below(files) if is_archive(path)]
        others = [
            (name, path) for name, path in receipt.below(files) if path not in archives
        ]
        if not archives and len(others) != 1:
            return files
        if not archives:
            archives, others = [others[0][1]], []  # unpack says what is wrong with it
        shutil.rmtree(target, ignore_errors=True)
        for i, archive in enumerate(archives):
            unpack(archive, target / str(i), tick=self.courier.tick)
            others += receipt.below(target / str(i))
        for name, path in others:
            place = target / "all" / name
            if place.exists():
                raise ArchiveError(f"{name}: in two archives")
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        return target / "all"

    def _digests(self, root: Path, fetched: Fetched) -> dict[str, str]:
        known = {file.path: file.sha256 for file in fetched.files if file.sha256}
        return {
            path: known.get(path) or sha256_of(place)
            for path, place in receipt.below(root)
        }

    def _check_conflicts(
        self, item: Item, root: Path, digests: Mapping[str, str]
    ) -> None:
        """Refuse to write over files that are there with another content, and to follow links out of the folder."""
        home = self.folder.resolve()
        mine = self.entries.get(item.name, {}).get("files", {})
        for path in digests:
            place = self.folder / path
            if not place.parent.resolve().is_relative_to(home):
                raise SourceError(
                    f"{place.parent} is a link that leads out of {self.folder}"
                )
            if (
                place.exists()
                and not self.force
                and path not in mine
                and sha256_of(place) != digests[path]
            ):
                raise SourceError(
                    f"{place} is there with another content; --force writes over it"
                )

    def _finish_move(self, item: Item, area: Path) -> bool:
        """Move the checked files into the folder; after an interruption, a second call continues."""
        if not (area / "ready.json").is_file():
            return False
        note = reading.read_json_object(
            area / "ready.json", hint=f"remove {area}"
        ).values
        for path, source in list(receipt.below(area / "ready")):
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        files = {
            path: [note["sizes"][path], digest]
            for path, digest in note["digests"].items()
        }
        self._note(item, note["source"], note["revision"], files)
        (area / "ready.json").unlink()
        return True

    def _note(
        self,
        item: Item,
        source: str,
        revision: str | None,
        files: Mapping[str, Sequence[Any]],
    ) -> None:
        known = bool(item.tree) or (
            bool(item.files)
            and all(file.sha256 or file.git_blob for file in item.files)
        )
        checked = "catalogue" if known else "source" if revision else "unverified"
        entry = {
            "source": source,
            "revision": revision,
            "checked": checked,
            "files": dict(files),
        }
        self.entries = {**self.entries, item.name: entry}
        receipt.write(self.folder, self.group.name, self.entries)

    def _is_present(self, item: Item) -> bool:
        """Tell whether an item is complete: as the receipt says, or put there by hand with the right content."""
        entry = self.entries.get(item.name)
        if entry is not None:
            places = (
                (self.folder / path, size) for path, (size, _) in entry["files"].items()
            )
            return all(
                place.is_file() and place.stat().st_size == size
                for place, size in places
            )
        if (self.staging / item.name).exists() or receipt.layout_problems(
            self.folder, item
        ):
            return False
        files = [(self.folder / file.path, file) for file in item.files]
        if any(
            not path.is_file() or receipt.difference(path, file) for path, file in files
        ):
            return False
        if item.tree is None:
            return True
        digests = {path: digest for path, (_, digest) in self._found(item).items()}
        return not receipt.tree_difference(digests, item.tree)

    def _found(self, item: Item) -> dict[str, list[Any]]:
        """Return size and digest of the files of an item that lie in the folder already."""
        paths = {file.path for file in item.files}
        for pattern in item.layout or {}:
            for part in pattern.split("|"):
                paths |= {
                    path.relative_to(self.folder).as_posix()
                    for path in self.folder.glob(part.strip())
                }
        places = [(path, self.folder / path) for path in sorted(paths)]
        return {
            path: [p.stat().st_size, sha256_of(p)] for path, p in places if p.is_file()
        }


def by_hand(group: Group, item: Item, folder: Path) -> list[str]:
    """Return a line that says which page to open for an item and where to put the files; empty without a page."""
    if item.unpack:
        what = f"save the archive as {folder / item.name}.zip (or .tar, .tar.gz), or unpack it in {folder}"
    else:
        names = [
            file.path for file in item.files if not (folder / file.path).is_file()
        ] or list(item.layout or ())
        what = f"put {', '.join(names)} into {folder}"
    pages = [
        Source("manual", f"https://drive.google.com/file/d/{source.where}/view")
        if source.kind == "drive"
        else source
        for source in item.sources
        if source.kind in ("manual", "drive")
    ]
    if not pages and group.homepage:
        pages = [Source("manual", group.homepage)]
    where = " or ".join(
        page.where + (f" ({page.note})" if page.note else "") for page in pages
    )
    return (
        [
            f"{group.name}/{item.name}: by hand: open {where}; {what}; then run the same command again"
        ]
        if where
        else []
    )


def _root_of(folder: Path, item: Item) -> Path:
    """Return the folder that has the layout of an item: archives often wrap it in another folder.

    Raises SourceError with what was found instead.
    """
    level = [folder]
    for _ in range(_DEPTH + 1):
        for root in level:
            if not receipt.layout_problems(root, item):
                return root
        level = [
            child
            for parent in level
            for child in sorted(parent.iterdir())
            if child.is_dir()
        ]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise SourceError(
        f"{'; '.join(receipt.layout_problems(folder, item))}; found {found}"
    )


def _drop_empty(folder: Path) -> None:
    """Remove the empty folders below a folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
