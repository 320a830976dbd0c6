"""Pictures that a program holds in memory, as files: everything behind a Query knows files alone."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mmedit_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# What a file may be inside, whatever its name says. Left out is what starts other programs (EPS: Ghostscript) or is
# hardly ever met, and so hardly ever tested (FLI, PCX, ...).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
_HINT = (
    "a path, an address of the web, a picture of PIL, or an array (height, width), (height, width, 3) or "
    "(height, width, 4) of uint8"
)
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")  # modes of PIL it can hold
_FLOATING = "F"
_DATA_URL = re.compile(r"data:image/([\w.+-]+);base64,", re.ASCII | re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_FILE_ENDING = re.compile(r"\.[a-z]{3,4}$", re.ASCII | re.IGNORECASE)
_LARGEST = 64 << 20  # bytes of a picture of the web
_SECONDS = 15.0  # for a connection, and between two pieces of an answer
_UNREADABLE = (OSError, SyntaxError, ValueError)  # what PIL raises
_SAVE = "save it to a file, and name that"
_ENDING = re.compile(r"[a-z]+", re.ASCII)


def as_file(picture: Any) -> Path:
    """Return the path of a picture: of a path or its text, or of a file that holds a picture of PIL or an array.

    Arrays are (H, W), (H, W, 3) or (H, W, 4) of uint8. A text may also be the picture itself, as
    `data:image/png;base64,...`, or its address in the web, from where it is fetched once. The files are named by their
    content, and go with the process. Raises DataError for anything else, for what cannot be fetched, and for what is
    no picture.
    """
    if isinstance(picture, str) and picture[:5].lower() == "data:":
        return _of_data_url(picture)
    if isinstance(picture, str) and "://" in picture:
        return _of_address(picture)
    if isinstance(picture, str | os.PathLike):
        return Path(picture)
    from PIL import Image

    if not isinstance(picture, Image.Image):
        picture = _of_array(picture)
    ending = ".tif" if picture.mode == _FLOATING else ".png"
    return _kept(_encoded(picture, ending), ending)


def in_data_url(text: str) -> bytes | None:
    """Return the file in `data:image/...;base64,...`, None for another text; raise ValueError if it is not base64."""
    head = _DATA_URL.match(text)
    if head is None:
        return None
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64 ({error})") from error


def _of_data_url(text: str) -> Path:
    short = f"{text[:32]}..."
    try:
        data = in_data_url(text)
    except ValueError as error:
        raise DataError(f"{short}: {error}") from error
    if data is None:
        raise DataError(f"{short}: not a picture", "data:image/png;base64,...")
    head = _DATA_URL.match(text)
    kind = _ENDING.match(head[1].lower()) if head else None
    return _kept(data, f".{kind[0]}" if kind else ".png")


@cache
def _of_address(address: str) -> Path:
    """Return the file that a picture of the web is kept in."""
    from mmedit_cli.web import plain_address

    place = plain_address(address)
    if not _WEB.match(address):
        raise DataError(f"{place}: not an address of the web", _HINT)
    data = _fetched(address, place)
    _check(data, place)
    ending = _FILE_ENDING.search(address.partition("?")[0])
    return _kept(data, ending[0].lower() if ending else ".png")


def _fetched(address: str, place: str) -> bytes:
    import httpx2

    from mmedit_cli.web import client

    data = bytearray()
    try:
        with client(_SECONDS) as web, web.stream("GET", address) as response:
            if response.status_code != 200:
                said = f"HTTP {response.status_code} {response.reason_phrase}"
                raise DataError(f"{place}: cannot be fetched: {said.rstrip()}", _SAVE)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > _LARGEST:
                    problem = f"{place}: more than {_LARGEST >> 20} MiB"
                    raise DataError(problem, _SAVE)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DataError(f"{place}: cannot be fetched: {error}", _SAVE) from error
    return bytes(data)


def _check(data: bytes, place: str) -> None:
    """Raise DataError if these bytes are no picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.verify()
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: not a picture: {error}", _HINT) from error


def _kept(data: bytes, ending: str) -> Path:
    """Return the file with this content in a folder that goes with the process."""
    digest = hashlib.sha256(data).hexdigest()
    path = _folder() / f"{digest[:32]}{ending}"
    if not path.exists():
        beginning = path.with_suffix(f".{os.urandom(8).hex()}")
        beginning.write_bytes(data)
        beginning.replace(path)
    return path


@cache
def _folder() -> Path:
    """Return a folder that is removed when the process ends."""
    folder = _open_folder()
    return Path(folder.name)


@cache
def _open_folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="mmedit-pictures-")


def _of_array(array: Any) -> Image.Image:
    """Return a picture with the values of an array."""
    import numpy as np
    from PIL import Image

    if not isinstance(array, np.ndarray):
        raise DataError(f"not a picture: {type(array).__name__}", _HINT)
    shape = array.shape
    grey = len(shape) == 2
    coloured = len(shape) == 3 and shape[2] in (3, 4)
    if array.dtype != np.uint8 or not array.size or not (grey or coloured):
        raise DataError(f"not a picture: an array {shape} of {array.dtype}", _HINT)
    return Image.fromarray(array)


def _encoded(picture: Image.Image, ending: str) -> bytes:
    """Return a picture as the bytes of a file without loss, turned as its orientation tag says."""
    from PIL import ImageOps

    file = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(picture)
        if ending == ".tif":
            upright.save(file, "TIFF")
            return file.getvalue()
        if upright.mode not in _IN_PNG:
            upright = upright.convert("RGB")
        upright.save(file, "PNG", compress_level=1)
    except _UNREADABLE as error:
        raise DataError(f"a picture in memory cannot be kept: {error}") from error
    return file.getvalue()
