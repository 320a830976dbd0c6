"""What the command line knows about one kind of method: where its methods are found, and what each command does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli.registry import Registry

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.data.shared.audit import Finding

Command = Callable[..., None]


@dataclass(frozen=True)
class Noun:
    """What a thing is called: "an editor", "editors"."""

    one: str
    many: str


@dataclass(frozen=True)
class Kind:
    """One kind of method, such as the editors of knowledge.

    method: what its methods are called. folder: what a folder with its edits is called.
    registry: where its methods are found.
    commands: by name of the command ("eval", "edits undo"), a function for typer. Its parameters are the options that
    mean something for this kind. A command that is missing here does not know the kind.
    list_row: what `mmedit list` says of a method. list_data: its data sets in `mmedit list`.
    has_edits: whether a folder holds edits of this kind.
    has_data: whether data of that name are for this kind. check_data: audits such data.
    """

    method: Noun
    folder: Noun
    registry: Registry[Any]
    commands: Mapping[str, Command]
    list_row: Callable[[str], dict[str, str]]
    list_data: Callable[[], list[dict[str, str]]]
    has_edits: Callable[[Path], bool]
    has_data: Callable[[str], bool]
    check_data: Callable[[str, DataOptions], Iterable[Finding]]
