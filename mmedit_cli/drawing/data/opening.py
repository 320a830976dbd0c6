"""Open a set of subjects: by its name, the DreamBooth release, or a folder with a subjects.yaml."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmedit_cli.drawing.data.base import SubjectSet
from mmedit_cli.errors import DataError, near_miss

NAMED = ("dreambooth", "emojikb-concepts")


_HELP = f"give {', '.join(NAMED)}, the folder of the DreamBooth release, or a folder with a subjects.yaml"


def open_subjects(
    data: str,
    *,
    root: Path | None = None,
    model: Path | None = None,
    limit: int | None = None,
) -> SubjectSet:
    """Return the subjects of a name or folder, at most `limit`; photos are looked for but not decoded.

    `root` is the folder of a published set, if it is not the one it is downloaded to. The folder of the `model` lists
    the concepts that it was not trained on. Raises DataError with all that is wrong.
    """
    from mmedit_cli.drawing.data import dreambooth, emojikb_concepts, folder

    path = Path(data)
    if path.is_dir():
        read = dreambooth.read if dreambooth.is_release(path) else folder.read
        found = read(path)
    elif data == "dreambooth":
        found = dreambooth.read(dreambooth.locate(root))
    elif data == "emojikb-concepts":
        found = emojikb_concepts.read(model)
    else:
        raise DataError(
            f"--data {data}: no subjects there{near_miss(data, NAMED)}", _HELP
        )
    return replace(found, subjects=found.subjects[:limit])
