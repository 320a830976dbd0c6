"""Parquet shards as the hub serves them: InstructPix2Pix (clip-filtered) and MagicBrush. Needs pyarrow."""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from mmedit_cli.errors import DataError, UserError
from mmedit_cli.picture_editing.data.base import EditPair
from mmedit_cli.pictures import upright_rgb
from mmedit_cli.reading import require_regular

# names of the columns: source, target, instruction, caption, target_caption
_LAYOUTS = (
    (
        "original_image",
        "edited_image",
        "edit_prompt",
        "original_prompt",
        "edited_prompt",
    ),
    ("source_img", "target_img", "instruction", "", ""),
    ("source", "target", "instruction", "caption", "target_caption"),
)


class ParquetShard:
    """One parquet file, read one row group at a time."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(
                f"{path}: pyarrow is not installed", "pip install pyarrow"
            ) from error
        self.path = path
        require_regular(path)  # pyarrow would wait for ever for a FIFO
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(
                f"{path}: not a readable parquet file ({error})", "download it again"
            ) from error
        names = set(self._file.schema_arrow.names)
        self.columns = self._layout(names)
        texts = [column for column in self.columns[2:] if column in names]
        self.texts = self._file.read(texts).to_pydict()
        self._ends: list[int] = []  # of the row groups
        end = 0
        for i in range(self._file.num_row_groups):
            end += self._file.metadata.row_group(i).num_rows
            self._ends.append(end)
        self._group = lru_cache(maxsize=1)(self._read_group)

    def _layout(self, names: set[str]) -> tuple[str, ...]:
        """Return the columns of the first layout that fits; raise DataError if there is none."""
        for layout in _LAYOUTS:
            if names.issuperset(layout[:3]):
                return layout
        known = [", ".join(layout[:3]) for layout in _LAYOUTS]
        raise DataError(
            f"{self.path}: its columns are {', '.join(sorted(names))}",
            f"known layouts: {'; '.join(known)}",
        )

    def _read_group(self, index: int) -> Any:
        return self._file.read_row_group(index, columns=list(self.columns[:2]))

    def data(self, row: int, column: int) -> bytes:
        """Return the file of a picture: column 0 is the source, 1 the target."""
        group = bisect_right(self._ends, row)
        start = self._ends[group - 1] if group else 0
        table = self._group(group)
        values = table.column(self.columns[column])
        value = values[row - start].as_py()
        if isinstance(value, dict):
            value = value["bytes"]
        return bytes(value)

    def picture(self, row: int, column: int) -> Image.Image:
        """Return a picture, upright and RGB; raise DataError if it cannot be decoded."""
        file = io.BytesIO(self.data(row, column))
        return upright_rgb(file, f"{self.path}: row {row}")


def pairs(folder: Path) -> list[EditPair]:
    """Return the pairs of all shards of a folder; raise UserError without pyarrow, DataError for unknown columns."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        shard = ParquetShard(path)
        instruction = shard.columns[2]
        for row in range(len(shard.texts[instruction])):
            found.append(_pair(shard, row))
    empty = [pair.place for pair in found if not pair.instruction]
    if empty:
        raise DataError([f"{place}: no instruction" for place in empty[:20]])
    return found


def _pair(shard: ParquetShard, row: int) -> EditPair:
    path = shard.path
    texts = []
    for column in shard.columns[2:]:
        values = shard.texts.get(column)
        texts.append(values[row] or "" if values else "")
    instruction, caption, target_caption = texts
    content = f"{path.name}/{path.stat().st_size}/{row}"
    return EditPair(
        uid=f"{path.stem}/{row}",
        instruction=str(instruction).strip(),
        source=partial(shard.picture, row, 0),
        target=partial(shard.picture, row, 1),
        digest=hashlib.sha256(content.encode()).hexdigest()[:16],
        caption=caption,
        target_caption=target_caption,
        place=f"{path}: row {row}",
    )
