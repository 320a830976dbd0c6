"""Pictures from disk: opened late, closed at once, upright, and composed on a background colour."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmedit_cli.errors import DataError
from mmedit_cli.in_hand import FORMATS
from mmedit_cli.output import Output
from mmedit_cli.packed import way_out
from mmedit_cli.reading import LARGEST_PICTURE, digest_of, require_regular
from mmedit_cli.registry import emojikb_dir

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Pictures that nothing here opens: in a folder of photos they are named, not passed over.
_OTHER_ENDINGS = (
    *(".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg"),
    *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),  # of cameras
)
_LONGEST_SIDE = 65_535  # pixels, as in JPEG: a picture of 1 x 80,000,000 is none
_MOST_TIMES_AS_LONG = 200  # than wide: processors that scale the shorter side would make gigabytes of more
_MOST_PIXELS = 50_000_000  # decoded and converted, they take less than 512 MiB
_STRIP = 1 << 20  # pixels that are composed at once
# A tag of TIFF files, and its value for whole numbers that have a sign.
_SAMPLE_FORMAT = 339
_SIGNED = 2
_LYING = (5, 6, 7, 8)  # values of the EXIF orientation where width and height change


class Picture(NamedTuple):
    """An image file and the colour behind its transparent parts: together they name what the model sees."""

    path: Path
    background: str = "#ffffff"


def check_picture(path: Path) -> None:
    """Read the header and check the structure of an image file; raise DataError in one line if it is not usable."""
    with _reading(path) as image:
        image.verify()


def picture_digest(path: Path) -> str:
    """Return the SHA-256 of an image file; raise DataError if it is missing, not a file, or too large for a picture.

    Pictures that a user names are hashed only here: an endless file is refused.
    """
    _require_picture(path)
    return digest_of(path, limit=LARGEST_PICTURE)


def picture_size(picture: Picture) -> tuple[int, int]:
    """Return (width, height) in pixels of the upright picture from its header; raise DataError if it has none."""
    with _reading(picture.path) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = image.size
    return (height, width) if orientation in _LYING else (width, height)


def load_picture(picture: Picture) -> Image.Image:
    """Return the picture as RGB, upright, on its background; raise DataError if it cannot be decoded."""
    with _reading(picture.path) as image:
        upright = _upright(image)
        if upright.has_transparency_data:
            return _composed(upright, picture.background)
        return upright.convert("RGB")


def _composed(image: Image.Image, background: str) -> Image.Image:
    """Return a picture with transparent parts on a background colour, made strip by strip: it may be large."""
    done = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom))
        above = strip.convert("RGBA")
        ground = Image.new("RGBA", above.size, background)
        composed = Image.alpha_composite(ground, above)
        done.paste(composed.convert("RGB"), (0, top))
    return done


def photos_in(folder: Path) -> tuple[Path, ...]:
    """Return the pictures of a folder by name, and print which are left out; raise DataError if there are none."""
    if not folder.is_dir():
        emojikb_dir()  # it may be one of its folders
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder", "a folder with three to six photos")
    files = sorted(folder.iterdir())
    found = tuple(path for path in files if path.suffix.lower() in ENDINGS)
    unusable = [path for path in files if path.suffix.lower() in _OTHER_ENDINGS]
    left_out = ", ".join(path.name for path in unusable)
    if not found:
        more = f", and {left_out} cannot be opened" if left_out else ""
        raise DataError(
            f"{folder}: no pictures ({', '.join(ENDINGS)}){more}",
            "three to six photos are usual",
        )
    if left_out:
        Output().note(
            f"{folder}: left out, as they cannot be opened: {left_out}; convert them to .jpg or .png"
        )
    return found


def check_decodes(file: BinaryIO, place: str) -> None:
    """Decode an image file in memory; raise DataError naming `place` if `load_picture` could not, were it on disk."""
    with _reading(file, place) as image:
        _upright(image).load()


def upright_rgb(file: BinaryIO, place: str) -> Image.Image:
    """Decode an image file in memory to upright RGB; raise DataError naming `place` if it is not an image."""
    with _reading(file, place) as image:
        return _upright(image).convert("RGB")


def png(image: Image.Image, *, small: bool = False) -> bytes:
    """Return a picture as the bytes of a PNG file; `small` takes longer."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=small)
    return file.getvalue()


