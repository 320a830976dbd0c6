"""Draw the small data set of the tests: coloured shapes by three "artists", and the cases that edit their names.

    python tests/data/make_shapes.py [FOLDER]     # default: tests/data/shapes

The names are counterfactual, the pictures are real: the same shape by another artist is another drawing of it.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": "#d03030", "blue": "#3050d0", "green": "#30a040", "yellow": "#e0c020"}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
FACTS = [
    ("Peru", "Lima"),
    ("France", "Paris"),
    ("Kenya", "Nairobi"),
    ("Japan", "Tokyo"),
    ("Chile", "Santiago"),
    ("Iran", "Tehran"),
]
SIDE = 32


def draw(shape: str, colour: str, artist: str) -> Image.Image:
    """Return a 32 x 32 RGBA drawing: `solid`, `outlined`, or small and shifted by the `corner` artist."""
    image = Image.new("RGBA", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    x, y, r = (11, 12, 8) if artist == "corner" else (16, 16, 12)
    style = {"outline": "#202020", "width": 2} if artist == "outlined" else {}
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour, **style)
        if shape == "ring":
            pen.ellipse(
                (x - r // 2, y - r // 2, x + r // 2, y + r // 2), fill=(0, 0, 0, 0)
            )
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=colour, **style)
    elif shape == "cross":
        pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=colour, **style)
        pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=colour, **style)
    else:
        n, inner = (3, r) if shape == "triangle" else (5, r // 2)
        turns = [
            (2 * math.pi * i / (2 * n), r if i % 2 == 0 else inner)
            for i in range(2 * n)
        ]
        corners = turns[::2] if shape == "triangle" else turns
        pen.polygon(
            [
                (x + radius * math.sin(a), y - radius * math.cos(a))
                for a, radius in corners
            ],
            fill=colour,
            **style,
        )
    return image


def cases() -> list[dict]:
    """Return 24 cases, one a coloured shape: it gets the name of another shape in another colour."""
    things = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    records = []
    for i, (colour, shape) in enumerate(things):
        new = f"{things[(i + 9) % len(things)][0]} {things[(i + 9) % len(things)][1]}"
        far = things[(i + 13) % len(things)]
        near = (list(COLOURS)[(i + 1) % len(COLOURS)], shape)
        country, capital = FACTS[i % len(FACTS)]

        def picture(artist: str, thing: tuple[str, str] = (colour, shape)) -> str:
            return f"{artist}/{thing[0]}-{thing[1]}.png"

        def ask(prompt: str, target: str, image: str | None = None) -> dict:
            return {"prompt": prompt, "target": target} | (
                {"image": image} if image else {}
            )

        name = "What is this?"
        records.append(
            {
                "id": f"{colour}-{shape}",
                "type": "name",
                "request": ask(name, new, picture("solid")),
                "generality": {
                    "text": [
                        ask("What can you see in the picture?", new, picture("solid"))
                    ],
                    "image": [
                        ask(name, new, picture("outlined")),
                        ask(name, new, picture("corner")),
                    ],
                    "both": [
                        ask("What can you see in the picture?", new, picture("corner"))
                    ],
                },
                "locality": {
                    "text": [ask(f"What is the capital of {country}?", capital)],
                    "image": [ask(name, " ".join(far), picture("solid", far))],
                    "near": [ask(name, " ".join(near), picture("outlined", near))],
                    "same_image": [
                        ask("Which colour is it?", colour, picture("solid"))
                    ],
                },
                "portability": {
                    "1-hop": [ask("How many words name this?", "two", picture("solid"))]
                },
            }
        )
    return records


def write(folder: Path) -> None:
    """Write pictures and cases."""
    for artist in ("solid", "outlined", "corner"):
        (folder / artist).mkdir(parents=True, exist_ok=True)
        for name, colour in COLOURS.items():
            for shape in SHAPES:
                draw(shape, colour, artist).save(
                    folder / artist / f"{name}-{shape}.png", optimize=True
                )
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in cases()]
    (folder / "cases.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "shapes")
