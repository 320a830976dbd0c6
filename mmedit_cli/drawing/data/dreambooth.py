"""The data set of DreamBooth (Ruiz et al. 2023): 30 subjects, 158 photos, 25 prompts for objects and 25 for pets."""

from __future__ import annotations

import re
from pathlib import Path

from mmedit_cli.drawing.data.base import Subject, SubjectSet, photos_of
from mmedit_cli.errors import DataError
from mmedit_cli.reading import read_text
from mmedit_cli.registry import data_home
from mmedit_cli.types import Concept

_LIST = "prompts_and_classes.txt"
_AGAIN = "download it again: mmedit download dreambooth"
LIVE = ("cat", "dog")


def is_release(folder: Path) -> bool:
    """Whether a folder holds the release."""
    return (folder / _LIST).is_file()


def locate(root: Path | None) -> Path:
    """Return the folder of the release: `root`, or the folder of downloads; raise DataError if it is missing."""
    home = root or data_home()
    tried = [
        home / "dreambooth" / "dataset",
        home / "dreambooth",
        home / "dataset",
        home,
    ]
    for folder in tried:
        if is_release(folder):
            return folder
    raise DataError(
        f"--data dreambooth: no {_LIST} in {home} or {home / 'dreambooth'}",
        "mmedit download dreambooth, or name its folder with --root",
    )


def read(folder: Path) -> SubjectSet:
    """Return the subjects of the release with its prompts; raise DataError for a list that cannot be read."""
    path = folder / _LIST
    text = read_text(path, limit=1 << 20, hint=_AGAIN)
    classes = dict(
        re.findall(
            r"^([a-z0-9_]+),([a-z ]+?)\s*$",
            text,
            re.MULTILINE,
        )
    )
    classes.pop("subject_name", None)
    first, _, second = text.partition("Live Subject Prompts")
    of_objects = _prompts_in(first)
    of_pets = _prompts_in(second)
    complete = classes and of_objects and of_pets
    if not complete or any(
        prompt.count("{}") != 1 for prompt in (*of_objects, *of_pets)
    ):
        raise DataError(f"{path}: not the list of the release", _AGAIN)
    photos = photos_of(folder, list(classes))
    subjects = []
    for name, superclass in classes.items():
        concept = Concept(f"<{name}>", superclass, photos[name])
        subjects.append(Subject(name, concept))
    return SubjectSet(
        "dreambooth",
        tuple(subjects),
        generality=of_objects,
        special=dict.fromkeys(LIVE, of_pets),
    )


def _prompts_in(part: str) -> tuple[str, ...]:
    """Return the prompts of a part of the list, with `{}` where it has two placeholders."""
    templates = re.findall(r"'(.*?)'\.format", part)
    return tuple(template.replace("{0} {1}", "{}") for template in templates)
