"""The kinds of methods there are; `eval`, `edit`, `train-editor`, `edits`, `list` and `doctor` look them up here."""

from __future__ import annotations

from pathlib import Path

from mmedit_cli import registry
from mmedit_cli.kinds.base import Kind
from mmedit_cli.kinds.concept_editing import CONCEPT_EDITING
from mmedit_cli.kinds.drawing import DRAWING
from mmedit_cli.kinds.knowledge import KNOWLEDGE
from mmedit_cli.kinds.picture_editing import PICTURE_EDITING

KINDS = (KNOWLEDGE, DRAWING, CONCEPT_EDITING, PICTURE_EDITING)


def kinds_with(command: str) -> list[Kind]:
    """Return the kinds that a command knows."""
    return [kind for kind in KINDS if command in kind.commands]


def kind_of_method(name: str, command: str) -> Kind:
    """Return the kind of a method; raise UnknownName if no kind that the command knows has one of that name."""
    by_registry = {kind.registry: kind for kind in kinds_with(command)}
    return by_registry[registry.registry_of(name, list(by_registry))]


def kind_of_folder(folder: Path, command: str) -> Kind:
    """Return the kind of the edits in a folder, the first kind where there are none.

    A kind that the command does not know is left out.
    """
    kinds = kinds_with(command)
    for kind in kinds:
        if kind.has_edits(folder):
            return kind
    return kinds[0]


def kind_of_data(data: str) -> Kind:
    """Return the kind that data of that name, or in that folder or file, are for."""
    for kind in KINDS:
        if kind.has_data(data):
            return kind
    return KNOWLEDGE
