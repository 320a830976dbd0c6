"""Edit pairs, and where they come from: a named set, a folder as InstructPix2Pix writes it, parquet shards, JSONL."""

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

    `source` and `target` load them, upright and RGB, and raise DataError if they cannot be decoded. `expressive` is
    the instruction spelled out, `plain` one for who does not see the picture; `caption` and `target_caption` say what
    is on the pictures: all empty if not known. `kind` is the sort of edit; `digest` stands for the content; `place`
    says where the record came from. What tells whether an edit was made, if anything does, is the `answer` to a
    `question` about the result.
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
    """Return a digest of the content of some pictures; raise DataError for what is none."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(picture_digest(path)))
    return digest.hexdigest()[:16]
