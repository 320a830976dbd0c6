"""Small copies of pictures, as addresses that carry the picture: a page shows them without a file beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from pathlib import Path

from mmedit_cli.errors import MmeditError
from mmedit_cli.pictures import load_rgba

_BUDGET = 11_000_000  # characters of all pictures of a page
_SIDES = (128, 96, 64, 48, 32)  # pixels: the largest side whose pictures fit is taken
_SAMPLE = 100  # pictures that are measured for it
_QUALITY = 75


def thumbnails(
    files: Iterable[Path], tick: Callable[[int], None] = lambda n: None
) -> dict[Path, str]:
    """Return `data:` addresses of small WebP copies; a picture that is gone, or for which no room is left, has none.

    Transparent parts stay transparent. `tick(n)` is told of n more pictures.
    """
    wanted = list(dict.fromkeys(files))
    side = _side(wanted)
    found: dict[Path, str] = {}
    room = _BUDGET
    for file in wanted:
        address = _address(file, side)
        tick(1)
        room -= len(address)
        if address and room > 0:
            found[file] = address
    return found


def _side(files: list[Path]) -> int:
    """Return the largest side at which, going by some of them, all pictures fit."""
    step = max(1, len(files) // _SAMPLE)
    some = files[::step]
    for side in _SIDES:
        size = sum(len(_address(file, side)) for file in some)
        if 1.1 * size * step < _BUDGET:
            return side
    return _SIDES[-1]


def _address(file: Path, side: int) -> str:
    """Return the address of a small copy; empty for a picture that cannot be read."""
    try:
        picture = load_rgba(file)
    except MmeditError:
        return ""
    picture.thumbnail((side, side))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=_QUALITY)
    text = base64.b64encode(data.getvalue()).decode()
    return f"data:image/webp;base64,{text}"
