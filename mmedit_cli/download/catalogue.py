"""The catalogue: which groups there are, what each consists of, and where it can be had."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmedit_cli import reading
from mmedit_cli.errors import DataError, UnknownName, near_miss
from mmedit_cli.reading import Record

PATH = "{path}"  # in the address of a source: stands for the path of each file
KINDS = ("hub", "url", "drive", "bundled", "manual")
_BUILT_IN = Path(__file__).with_name("catalogue.yaml")
_DIGESTS = {
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "git_blob": re.compile(r"[0-9a-f]{40}"),
}


@dataclass(frozen=True)
class File:
    """A file of an item: where it goes, and what is known of its content."""

    path: str
    bytes: int | None = None
    sha256: str | None = None
    git_blob: str | None = None


@dataclass(frozen=True)
class Source:
    """One place to get an item from: `where` is a repository, a URL, a Drive id, a folder of data/, or a page."""

    kind: str
    where: str
    type: str = "dataset"
    revision: str | None = None
    include: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if self.kind == "hub":
            return f"hub {self.type} {self.where}" + (
                f" @ {self.revision[:12]}" if self.revision else ""
            )
        if self.kind == "url":
            return self.where.removesuffix(PATH).replace(PATH, "...")
        names = {
            "drive": "Google Drive file ",
            "bundled": "checkout, data/",
            "manual": "by hand, ",
        }
        return names.get(self.kind, "") + self.where


@dataclass(frozen=True)
class Tree:
    """What is known of a whole folder: its size and a digest of the digests of its files."""

    folder: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Item:
    """A part of a group that is fetched on its own; `layout` says what lies in the folder in the end."""

    name: str
    summary: str
    sources: tuple[Source, ...]
    files: tuple[File, ...] = ()
    layout: Mapping[str, int] | None = None
    tree: Tree | None = None
    unpack: bool = False
    optional: bool = False

    @property
    def bytes(self) -> int | None:
        """The size of what is downloaded or unpacked as far as it is known, None if nothing is."""
        if self.tree is not None:
            return self.tree.bytes
        return sum(file.bytes or 0 for file in self.files) or None

    @property
    def is_size_whole(self) -> bool:
        """Whether `bytes` counts every file."""
        return self.tree is not None or all(
            file.bytes is not None for file in self.files
        )


@dataclass(frozen=True)
class Group:
    """A data set or a family of models with its licence."""

    name: str
    summary: str
    licence: str
    terms: str
    homepage: str
    items: tuple[Item, ...]


def load_catalogue(extra: Path | None = None) -> dict[str, Group]:
    """Return the groups by name; groups of the user's own file override those of the same name.

    Raises DataError with every mistake of the file.
    """
    groups = _read(_BUILT_IN)
    return groups if extra is None else groups | _read(extra)


def find_group(
    name: str, groups: Mapping[str, Group]
) -> tuple[Group, tuple[Item, ...]]:
    """Return a group and the items meant by `group` or `group/item`.

    Raises UnknownName.
    """
    head, _, wanted = name.partition("/")
    if head not in groups:
        raise UnknownName(
            f"unknown group '{name}'{near_miss(head, groups)}",
            f"groups: {', '.join(groups)}",
        )
    group = groups[head]
    items = [item for item in group.items if wanted in ("", item.name)]
    if not items:
        names = [item.name for item in group.items]
        hint = f"items of {head}: {', '.join(names)}"
        raise UnknownName(f"{head}: no item '{wanted}'{near_miss(wanted, names)}", hint)
    return group, tuple(items)


def is_inside(path: str) -> bool:
    """Tell whether a path is relative, written with plain slashes, and stays in its folder."""
    parts = path.split("/")
    plain = (
        not any(c in path for c in "\\\0")
        and not PurePosixPath(path).is_absolute()
        and ":" not in parts[0]
    )
    return bool(path) and plain and not {"", ".", ".."} & set(parts)


def _read(path: Path) -> dict[str, Group]:
    """Read the groups of a file; every group that is wrong is named."""
    hint = f"the form is described at the top of {_BUILT_IN.name} in the package"
    entries = reading.read_yaml_object(path, hint=hint)
    problems: list[str] = []
    groups = {}
    for name in entries.values:
        try:
            groups[name] = _group(name, entries.record(name))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems, hint)
    return groups


def _group(name: str, entry: Record) -> Group:
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        entry.fail("", "a group is named with letters, digits and hyphens")
    entry.only("summary", "licence", "terms", "homepage", "items")
    items = entry.record("items")
    return Group(
        name,
        entry.text("summary", ""),
        entry.text("licence", ""),
        entry.text("terms", ""),
        entry.text("homepage", ""),
        tuple(_item(key, items.record(key)) for key in items.values),
    )


def _item(name: str, entry: Record) -> Item:
    if not is_inside(name) or "/" in name:
        entry.fail("", f"{name!r} is no name for an item")
    entry.only("summary", "sources", "files", "layout", "tree", "unpack", "optional")
    layout = entry.record("layout") if "layout" in entry else None
    item = Item(
        name,
        entry.text("summary", ""),
        tuple(_source(source) for source in entry.records("sources")),
        tuple(_file(file) for file in entry.records("files", [])),
        {key: layout.integer(key, low=1) for key in layout.values}
        if layout is not None
        else None,
        _tree(entry.record("tree")) if "tree" in entry else None,
        unpack=entry.flag("unpack", False),
        optional=entry.flag("optional", False),
    )
    if not item.sources or not (item.files or item.layout):
        entry.fail("", "needs sources, and files or a layout")
    patterns = [
        part.strip() for pattern in item.layout or () for part in pattern.split("|")
    ]
    for path in (*patterns, *(file.path for file in item.files)):
        if not is_inside(path):
            entry.fail("", f"{path!r} does not stay in the folder")
    return item


def _tree(entry: Record) -> Tree:
    folder = entry.text("folder")
    if not is_inside(folder):
        entry.fail("folder", f"{folder!r} does not stay in the folder")
    return Tree(folder, entry.integer("bytes", low=0), entry.text("sha256"))


def _file(entry: Record) -> File:
    entry.only("path", "bytes", *_DIGESTS)
    digests = {}
    for key, form in _DIGESTS.items():
        digest = entry.text(key, None)
        if digest is not None and not form.fullmatch(digest):
            entry.fail(key, f"{digest!r} is no {key}")
        digests[key] = digest
    path = entry.text("path")
    size = entry.integer("bytes", None, low=0)
    return File(path, size, **digests)


def _source(entry: Record) -> Source:
    kind = next((kind for kind in KINDS if kind in entry), None)
    if kind is None:
        entry.fail(
            "", f"a source is one of {', '.join(KINDS)}, not {', '.join(entry.values)}"
        )
    entry.only(kind, "type", "revision", "include", "note")
    where = entry.text(kind, empty=False)
    if kind == "url" and not where.startswith(("http://", "https://")):
        entry.fail(kind, f"{where!r} is no http address")
    if kind == "bundled" and not is_inside(where):
        entry.fail(kind, f"{where!r} leads out of the data that come along")
    type_ = entry.text("type", "dataset")
    if type_ not in ("dataset", "model"):
        entry.fail(
            "type", f"a repository of the hub is a dataset or a model, not {type_!r}"
        )
    return Source(
        kind,
        where,
        type_,
        entry.text("revision", None),
        tuple(entry.array("include", str, [])),
        entry.text("note", ""),
    )
