"""Methods, model families and data sets of others: files that are named, and entry points of installed packages.

Nothing is imported here before it is asked for; names and summaries are read from the sources.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mmedit_cli.errors import UserError

VARIABLE = "MMEDIT_PLUGINS"  # files, separated as in PATH
_HELP = "see examples/ and CONTRIBUTING.md"


@dataclass(frozen=True)
class Source:
    """Where something with a public name comes from.

    `module` is imported, or `file` where there is no module of that name; `attribute` is what is taken from it.
    `origin` is how a message calls a plug-in, empty for what belongs to mmedit. `file` is None if it was not found.
    """

    attribute: str
    file: Path | None
    module: str = ""
    origin: str = ""

    @property
    def tree(self) -> ast.Module:
        """The syntax tree of the source."""
        return syntax_tree(self.file)

    def load(self) -> Any:
        """Import the source and return what it offers; raise UserError if a plug-in cannot be imported."""
        if not self.origin:
            return getattr(importlib.import_module(self.module), self.attribute)
        try:
            module = self._import()
            return getattr(module, self.attribute)
        except Exception as error:  # whatever the code of others raises
            problem = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self.origin}: cannot be imported: {problem}",
                "--debug shows where",
            ) from error

    def _import(self) -> ModuleType:
        if self.module:
            return importlib.import_module(self.module)
        assert self.file is not None
        return _import_file(self.file)


@contextmanager
def named_on_command_line(files: Sequence[Path]) -> Iterator[None]:
    """Add files to those of MMEDIT_PLUGINS, for this process and those that it starts."""
    before = os.environ.get(VARIABLE)
    every = [*(before or "").split(os.pathsep), *map(str, files)]
    try:
        if files:
            os.environ[VARIABLE] = os.pathsep.join(name for name in every if name)
        yield
    finally:
        if files and before is None:
            os.environ.pop(VARIABLE, None)
        elif files and before is not None:
            os.environ[VARIABLE] = before


def plugin_files() -> list[Path]:
    """Return the files that are named as plug-ins; raise UserError for one that is not there or is no Python."""
    names = os.environ.get(VARIABLE, "").split(os.pathsep)
    files = [Path(name).resolve() for name in dict.fromkeys(names) if name]
    for file in files:
        if file.suffix != ".py" or not file.is_file():
            raise UserError(f"--plugin {file}: no such file of Python", _HELP)
        _check_syntax(file)
    return files


def plugin_sources(group: str, attribute: str) -> list[tuple[str, Source]]:
    """Return (public name, source) of every plug-in that offers an attribute, or stands in a group of entry points."""
    found = []
    for name, value in _entry_points(group, tuple(sys.path)):
        module, _, own_attribute = value.partition(":")
        origin = f"entry point {name} of {group} ({value})"
        file = file_of_module(module)
        found.append((name, Source(own_attribute or attribute, file, module, origin)))
    for file in plugin_files():
        if attribute in offered_names(syntax_tree(file)):
            found.append((file.stem, Source(attribute, file, "", f"plug-in {file}")))
    return found


def check_plugins(attributes: Sequence[str]) -> None:
    """Raise UserError for a file that offers none of the attributes."""
    for file in plugin_files():
        if not offered_names(syntax_tree(file)) & set(attributes):
            raise UserError(
                f"--plugin {file}: offers none of {', '.join(attributes)}", _HELP
            )


def offered_names(tree: ast.Module) -> set[str]:
    """Return the names that a module assigns or imports at its top."""
    names: set[str] = set()
    for node in tree.body:
        names.update(assigned_names(node))
        if isinstance(node, ast.ImportFrom):  # of a method that is a folder
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def assigned_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement assigns."""
    targets: list[Any] = [getattr(node, "target", None)]
    if isinstance(node, ast.Assign):
        targets = [*node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def file_of_module(module: str) -> Path | None:
    """Return the source of a module, importing nothing; None if it is not found, or not written in Python."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not parts:
        origin = Path(spec.origin or "")
        return origin if origin.suffix == ".py" and origin.is_file() else None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *parts)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def syntax_tree(file: Path | None) -> ast.Module:
    """Return the syntax tree of a source, an empty one where there is no file."""
    if file is None:
        return ast.Module([], [])
    return _parse(file, file.stat().st_mtime_ns)


@cache
def _parse(file: Path, changed: int) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _check_syntax(file: Path) -> None:
    try:
        syntax_tree(file)
    except SyntaxError as error:
        raise UserError(
            f"--plugin {file}:{error.lineno}: {error.msg}", _HELP
        ) from error
    except ValueError as error:  # not UTF-8, or with null bytes
        raise UserError(f"--plugin {file}: {error}", _HELP) from error


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (name, value) of the entry points of a group; `path` is where packages are looked for."""
    return [(entry.name, entry.value) for entry in entry_points(group=group)]


def _import_file(file: Path) -> ModuleType:
    """Import a file under a name that belongs to its place and content."""
    digest = hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()
    name = f"mmedit_plugin_{file.stem}_{digest[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
