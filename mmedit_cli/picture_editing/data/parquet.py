"""Parquet shards as the hub serves them: InstructPix2Pix (clip-filtered) and MagicBrush. Needs pyarrow."""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from functools import lru_cache, partial
from itertools import accumulate
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


class Shard:
    """One parquet file, of which a row group at a time is in memory."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(
                f"{path}: pyarrow is not installed", "pip install pyarrow"
            ) from error
        self.path = path
        require_regular(path)  # of a FIFO pyarrow would wait for ever
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(
                f"{path}: not a readable parquet file ({error})", "download it again"
            ) from error
        names = set(self._file.schema_arrow.names)
        self.columns = next(
            (layout for layout in _LAYOUTS if set(layout[:3]) <= names), ()
        )
        if not self.columns:
            known = "; ".join(", ".join(layout[:3]) for layout in _LAYOUTS)
            raise DataError(
                f"{path}: its columns are {', '.join(sorted(names))}",
                f"known layouts: {known}",
            )
        self.texts = self._file.read(
            [c for c in self.columns[2:] if c in names]
        ).to_pydict()
        groups = range(self._file.num_row_groups)
        self._ends = list(
            accumulate(self._file.metadata.row_group(i).num_rows for i in groups)
        )
        self._group = lru_cache(maxsize=1)(self._read_group)

    def _read_group(self, index: int) -> Any:
        return self._file.read_row_group(index, columns=list(self.columns[:2]))

    def data(self, row: int, column: int) -> bytes:
        """Return the file of a picture: column 0 is the source, 1 the target."""
        group = bisect_right(self._ends, row)
        value = (
            self._group(group)
            .column(self.columns[column])[row - (self._ends[group - 1] if group else 0)]
            .as_py()
        )
        return bytes(value["bytes"] if isinstance(value, dict) else value)

    def picture(self, row: int, column: int) -> Image.Image:
        """Return a picture, upright and RGB; raise DataError if it cannot be decoded."""
        return upright_rgb(
            io.BytesIO(self.data(row, column)), f"{self.path}: row {row}"
        )


def pairs(folder: Path) -> list[EditPair]:
    """Return the pairs of all shards of a folder; raise UserError without pyarrow, DataError for unknown columns."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        shard = Shard(path)
        _, _, instruction, *captions = shard.columns
        for row, text in enumerate(shard.texts[instruction]):
            caption, target_caption = (
                (shard.texts[name][row] or "" if name in shard.texts else "")
                for name in captions
            )
            stat = path.stat()
            found.append(
                EditPair(
                    uid=f"{path.stem}/{row}",
                    instruction=str(text or "").strip(),
                    source=partial(shard.picture, row, 0),
                    target=partial(shard.picture, row, 1),
                    digest=hashlib.sha256(
                        f"{path.name}/{stat.st_size}/{row}".encode()
                    ).hexdigest()[:16],
                    caption=caption,
                    target_caption=target_caption,
                    place=f"{path}: row {row}",
                )
            )
    if empty := [
        f"{pair.place}: no instruction" for pair in found if not pair.instruction
    ]:
        raise DataError(empty[:20])
    return found
