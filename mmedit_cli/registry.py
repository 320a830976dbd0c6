"""The file name is the public name: `knowledge/methods/multi_melo` is the editor `multi-melo`.

Listing names and summaries reads the folder only; a module (and torch with it) is imported when it is asked for.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import pkgutil
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from mmedit_cli.errors import MmeditError, UnknownName, near_miss

T = TypeVar("T")


class Registry(Generic[T]):
    """The modules of `package`, each of which offers one thing under the name `attribute`.

    `base`, modules that start with an underscore, and modules that do not offer it are shared parts and have no public
    name.
    """

    def __init__(self, package: str, attribute: str) -> None:
        self.package = package
        self.attribute = attribute

    def names(self) -> list[str]:
        """List the public names, sorted."""
        modules = [module.name for module in pkgutil.iter_modules(self._folders())]
        public = [
            name
            for name in modules
            if name != "base" and not name.startswith("_") and self._offers(name)
        ]
        return sorted(name.replace("_", "-") for name in public)

    def get(self, name: str) -> T:
        """Import the module behind a name, written with hyphens or underscores, and return what it offers.

        Raises UnknownName.
        """
        return cast(
            T,
            getattr(
                importlib.import_module(f"{self.package}.{self._module(name)}"),
                self.attribute,
            ),
        )

    def summary(self, name: str) -> str:
        """Return the first line of the module's docstring without importing the module.

        Raises UnknownName.
        """
        tree = _tree(f"{self.package}.{self._module(name)}")
        return (ast.get_docstring(tree) or "").partition("\n")[0]

    def fact(self, name: str, attribute: str) -> Any:
        """Return a plain class attribute (`trains = True`) of what is offered under a name, importing nothing.

        It may be inherited from a class of this project; None where no class assigns it. Raises UnknownName.
        """
        return _class_attribute(
            f"{self.package}.{self._module(name)}", self.attribute, attribute
        )

    def _offers(self, module: str) -> bool:
        """Tell whether a module assigns or imports the attribute."""
        names: set[str] = set()
        for node in _tree(f"{self.package}.{module}").body:
            names.update(_assigned(node))
            if isinstance(node, ast.ImportFrom):  # of a method that is a folder
                names.update(alias.asname or alias.name for alias in node.names)
        return self.attribute in names

    def _folders(self) -> list[str]:
        spec = find_spec(self.package)  # imports the parent package only
        return list(spec.submodule_search_locations or ()) if spec else []

    def _module(self, name: str) -> str:
        public, names = name.replace("_", "-"), self.names()
        if public not in names:
            raise _unknown(self.attribute.lower().replace("_", " "), name, names)
        return public.replace("-", "_")


@cache
def _tree(module: str) -> ast.Module:
    """Return the syntax tree of a module, importing nothing but the package at its top."""
    top, *parts = module.split(".")
    spec = find_spec(top)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, *parts)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
    return ast.Module([], [])


def _assigned(node: ast.stmt) -> list[str]:
    """Return the names that a statement assigns."""
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [getattr(node, "target", None)]
    )
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _class_attribute(module: str, name: str, attribute: str) -> Any:
    """Return a literal that the class called `name` in a module assigns to an attribute, or one of its bases."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _class_attribute(node.module, alias.name, attribute)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
            return (
                _class_attribute(module, ast.unparse(node.value), attribute)
                if node.value
                else None
            )
        elif isinstance(node, ast.ClassDef) and node.name == name:
            return _own_attribute(module, node, attribute)
    return None


def _own_attribute(module: str, node: ast.ClassDef, attribute: str) -> Any:
    for statement in node.body:
        value = getattr(statement, "value", None)
        if attribute in _assigned(statement) and isinstance(value, ast.Constant):
            return value.value
    inherited = (
        _class_attribute(module, ast.unparse(base), attribute) for base in node.bases
    )
    return next((found for found in inherited if found is not None), None)


def _unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    meant = near_miss(name.replace("_", "-"), known)
    return UnknownName(
        f"unknown {kind} '{name}'{meant}", f"{kind}s: {', '.join(known)}"
    )


editors: Registry[Any] = Registry("mmedit_cli.knowledge.methods", "EDITOR")
personalizers: Registry[Any] = Registry("mmedit_cli.drawing.methods", "PERSONALIZER")
image_editors: Registry[Any] = Registry(
    "mmedit_cli.picture_editing.methods", "IMAGE_EDITOR"
)
backbones: Registry[Any] = Registry("mmedit_cli.knowledge.models", "BACKBONE")
drawing_models: Registry[Any] = Registry("mmedit_cli.drawing.models", "BACKBONE")
datasets: Registry[Any] = Registry("mmedit_cli.knowledge.data", "DATASET")


def registry_of(name: str, registries: Sequence[Registry[Any]]) -> Registry[Any]:
    """Return which of some registries of methods has a name; raise UnknownName with the names of all of them."""
    public = name.replace("_", "-")
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
    """Return the folder of EmojiKB with its pictures unpacked: for code that opens them, not for a list of them."""
    from mmedit_cli.packed import unpack_beside

    folder = emojikb_home()
    unpack_beside(folder)
    return folder


def hparams_file(editor: str) -> Path:
    """Return where the published hyper-parameters of an editor are: a file named like its module."""
    return share_dir("hparams") / f"{editor.replace('-', '_')}.yaml"


def data_home() -> Path:
    """Return the folder of downloaded data: $MMEDIT_DATA, else data in the cache folder."""
    own = os.environ.get("MMEDIT_DATA")
    return Path(own).expanduser() if own else cache_dir() / "data"


def cache_dir() -> Path:
    """Return the folder for what can be made again: $MMEDIT_CACHE, else mmedit in the user's cache folder."""
    own = os.environ.get("MMEDIT_CACHE")
    return Path(
        own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mmedit"
    ).expanduser()
