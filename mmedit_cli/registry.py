"""The file name is the public name: `knowledge/methods/multi_melo` is the editor `multi-melo`.

Listing names and summaries reads the folder only; a module (and torch with it) is imported when it is asked for.
"""

from __future__ import annotations

import ast
import hashlib
import os
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from mmedit_cli.errors import MmeditError, UnknownName, UserError, near_miss
from mmedit_cli.plugins import (
    Source,
    assigned_names,
    check_plugins,
    file_of_module,
    named_on_command_line,
    offered_names,
    plugin_sources,
    syntax_tree,
)

T = TypeVar("T")


class Registry(Generic[T]):
    """The modules of `package`, each of which offers one thing under the name `attribute`; and those of plug-ins.

    `base`, modules that start with an underscore, and modules that do not offer it are shared parts and have no public
    name. `group` is that of the entry points of other packages.
    """

    def __init__(self, package: str, attribute: str, group: str = "") -> None:
        self.package = package
        self.attribute = attribute
        self.group = group

    def names(self) -> list[str]:
        """List the public names, sorted; raise UserError for a plug-in that cannot be read."""
        return sorted(self._sources())

    def get(self, name: str) -> T:
        """Import the module behind a name, written with hyphens or underscores, and return what it offers.

        Raises UnknownName, or UserError for a plug-in that cannot be imported.
        """
        return cast(T, self._source(name).load())

    def summary(self, name: str) -> str:
        """Return the first line of the module's docstring without importing the module.

        Raises UnknownName.
        """
        tree = self._source(name).tree
        return (ast.get_docstring(tree) or "").partition("\n")[0]

    def fact(self, name: str, attribute: str) -> Any:
        """Return a plain class attribute (`trains = True`) of what is offered under a name, importing nothing.

        It may be inherited from a class of another module; None where no class assigns it. Raises UnknownName.
        """
        source = self._source(name)
        return _class_attribute(source.tree, source.attribute, attribute)

    def plugins(self) -> dict[str, Source]:
        """Return what others offer, by public name; raise UserError for a name that there is already."""
        if not self.group:
            return {}
        offered = plugin_sources(self.group, self.attribute)
        own = self._own_sources() if offered else {}
        found: dict[str, Source] = {}
        for name, source in offered:
            public = _public(name)
            if public in own or public in found:
                kind = self.attribute.lower().replace("_", " ")
                raise UserError(
                    f"{source.origin}: another {kind} is called {public} already",
                    "give it another name",
                )
            found[public] = source
        return found

    def _own_sources(self) -> dict[str, Source]:
        found = {}
        for module in pkgutil.iter_modules(self._folders()):
            dotted = f"{self.package}.{module.name}"
            source = Source(self.attribute, file_of_module(dotted), dotted)
            shared = module.name == "base" or module.name.startswith("_")
            if not shared and self.attribute in offered_names(source.tree):
                found[_public(module.name)] = source
        return found

    def _sources(self) -> dict[str, Source]:
        return {**self._own_sources(), **self.plugins()}

    def _source(self, name: str) -> Source:
        sources = self._sources()
        if _public(name) not in sources:
            kind = self.attribute.lower().replace("_", " ")
            raise _unknown(kind, name, sorted(sources))
        return sources[_public(name)]

    def _folders(self) -> list[str]:
        spec = find_spec(self.package)  # imports the parent package only
        return list(spec.submodule_search_locations or ()) if spec else []


def _public(name: str) -> str:
    """Return the public name of a module."""
    return name.replace("_", "-")


