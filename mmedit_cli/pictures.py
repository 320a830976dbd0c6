"""Pictures from disk: opened late, closed at once, upright, and composed on a background colour."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import ExifTags, Image, ImageOps

from mmedit_cli.errors import DataError
from mmedit_cli.packed import way_out
from mmedit_cli.registry import emojikb_dir

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Picture(NamedTuple):
    """An image file and the colour behind its transparent parts: together they name what the model sees."""

    path: Path
    background: str = "#ffffff"


def check_picture(path: Path) -> None:
    """Read the header and check the structure of an image file; raise DataError in one line if it is not usable."""
    with _reading(path) as image:
        image.verify()


def picture_size(picture: Picture) -> tuple[int, int]:
    """Return (width, height) in pixels of the upright picture from its header; raise DataError if it has none."""
    with _reading(picture.path) as image:
        lying = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if lying else (image.width, image.height)


def load_picture(picture: Picture) -> Image.Image:
    """Return the picture as RGB, upright, on its background; raise DataError if it cannot be decoded."""
    with _reading(picture.path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            above = upright.convert("RGBA")
            ground = Image.new("RGBA", above.size, picture.background)
            return Image.alpha_composite(ground, above).convert("RGB")
        return upright.convert("RGB")


def photos_in(folder: Path) -> tuple[Path, ...]:
    """Return the pictures of a folder, by name; raise DataError if there are none."""
    if not folder.is_dir():
        emojikb_dir()  # it may be one of its folders
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder", "a folder with three to six photos")
    found = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS))
    if not found:
        raise DataError(f"{folder}: no pictures ({', '.join(ENDINGS)})", "three to six photos are usual")
    return found


def upright_rgb(file: BinaryIO, place: str) -> Image.Image:
    """Return an image file that is in memory as RGB, upright; raise DataError naming `place` if it is none."""
    with _reading(file, place) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def png(image: Image.Image, *, small: bool = False) -> bytes:
    """Return a picture as the bytes of a PNG file; `small` takes longer."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=small)
    return file.getvalue()


def load_alpha(path: Path) -> Image.Image | None:
    """Return the transparency of the upright picture, None if it has none; raise DataError if it cannot be decoded."""
    with _reading(path) as image:
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None


@contextmanager
def _reading(path: Path | BinaryIO, place: str = "") -> Iterator[Image.Image]:
    """Open an image file for the block; whatever is wrong with it becomes a DataError in one line."""
    if isinstance(path, Path) and not path.exists():
        emojikb_dir()  # it may be a picture of EmojiKB
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except FileNotFoundError as error:
        raise DataError(f"{place or path}: no such image", way_out(Path(error.filename))) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{place or path}: not a readable image ({error})") from error
