"""Changes of a picture that leave its answer as it is: turned, scaled, on other grounds, blurred, compressed.

What a change does depends on its name and on a seed alone, so that evaluation shows everyone the same pictures.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageFilter

from mmedit_cli.pictures import Picture, load_rgba

VERSION = 1  # of what the changes do

_TURN = 12.0  # degrees, either way
_LARGER, _SMALLER = 1.25, 0.75
_SHIFT = 0.1  # of a side, either way
_BLUR = 1.0  # standard deviation in pixels
_QUALITY = 30  # of JPEG
_SPOTS = 5  # of a texture, a side
_GRAIN = 0.08  # share of noise in a texture

Colour = tuple[int, int, int]


class Drawing(NamedTuple):
    """A drawing (RGBA) and what lies behind it (RGB), of one size."""

    above: Image.Image
    ground: Image.Image


def seed_of(*key: object) -> int:
    """Return a seed that depends on the key alone, on every machine."""
    text = "|".join(map(str, key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def choose(names: tuple[str, ...], *key: object) -> str:
    """Return one of the names, as the key says."""
    return names[seed_of(*key) % len(names)]


def changed(picture: Picture, change: str, seed: int) -> Image.Image:
    """Return a picture as RGB after a change; raise DataError if it cannot be read."""
    above = load_rgba(picture.path)
    ground = Image.new("RGB", above.size, picture.background)
    change_drawing = _OF_DRAWING[change]
    drawing = change_drawing(Drawing(above, ground), random.Random(seed))
    below = drawing.ground.convert("RGBA")
    whole = Image.alpha_composite(below, drawing.above)
    change_whole = _OF_WHOLE.get(change, _same)
    return change_whole(whole.convert("RGB"))


def _turned(drawing: Drawing, chance: random.Random) -> Drawing:
    angle = math.radians(_TURN * chance.choice((-1, 1)))
    return _moved(drawing, math.cos(angle), math.sin(angle))


def _larger(drawing: Drawing, chance: random.Random) -> Drawing:
    return _moved(drawing, 1 / _LARGER, 0.0)


def _smaller(drawing: Drawing, chance: random.Random) -> Drawing:
    return _moved(drawing, 1 / _SMALLER, 0.0)


def _shifted(drawing: Drawing, chance: random.Random) -> Drawing:
    width, height = drawing.above.size
    right = chance.choice((-1, 1))
    below = chance.choice((-1, 1))
    across = _SHIFT * width * right
    down = _SHIFT * height * below
    return _moved(drawing, 1.0, 0.0, across, down)


def _moved(
    drawing: Drawing, cos: float, sin: float, across: float = 0.0, down: float = 0.0
) -> Drawing:
    """Turn and scale a drawing about its middle, then shift it; the ground stays."""
    width, height = drawing.above.size
    x, y = (width - 1) / 2, (height - 1) / 2
    rows = (
        cos,
        sin,
        x - cos * x - sin * y - across,
        -sin,
        cos,
        y + sin * x - cos * y - down,
    )
    above = drawing.above.transform(
        drawing.above.size,
        Image.Transform.AFFINE,
        rows,
        resample=Image.Resampling.BICUBIC,
    )
    return drawing._replace(above=above)


def _mirrored(drawing: Drawing, chance: random.Random) -> Drawing:
    flipped = drawing.above.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return drawing._replace(above=flipped)


def _dark(drawing: Drawing, chance: random.Random) -> Drawing:
    colour = tuple(chance.randrange(20, 70) for _ in range(3))
    return drawing._replace(ground=Image.new("RGB", drawing.above.size, colour))


def _gradient(drawing: Drawing, chance: random.Random) -> Drawing:
    ends = [_any_colour(chance) for _ in range(4)]
    corners = Image.new("RGB", (2, 2))
    corners.putdata(ends)
    ground = corners.resize(drawing.above.size, Image.Resampling.BILINEAR)
    return drawing._replace(ground=ground)


def _texture(drawing: Drawing, chance: random.Random) -> Drawing:
    size = drawing.above.size
    spots = _noise((_SPOTS, _SPOTS), chance)
    smooth = spots.resize(size, Image.Resampling.BICUBIC)
    grain = _noise(size, chance)
    ground = Image.blend(smooth, grain, _GRAIN)
    return drawing._replace(ground=ground)


def _noise(size: tuple[int, int], chance: random.Random) -> Image.Image:
    width, height = size
    values = chance.randbytes(3 * width * height)
    return Image.frombytes("RGB", size, values)


def _any_colour(chance: random.Random) -> Colour:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)


def _unmoved(drawing: Drawing, chance: random.Random) -> Drawing:
    return drawing


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(_BLUR))


def _compressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    with Image.open(file) as again:
        return again.convert("RGB")


def _same(image: Image.Image) -> Image.Image:
    return image


_OF_DRAWING: dict[str, Callable[[Drawing, random.Random], Drawing]] = {
    "turned": _turned,
    "larger": _larger,
    "smaller": _smaller,
    "shifted": _shifted,
    "mirrored": _mirrored,
    "blurred": _unmoved,
    "compressed": _unmoved,
    "dark ground": _dark,
    "gradient": _gradient,
    "texture": _texture,
}
_OF_WHOLE = {"blurred": _blurred, "compressed": _compressed}

CHANGES = tuple(_OF_DRAWING)
GROUNDS = ("dark ground", "gradient", "texture")  # these change what is behind
MIRRORED = ("mirrored",)  # not for flags and signs, which may become others