def _class_attribute(tree: ast.Module, name: str, attribute: str) -> Any:
    """Return a literal that the class called `name` in a module assigns to an attribute, or one of its bases."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    origin = syntax_tree(file_of_module(node.module))
                    return _class_attribute(origin, alias.name, attribute)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            if name in assigned_names(node) and node.value is not None:
                return _class_attribute(tree, ast.unparse(node.value), attribute)
        elif isinstance(node, ast.ClassDef) and node.name == name:
            return _own_attribute(tree, node, attribute)
    return None


def _own_attribute(tree: ast.Module, node: ast.ClassDef, attribute: str) -> Any:
    for statement in node.body:
        value = getattr(statement, "value", None)
        if attribute in assigned_names(statement) and value is not None:
            try:
                return ast.literal_eval(value)
            except ValueError:  # computed: not known without an import
                return None
    for base in node.bases:
        inherited = _class_attribute(tree, ast.unparse(base), attribute)
        if inherited is not None:
            return inherited
    return None


def _unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    meant = near_miss(_public(name), known)
    return UnknownName(
        f"unknown {kind} '{name}'{meant}", f"{kind}s: {', '.join(known)}"
    )


editors: Registry[Any] = Registry(
    "mmedit_cli.knowledge.methods", "EDITOR", "mmedit.editors"
)
personalizers: Registry[Any] = Registry(
    "mmedit_cli.drawing.methods", "PERSONALIZER", "mmedit.personalizers"
)
concept_editors: Registry[Any] = Registry(
    "mmedit_cli.drawing.methods", "CONCEPT_EDITOR", "mmedit.concept_editors"
)
image_editors: Registry[Any] = Registry(
    "mmedit_cli.picture_editing.methods", "IMAGE_EDITOR", "mmedit.image_editors"
)
backbones: Registry[Any] = Registry(
    "mmedit_cli.knowledge.models", "BACKBONE", "mmedit.models"
)
drawing_models: Registry[Any] = Registry("mmedit_cli.drawing.models", "BACKBONE")
datasets: Registry[Any] = Registry(
    "mmedit_cli.knowledge.data", "DATASET", "mmedit.datasets"
)
METHODS = (editors, personalizers, concept_editors, image_editors)
EXTENSIBLE = (*METHODS, backbones, datasets)


@contextmanager
def use_plugins(files: Sequence[Path]) -> Iterator[None]:
    """Use plug-in files, beside those of MMEDIT_PLUGINS; raise UserError for one that offers nothing."""
    with named_on_command_line(files):
        check_plugins([registry.attribute for registry in EXTENSIBLE])
        yield


def registry_of(name: str, registries: Sequence[Registry[Any]]) -> Registry[Any]:
    """Return which of some registries of methods has a name; raise UnknownName with the names of all of them."""
    public = _public(name)
    known = {known: found for found in registries for known in found.names()}
    if public not in known:
        raise _unknown("editor", name, known)
    return known[public]


_PACKAGE = Path(__file__).resolve().parent


def share_dir(name: str) -> Path:
    """Return the folder `name` ("hparams", "data", ...) of the checkout, or its copy inside an installed package."""
    checkout = (
        _PACKAGE.parent
    )  # site-packages when installed, where a folder of that name is somebody else's
    found = (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir()
    return checkout / name if found else _PACKAGE / "share" / name


@cache
def emojikb_home() -> Path:
    """Return the folder of EmojiKB, where its pictures can be unpacked.

    In a checkout that is the folder of the checkout. An installed package is left as it was installed, and so is a
    checkout that cannot be written to: there it is a copy in the user's cache folder.
    """
    from mmedit_cli.packed import mirror

    shipped = share_dir("data") / "emojikb"
    if not shipped.is_relative_to(_PACKAGE) and os.access(shipped, os.W_OK):
        return shipped
    manifest = shipped / "manifest.json"
    version = (
        hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
        if manifest.is_file()
        else "none"
    )
    copy = cache_dir() / f"emojikb-{version}"
    try:
        mirror(shipped, copy)
    except (
        OSError,
        MmeditError,
    ):  # no place to unpack in: what needs no picture still works
        return shipped
    return copy


@cache
def emojikb_dir() -> Path:
    """Return the folder of EmojiKB with its pictures unpacked. Code that opens no picture uses `emojikb_home`."""
    from mmedit_cli.packed import unpack_beside

    folder = emojikb_home()
    unpack_beside(folder)
    return folder


def hparams_file(editor: str) -> Path:
    """Return where the published hyper-parameters of a method are: a file named like its module.

    That of a plug-in lies beside its source.
    """
    name = f"{editor.replace('-', '_')}.yaml"
    for methods in METHODS:
        source = methods.plugins().get(_public(editor))
        if source is not None and source.file is not None:
            return source.file.with_name(name)
    return share_dir("hparams") / name


def data_home() -> Path:
    """Return the folder of downloaded data: $MMEDIT_DATA, else data in the cache folder."""
    own = os.environ.get("MMEDIT_DATA")
    return Path(own).expanduser() if own else cache_dir() / "data"


def cache_dir() -> Path:
    """Return the cache folder: $MMEDIT_CACHE, else `mmedit` in the user's cache folder."""
    own = os.environ.get("MMEDIT_CACHE")
    return Path(
        own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mmedit"
    ).expanduser()
