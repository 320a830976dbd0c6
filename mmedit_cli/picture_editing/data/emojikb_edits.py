"""EmojiKB as edit pairs: scenes composed of its drawings when asked for, and what leads from one to another.

Some instructions say all ("make the background blue"), some mean something only to who sees the picture ("give the
background its opposite colour", "turn it into another of its kind", "make it the flag of the only neighbour of this
country"): what they come to is the expressive instruction. Sides share no concept; nothing is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mmedit_cli.drawing.data.base import with_article
from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.knowledge.data.emojikb import concepts_in
from mmedit_cli.packed import way_out
from mmedit_cli.picture_editing.data.base import EditPair
from mmedit_cli.reading import read_json, read_json_object
from mmedit_cli.registry import emojikb_dir, share_dir
from mmedit_cli.storage import sha256_of

SPLITS = ("train", "val", "eval")
SIDE = 64  # pixels
ARTISTS = {
    "noto": "Noto",
    "twemoji": "Twemoji",
    "fluent": "Fluent",
    "openmoji": "OpenMoji",
}
AMBIGUOUS = (
    "opposite-background",
    "opposite-colour",
    "another-kind",
    "another-artist",
    "neighbour",
    "capital",
)
WHO = "Who drew this?"  # a question for a classifier of artists
WHITE = "white"  # no colour of EmojiKB's own backgrounds, so nobody is asked about it
_COLOUR, _NAME, _ARTIST = (
    ("What colour is the background?", "ground"),
    ("What is this?", "name"),
    (WHO, "artist"),
)
ASKED = {
    "background": _COLOUR,
    "opposite-background": _COLOUR,
    "replace": _NAME,
    "another-kind": _NAME,
}
ASKED |= {
    "neighbour": _NAME,
    "capital": _NAME,
    "style": _ARTIST,
    "another-artist": _ARTIST,
}
OPPOSITE = {
    "blue": "orange",
    "orange": "blue",
    "yellow": "purple",
    "purple": "yellow",
    "green": "pink",
    "pink": "green",
}
# countries with one land neighbour: nothing else can be meant
NEIGHBOUR = {
    "Portugal": "Spain", "Denmark": "Germany", "Canada": "United States", "Ireland": "United Kingdom",
    "Gambia": "Senegal", "Lesotho": "South Africa", "South Korea": "North Korea", "Qatar": "Saudi Arabia",
    "Haiti": "Dominican Republic", "Dominican Republic": "Haiti", "San Marino": "Italy",
    "Vatican City": "Italy", "Brunei": "Malaysia", "Papua New Guinea": "Indonesia",
}  # fmt: skip

Json = dict[str, Any]


@dataclass(frozen=True)
class Sprite:
    """A drawing in a scene: which, how large (1 fills the scene), where its middle is, and how it is changed."""

    concept: str
    artist: str
    size: float = 1.0
    x: float = 0.5
    turned: int = 0  # degrees
    mirrored: bool = False
    opposite: bool = False  # every hue on the other side of the circle


@dataclass(frozen=True)
class Scene:
    """Drawings on a colour of `EmojiKB.colours`."""

    sprites: tuple[Sprite, ...]
    ground: str


@dataclass(frozen=True)
class EmojiKB:
    """The concepts of one side by id, the colours by name, and the digest of each picture.

    `kin` are the concepts that share the value of a key, drawn by an artist: (key, value, artist) -> concepts.
    """

    folder: Path
    concepts: Mapping[str, Json]
    kin: Mapping[tuple[str, str, str], list[Json]]
    colours: Mapping[str, str]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Edit:
    """What leads from one scene to another: in a few words, and spelled out."""

    kind: str
    instruction: str
    expressive: str
    before: Scene
    after: Scene
    plain: str = field(
        default="", repr=False
    )  # for who does not see the picture, if that is another instruction


def pairs(split: str = "", variation: int = 0) -> list[EditPair]:
    """Return the pairs of a side (train, val, eval; empty: eval) in a mixed but fixed order.

    Another `variation` has the same kinds of edits with other colours, artists and things beside. Raises DataError for
    another side, or where EmojiKB is not there.
    """
    split = split or "eval"
    if split not in SPLITS:
        raise DataError(
            f"--data emojikb-edits:{split}: no such split{near_miss(split, SPLITS)}",
            f"it has {', '.join(SPLITS)}",
        )
    manifest = share_dir("data") / "emojikb-edits" / "manifest.json"
    if not manifest.is_file():
        raise DataError(
            f"{manifest}: not there", "the data come with a checkout of the repository"
        )
    left_out = frozenset(read_json_object(manifest).array("without_effect", str))
    return [pair for pair in every_pair(split, variation) if pair.uid not in left_out]


def every_pair(split: str, variation: int = 0) -> list[EditPair]:
    """Return the pairs of a side, also those whose edit changes nothing, such as to mirror what is symmetrical."""
    kb = load(split)
    found = [
        _pair(kb, f"{split}-{edit.kind}-{concept['id']}-{artist}", edit)
        for concept in kb.concepts.values()
        for artist in concept["artists"]
        for edit in edits(kb, concept, artist, variation)
    ]
    return sorted(found, key=lambda pair: number(pair.uid))


@cache
def load(split: str) -> EmojiKB:
    """Read the concepts of one side; raise DataError where EmojiKB is not there."""
    folder = emojikb_dir()
    concepts = {
        concept["id"]: concept
        for concept in concepts_in(folder)
        if concept["split"] == split
    }
    colours = read_json(folder / "backgrounds.json")
    drawn = [
        f"{artist}/{concept['id']}.png"
        for concept in concepts.values()
        for artist in concept["artists"]
    ]
    try:
        digests = {name: sha256_of(folder / name) for name in drawn}
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename}: no such image", way_out(Path(error.filename))
        ) from error
    kin: dict[tuple[str, str, str], list[Json]] = {}
    for concept in concepts.values():
        for artist in concept["artists"]:
            for key in ("kind", "category", "country"):
                kin.setdefault((key, concept.get(key, ""), artist), []).append(concept)
    return EmojiKB(folder, concepts, kin, {**colours, WHITE: "#ffffff"}, digests)


def number(*key: str) -> int:
    """Return a number that depends on the key alone."""
    return int.from_bytes(hashlib.sha256("/".join(key).encode()).digest()[:6], "big")


# -- what is done -----------------------------------------------------------------------------------------------


def edits(
    kb: EmojiKB, concept: Json, artist: str, variation: int = 0
) -> Iterator[Edit]:
    """Yield every edit of one drawing; colours and other drawings are chosen by a hash."""
    key = (concept["id"], artist, *((str(variation),) if variation else ()))
    colours = list(kb.colours)
    ground = colours[number("ground", *key) % len(colours)]
    sprite = Sprite(concept["id"], artist)
    scene = Scene((sprite,), ground)
    thing = f"the {concept['name'].removeprefix('the ')}"
    yield from _of_the_ground(kb, concept, scene, key)
    yield from _of_the_drawing(concept, scene, thing, key)
    other = _other(kb, concept, artist, key)
    if other is not None:
        swapped = replace(scene, sprites=(Sprite(other["id"], artist),))
        yield Edit(
            "replace", _replacing(concept, other), says(kb, swapped), scene, swapped
        )
        left, right = (
            replace(sprite, size=0.5, x=0.25),
            Sprite(other["id"], artist, 0.5, 0.75),
        )
        one, two = (
            replace(scene, sprites=(left,)),
            replace(scene, sprites=(left, right)),
        )
        yield Edit("add", f"put {other['it']} beside it", says(kb, two), one, two)
        name = other["name"].removeprefix("the ")
        yield Edit("remove", f"remove the {name}", says(kb, one), two, one)
    yield from _by_knowledge(kb, concept, scene)


def _of_the_ground(
    kb: EmojiKB, concept: Json, scene: Scene, key: tuple[str, ...]
) -> Iterator[Edit]:
    others = [colour for colour in kb.colours if colour != scene.ground]
    colour = others[number("other ground", *key) % len(others)]
    after = replace(scene, ground=colour)
    yield Edit(
        "background", f"make the background {colour}", says(kb, after), scene, after
    )
    names = list(OPPOSITE)
    before = replace(scene, ground=names[number("opposite ground", *key) % len(names)])
    after = replace(scene, ground=OPPOSITE[before.ground])
    plain = f"make the background {after.ground}"
    text = f"{plain}: {says(kb, after)}"
    yield Edit(
        "opposite-background",
        "give the background its opposite colour",
        text,
        before,
        after,
        plain,
    )


def _of_the_drawing(
    concept: Json, scene: Scene, thing: str, key: tuple[str, ...]
) -> Iterator[Edit]:
    (sprite,) = scene.sprites
    small = replace(scene, sprites=(replace(sprite, size=0.5),))
    yield Edit("bigger", "make it bigger", f"{thing} fills the picture", small, scene)
    yield Edit("smaller", "make it smaller", f"{thing} is half as large", scene, small)
    turned = replace(scene, sprites=(replace(sprite, turned=180),))
    yield Edit(
        "turn", "turn it upside down", f"{thing} stands on its head", scene, turned
    )
    mirrored = replace(scene, sprites=(replace(sprite, mirrored=True),))
    yield Edit("mirror", "mirror it", f"{thing} looks the other way", scene, mirrored)
    painted = replace(scene, sprites=(replace(sprite, opposite=True),))
    told = f"{thing} in the opposite colours, on the same {scene.ground} background"
    yield Edit(
        "opposite-colour", "make it look like its opposite colour", told, scene, painted
    )
    artists = [artist for artist in ARTISTS if artist in concept["artists"]]
    if len(artists) > 1:
        others = [artist for artist in artists if artist != sprite.artist]
        chosen = others[number("artist", *key) % len(others)]
        told = f"{thing} drawn in the style of {ARTISTS[chosen]}"
        after = replace(scene, sprites=(replace(sprite, artist=chosen),))
        yield Edit(
            "style", f"draw it in the style of {ARTISTS[chosen]}", told, scene, after
        )
        following = artists[(artists.index(sprite.artist) + 1) % len(artists)]
        told = f"{thing} drawn in the style of {ARTISTS[following]}"
        after = replace(scene, sprites=(replace(sprite, artist=following),))
        plain = f"draw it in the style of {ARTISTS[following]}"
        yield Edit(
            "another-artist",
            "draw it as the next artist would",
            told,
            scene,
            after,
            plain,
        )


def _by_knowledge(kb: EmojiKB, concept: Json, scene: Scene) -> Iterator[Edit]:
    """Yield the edits whose meaning needs the picture and a fact."""
    artist = scene.sprites[0].artist
    kin = kb.kin["kind", concept["kind"], artist]
    if len(kin) > 1:
        following = kin[(kin.index(concept) + 1) % len(kin)]
        after = replace(scene, sprites=(Sprite(following["id"], artist),))
        known = "country flag" in concept["kind"]
        text = (
            "turn it into another flag" if known else "turn it into another of its kind"
        )
        yield Edit(
            "another-kind",
            text,
            says(kb, after),
            scene,
            after,
            _replacing(concept, following),
        )
    neighbour = NEIGHBOUR.get(concept.get("country", ""))
    beside = kb.kin.get(("country", neighbour, artist)) if neighbour else None
    if beside:
        after = replace(scene, sprites=(Sprite(beside[0]["id"], artist),))
        text, plain = (
            "give it the flag of the neighbouring country",
            _replacing(concept, beside[0]),
        )
        yield Edit("neighbour", text, says(kb, after), scene, after, plain)
    if "country" in concept:
        others = [c for c in kin if "capital" in c and c is not concept]
        chosen = others[number("capital", concept["id"], artist) % len(others)]
        after = replace(scene, sprites=(Sprite(chosen["id"], artist),))
        text = f"make it the flag of the country whose capital is {chosen['capital']}"
        yield Edit(
            "capital", text, says(kb, after), scene, after, _replacing(concept, chosen)
        )


def _replacing(concept: Json, other: Json) -> str:
    return f"replace the {concept['name'].removeprefix('the ')} with {other['it']}"


def _other(
    kb: EmojiKB, concept: Json, artist: str, key: tuple[str, ...]
) -> Json | None:
    """Return another concept of the same category by the same artist, None if there is none."""
    kin = [
        c for c in kb.kin["category", concept["category"], artist] if c is not concept
    ]
    return kin[number("other", *key) % len(kin)] if kin else None


# -- how it looks, and how it is told ---------------------------------------------------------------------------


def says(kb: EmojiKB, scene: Scene) -> str:
    """Return a scene in words, as the captions of mini-sd are written."""
    things = " and ".join(kb.concepts[sprite.concept]["it"] for sprite in scene.sprites)
    artist = scene.sprites[0].artist
    return f"{with_article(artist)} drawing of {things} on {with_article(scene.ground)} background"


def compose(kb: EmojiKB, scene: Scene) -> Image.Image:
    """Return a scene as an RGB picture of SIDE x SIDE pixels; raise DataError for a drawing that is gone."""
    canvas = Image.new("RGBA", (SIDE, SIDE), kb.colours[scene.ground])
    for sprite in scene.sprites:
        path = kb.folder / sprite.artist / f"{sprite.concept}.png"
        try:
            with Image.open(path) as file:
                drawing = file.convert("RGBA")
        except OSError as error:
            raise DataError(
                f"{path}: not a readable image ({error})", way_out(path)
            ) from error
        if sprite.opposite:
            drawing = _opposite(drawing)
        if sprite.mirrored:
            drawing = ImageOps.mirror(drawing)
        side = round(SIDE * sprite.size)
        drawing = drawing.rotate(sprite.turned).resize(
            (side, side), Image.Resampling.LANCZOS
        )
        above = Image.new("RGBA", canvas.size)
        above.paste(drawing, (round(SIDE * sprite.x) - side // 2, (SIDE - side) // 2))
        canvas = Image.alpha_composite(canvas, above)
    return canvas.convert("RGB")


def _opposite(drawing: Image.Image) -> Image.Image:
    """Return a drawing with every hue turned by half the circle; grey, black and white stay."""
    hue, saturation, value = drawing.convert("RGB").convert("HSV").split()
    around = hue.point([(h + 128) % 256 for h in range(256)])
    turned = Image.merge("HSV", (around, saturation, value)).convert("RGB")
    turned.putalpha(drawing.getchannel("A"))
    return turned


def _pair(kb: EmojiKB, uid: str, edit: Edit) -> EditPair:
    drawn = sorted(
        {
            f"{s.artist}/{s.concept}.png"
            for scene in (edit.before, edit.after)
            for s in scene.sprites
        }
    )
    question, key = ASKED.get(edit.kind, ("", ""))
    sprite = edit.after.sprites[0]
    known = {"": "", "ground": edit.after.ground, "artist": ARTISTS[sprite.artist]}
    known["name"] = kb.concepts[sprite.concept]["name"]
    facts = [repr(edit), *(kb.digests[name] for name in drawn)]
    return EditPair(
        uid=uid,
        instruction=edit.instruction,
        source=partial(compose, kb, edit.before),
        target=partial(compose, kb, edit.after),
        digest=hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16],
        expressive=edit.expressive,
        caption=says(kb, edit.before),
        target_caption=says(kb, edit.after),
        kind=edit.kind,
        place=f"emojikb-edits: {uid}",
        question=question if known[key] != WHITE else "",
        answer=known[key] if known[key] != WHITE else "",
        plain=edit.plain,
    )
