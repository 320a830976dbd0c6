"""The catalogue: which groups there are, what each consists of, and where it can be had."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mmedit_cli.errors import DataError, UnknownName, near_miss

KINDS = ("hub", "url", "drive", "bundled", "manual")
_BUILT_IN = Path(__file__).with_name("catalogue.yaml")
_DIGESTS = {"sha256": re.compile(r"[0-9a-f]{64}"), "git_blob": re.compile(r"[0-9a-f]{40}")}


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
            return f"hub {self.type} {self.where}" + (f" @ {self.revision[:12]}" if self.revision else "")
        names = {"drive": "Google Drive file ", "bundled": "checkout, data/", "manual": "by hand, "}
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
        return self.tree is not None or all(file.bytes is not None for file in self.files)


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
    """Return the groups by name; those of a file of the user come on top.

    Raises DataError with every mistake of the file.
    """
    groups = _read(_BUILT_IN)
    return groups if extra is None else groups | _read(extra)


def find_group(name: str, groups: Mapping[str, Group]) -> tuple[Group, tuple[Item, ...]]:
    """Return a group and the items meant by `group` or `group/item`.

    Raises UnknownName.
    """
    head, _, wanted = name.partition("/")
    if head not in groups:
        raise UnknownName(f"unknown group '{name}'{near_miss(head, groups)}", f"groups: {', '.join(groups)}")
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
    plain = not any(c in path for c in "\\\0") and not PurePosixPath(path).is_absolute() and ":" not in parts[0]
    return bool(path) and plain and not {"", ".", ".."} & set(parts)


def _read(path: Path) -> dict[str, Group]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path}: not a mapping of groups")
    problems: list[str] = []
    groups = {}
    for name, entry in raw.items():
        try:
            groups[str(name)] = _group(str(name), entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            problems.append(f"{path}: {name}: {what}")
    if problems:
        raise DataError(problems, f"the form is described at the top of {_BUILT_IN.name} in the package")
    return groups


def _group(name: str, entry: Mapping[str, Any]) -> Group:
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ValueError("a group is named with letters, digits and hyphens")
    items = tuple(_item(str(key), value) for key, value in entry["items"].items())
    text = {key: str(entry.get(key, "")) for key in ("summary", "licence", "terms", "homepage")}
    return Group(name, items=items, **text)


def _item(name: str, entry: Mapping[str, Any]) -> Item:
    tree = entry.get("tree")
    item = Item(
        name,
        str(entry.get("summary", "")),
        tuple(_source(source) for source in entry["sources"]),
        tuple(_file(file) for file in entry.get("files", ())),
        {str(k): int(v) for k, v in entry["layout"].items()} if "layout" in entry else None,
        Tree(str(tree["folder"]), int(tree["bytes"]), str(tree["sha256"])) if tree else None,
        unpack=bool(entry.get("unpack", False)),
        optional=bool(entry.get("optional", False)),
    )
    if not is_inside(name) or "/" in name:
        raise ValueError(f"{name!r} is no name for an item")
    if not item.sources or not (item.files or item.layout):
        raise ValueError(f"{name}: needs sources, and files or a layout")
    paths = [part.strip() for pattern in item.layout or () for part in pattern.split("|")]
    for path in (*paths, *(file.path for file in item.files)):
        if not is_inside(path):
            raise ValueError(f"{name}: {path!r} does not stay in the folder")
    return item


def _file(entry: Mapping[str, Any]) -> File:
    known = File(str(entry["path"]), entry.get("bytes"), entry.get("sha256"), entry.get("git_blob"))
    for key, form in _DIGESTS.items():
        digest = getattr(known, key)
        if digest is not None and not form.fullmatch(str(digest)):
            raise ValueError(f"{known.path}: {digest!r} is no {key}")
    return known


def _source(entry: Mapping[str, Any]) -> Source:
    kind = next((kind for kind in KINDS if kind in entry), None)
    if kind is None:
        raise ValueError(f"a source is one of {', '.join(KINDS)}, not {', '.join(map(str, entry))}")
    if kind == "url" and not str(entry["url"]).startswith(("http://", "https://")):
        raise ValueError(f"{entry['url']!r} is no http address")
    return Source(
        kind,
        str(entry[kind]),
        str(entry.get("type", "dataset")),
        entry.get("revision"),
        tuple(map(str, entry.get("include", ()))),
        str(entry.get("note", "")),
    )
