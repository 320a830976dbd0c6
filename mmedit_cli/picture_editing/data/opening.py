"""Open edit pairs: a named set, a folder as InstructPix2Pix writes it, parquet shards, or JSONL."""

from __future__ import annotations

from pathlib import Path

from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.picture_editing.data.base import EditPair

NAMED = ("emojikb-edits",)


_HELP = (
    "a name (emojikb-edits), a folder of ID/prompt.json with ID/*_0.jpg and *_1.jpg, a folder of .parquet files, "
    "or a .jsonl file"
)


def open_pairs(
    data: str | Path, *, limit: int | None = None
) -> tuple[str, list[EditPair]]:
    """Return (name, pairs) in a fixed order, at most `limit`; pictures are looked for but not decoded.

    Raises DataError with every bad record (at most 20) and its place.
    """
    from mmedit_cli.picture_editing.data import emojikb_edits, ip2p, parquet, records

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
        raise DataError(
            f"--data {data}: no edit pairs there{near_miss(name, NAMED)}",
            f"give {_HELP}",
        )
    if not pairs:
        raise DataError(f"{data}: no edit pairs in it", f"give {_HELP}")
    return path.resolve().stem, pairs[:limit]
