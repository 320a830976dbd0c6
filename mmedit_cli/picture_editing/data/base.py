"""Edit pairs: two pictures, the instruction between them, and what is known about both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmedit_cli.pictures import picture_digest


@dataclass(frozen=True)
class EditPair:
    """A picture, an instruction, and the picture it leads to.

    `source` and `target` load the pictures, upright and RGB, and raise DataError if they cannot be decoded.
    `expressive` is the instruction in detail, `plain` one that does not need the picture; `caption` and
    `target_caption` describe the pictures. All of these texts are empty if not known. `kind` is the sort of edit,
    `digest` one of the content, `place` the origin of the record. An edit was made if a `question` about the result is
    answered with `answer`.
    """

    uid: str
    instruction: str
    source: Callable[[], Image.Image]
    target: Callable[[], Image.Image]
    digest: str
    expressive: str = ""
    caption: str = ""
    target_caption: str = ""
    kind: str = ""
    place: str = ""
    question: str = ""
    answer: str = ""
    plain: str = ""


def fingerprint(pairs: Iterable[EditPair]) -> str:
    """Return a digest of all texts and of the content of all pictures."""
    digest = hashlib.sha256()
    for pair in pairs:
        facts = [
            pair.uid,
            pair.instruction,
            pair.expressive,
            pair.plain,
            pair.caption,
            pair.target_caption,
            pair.digest,
        ]
        digest.update(json.dumps(facts, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def picture_content(*paths: Path) -> str:
    """Return a digest of the content of some pictures; raise DataError for a file that is no picture."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(picture_digest(path)))
    return digest.hexdigest()[:16]
