"""The file name is the public name: `editors/multi_melo.py` is the editor `multi-melo`.

Listing names and summaries reads the folder only; a module (and torch with it) is imported when it is asked for.
"""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from mmedit_cli.errors import UnknownName, near_miss

T = TypeVar("T")


class Registry(Generic[T]):
    """The modules of `package`, each of which offers one thing under the name `attribute`.

    `base` and modules that start with an underscore are shared parts and have no public name.
    """

    def __init__(self, package: str, attribute: str) -> None:
        self.package = package
        self.attribute = attribute

    def names(self) -> list[str]:
        """List the public names, sorted."""
        modules = (module.name for module in pkgutil.iter_modules(self._folders()))
        return sorted(name.replace("_", "-") for name in modules if name != "base" and not name.startswith("_"))

    def get(self, name: str) -> T:
        """Import the module behind a name, written with hyphens or underscores, and return what it offers.

        Raises UnknownName.
        """
        return cast(T, getattr(importlib.import_module(f"{self.package}.{self._module(name)}"), self.attribute))

    def summary(self, name: str) -> str:
        """Return the first line of the module's docstring without importing the module.

        Raises UnknownName.
        """
        spec = PathFinder.find_spec(f"{self.package}.{self._module(name)}", self._folders())
        if spec is None or spec.origin is None:
            return ""
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
        return (docstring or "").partition("\n")[0]

    def _folders(self) -> list[str]:
        spec = find_spec(self.package)  # imports the parent package only
        return list(spec.submodule_search_locations or ()) if spec else []

    def _module(self, name: str) -> str:
        public, names = name.replace("_", "-"), self.names()
        if public not in names:
            raise _unknown(self.attribute.lower().replace("_", " "), name, names)
        return public.replace("-", "_")


def _unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    meant = near_miss(name.replace("_", "-"), known)
    return UnknownName(f"unknown {kind} '{name}'{meant}", f"{kind}s: {', '.join(known)}")


editors: Registry[Any] = Registry("mmedit_cli.editors", "EDITOR")
personalizers: Registry[Any] = Registry("mmedit_cli.personalizers", "PERSONALIZER")
image_editors: Registry[Any] = Registry("mmedit_cli.image_editors", "IMAGE_EDITOR")
backbones: Registry[Any] = Registry("mmedit_cli.backbones", "BACKBONE")
datasets: Registry[Any] = Registry("mmedit_cli.datasets", "DATASET")


def kind_of(name: str, *kinds: Registry[Any]) -> Registry[Any]:
    """Return which registry of editors, or of `kinds`, has a name; raise UnknownName with the names of all of them."""
    kinds = kinds or (editors, image_editors, personalizers)
    public = name.replace("_", "-")
    known = {known: kind for kind in kinds for known in kind.names()}
    if public not in known:
        raise _unknown("editor", name, known)
    return known[public]


_PACKAGE = Path(__file__).resolve().parent


def share_dir(name: str) -> Path:
    """Return the folder `name` ("hparams", "data", ...) of the checkout, or its copy inside an installed package."""
    checkout = _PACKAGE.parent  # site-packages when installed, where a folder of that name is somebody else's
    found = (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir()
    return checkout / name if found else _PACKAGE / "share" / name


@cache
def emojikb_dir() -> Path:
    """Return the folder of EmojiKB with its pictures unpacked: for who opens them, not for who lists what is there."""
    from mmedit_cli.packed import unpack_beside

    folder = share_dir("data") / "emojikb"
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
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mmedit").expanduser()