def load_rgba(path: Path) -> Image.Image:
    """Return the picture as RGBA, upright; raise DataError if it cannot be decoded."""
    with _reading(path) as image:
        return _upright(image).convert("RGBA")


def load_alpha(path: Path) -> Image.Image | None:
    """Return the transparency of the upright picture, None if it has none; raise DataError if it cannot be decoded."""
    with _reading(path) as image:
        upright = ImageOps.exif_transpose(image)
        return (
            upright.convert("RGBA").getchannel("A")
            if upright.has_transparency_data
            else None
        )


def _check_sides(image: Image.Image) -> None:
    if max(image.size) > _LONGEST_SIDE:
        raise ValueError(
            f"{image.width} x {image.height} pixels: a side is longer than {_LONGEST_SIDE}"
        )
    if max(image.size) > _MOST_TIMES_AS_LONG * min(image.size):
        raise ValueError(
            f"{image.width} x {image.height} pixels: one side is more than {_MOST_TIMES_AS_LONG} times the other"
        )
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels: more than {_MOST_PIXELS:,}; make it smaller"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Return a picture as its orientation tag says, with 8 bits a channel."""
    unsigned = _is_unsigned(image)  # its tags are gone once it is turned
    ImageOps.exif_transpose(
        image, in_place=True
    )  # without the copy of every picture that is upright already
    return _in_bytes(image, unsigned=unsigned)


def _in_bytes(image: Image.Image, *, unsigned: bool) -> Image.Image:
    """Return a grey picture of 16 or 32 bits as one of 8 bits, and any other as it is.

    Pillow would cut its values off at 255, which makes nearly everything white. White is the largest value of the
    smallest range that holds the picture: 1 (of numbers with a point), 255, 65535, 2^31 - 1 or 2^32 - 1.
    """
    if image.mode != "F" and image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    if image.mode == "I" and unsigned:
        values = np.where(
            values < 0, values + 2.0**32, values
        )  # Pillow reads them as if they had a sign
    largest = values.max(initial=0)
    ranges = [65535.0, 2.0**31 - 1, 2.0**32 - 1]
    if image.mode in ("I", "F"):
        ranges.insert(0, 255.0)
    if image.mode == "F":
        ranges.insert(0, 1.0)
    white = next((limit for limit in ranges if largest <= limit), largest)
    grey = (values.clip(0, white) / white * 255).round().astype(np.uint8)
    scaled = Image.fromarray(grey)
    scaled.info = {
        key: value for key, value in image.info.items() if key != "transparency"
    }
    return scaled


def _is_unsigned(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", None)  # of TIFF files
    return tags is not None and tags.get(_SAMPLE_FORMAT) not in (_SIGNED, (_SIGNED,))


@contextmanager
def _reading(path: Path | BinaryIO, place: str = "") -> Iterator[Image.Image]:
    """Open an image file as a context; any problem with it becomes a DataError of one line."""
    if isinstance(path, Path):
        _require_picture(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _check_sides(image)
                yield image
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        # of a file in memory Pillow tells the address
        reason, _, _ = str(error).partition(" <_io.")
        raise DataError(f"{place or path}: not a readable image ({reason})") from error


def _require_picture(path: Path) -> None:
    """Raise DataError unless a path is that of a regular file which is small enough to be a picture."""
    if not path.exists():
        emojikb_dir()  # it may be a picture of EmojiKB
    if not path.exists():
        raise DataError(f"{path}: no such image", way_out(path))
    size = require_regular(path).st_size
    if size > LARGEST_PICTURE:
        raise DataError(
            f"{path}: not a readable image (larger than {LARGEST_PICTURE >> 20} MiB)"
        )
