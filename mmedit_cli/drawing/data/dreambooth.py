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
LIVE = ("cat", "dog")


def is_release(folder: Path) -> bool:
    """Whether a folder holds the release."""
    return (folder / _LIST).is_file()


def locate(root: Path | None) -> Path:
    """Return the folder of the release: `root`, or where it is downloaded to; raise DataError if it is not there."""
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
    raise DataError(f"--data dreambooth: no {_LIST} in {home} or {home / 'dreambooth'}",
                    "mmedit download dreambooth, or name its folder with --root")  # fmt: skip


def read(folder: Path) -> SubjectSet:
    """Return the subjects of the release with its prompts; raise DataError for a list that cannot be read."""
    path = folder / _LIST
    text = read_text(
        path, limit=1 << 20, hint="download it again: mmedit download dreambooth"
    )
    classes = dict(re.findall(r"^([a-z0-9_]+),([a-z ]+?)\s*$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    objects, _, live = text.partition("Live Subject Prompts")
    prompts = [tuple(p.replace("{0} {1}", "{}") for p in re.findall(r"'(.*?)'\.format", part))
               for part in (objects, live)]  # fmt: skip
    if (
        not classes
        or not all(prompts)
        or any(p.count("{}") != 1 for part in prompts for p in part)
    ):
        raise DataError(
            f"{path}: not the list of the release",
            "download it again: mmedit download dreambooth",
        )
    photos = photos_of(folder, list(classes))
    subjects = tuple(
        Subject(name, Concept(f"<{name}>", kind, photos[name]))
        for name, kind in classes.items()
    )
    return SubjectSet(
        "dreambooth",
        subjects,
        generality=prompts[0],
        special=dict.fromkeys(LIVE, prompts[1]),
    )
