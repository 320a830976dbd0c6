"""Edit pairs, and where they come from: a named set, a folder as InstructPix2Pix writes it, parquet shards, JSONL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.pictures import picture_digest

NAMED = ("emojikb-edits",)
_HELP = (
    "a name (emojikb-edits), a folder of ID/prompt.json with ID/*_0.jpg and *_1.jpg, a folder of .parquet files, "
    "or a .jsonl file"
)


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


def open_pairs(data: str | Path, *, limit: int | None = None) -> tuple[str, list[EditPair]]:
    """Return (name, pairs) in a fixed order, at most `limit`; pictures are looked for but not decoded.

    Raises DataError with every bad record (at most 20) and its place.
    """
    from mmedit_cli.image_pairs import emojikb_edits, ip2p, parquet, records

    path = Path(data)
    name, _, split = str(data).partition(":")
    if not path.exists() and name in NAMED:
        pairs = emojikb_edits.pairs(split)
        return str(data), pairs[:limit]
    if path.is_dir() and any(path.glob("*.parquet")):
        pairs = parquet.pairs(path)
    elif path.is_dir():
        pairs = ip2p.pairs(path)
    elif path.is_file() and path.suffix == ".jsonl":
        pairs = records.pairs(path)
    else:
        raise DataError(f"--data {data}: no edit pairs there{near_miss(name, NAMED)}", f"give {_HELP}")
    if not pairs:
        raise DataError(f"{data}: no edit pairs in it", f"give {_HELP}")
    return path.resolve().stem, pairs[:limit]


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


def file_digest(*paths: Path) -> str:
    """Return a digest of the content of some pictures; raise DataError for what is none."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(picture_digest(path)))
    return digest.hexdigest()[:16]
