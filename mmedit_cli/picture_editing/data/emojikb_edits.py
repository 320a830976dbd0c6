"""EmojiKB as edit pairs: scenes are composed of its drawings on demand, with the edits between them.

Some instructions are complete ("make the background blue"), some need the picture ("give the background its opposite
colour", "turn it into another of its kind", "make it the flag of the only neighbour of this country"). The expressive
instruction says what they mean for this picture. Splits share no concept; no picture is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps

from mmedit_cli.drawing.data.base import with_article
from mmedit_cli.drawing.data.emojikb_facts import ARTISTS, WHO
from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.knowledge.data.emojikb import concepts_in
from mmedit_cli.packed import way_out
from mmedit_cli.picture_editing.data.base import EditPair
from mmedit_cli.reading import read_json, read_json_object
from mmedit_cli.registry import emojikb_dir, share_dir
from mmedit_cli.storage import sha256_of

SPLITS = ("train", "val", "eval")
SIZE = 64  # pixels
AMBIGUOUS = (
    "opposite-background",
    "opposite-colour",
    "another-kind",
    "another-artist",
    "neighbour",
    "capital",
)
WHITE = "white"  # not a colour of EmojiKB's own backgrounds, so no question is asked about it
# The question about the result of an edit, and the key of its answer.
_COLOUR = ("What colour is the background?", "ground")
_NAME = ("What is this?", "name")
_ARTIST = (WHO, "artist")
ASKED = {
    "background": _COLOUR,
    "opposite-background": _COLOUR,
    "replace": _NAME,
    "another-kind": _NAME,
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
# countries with one land neighbour, so the answer is unique
NEIGHBOUR = {
    "Portugal": "Spain",
    "Denmark": "Germany",
    "Canada": "United States",
    "Ireland": "United Kingdom",
    "Gambia": "Senegal",
    "Lesotho": "South Africa",
    "South Korea": "North Korea",
    "Qatar": "Saudi Arabia",
    "Haiti": "Dominican Republic",
    "Dominican Republic": "Haiti",
    "San Marino": "Italy",
    "Vatican City": "Italy",
    "Brunei": "Malaysia",
    "Papua New Guinea": "Indonesia",
}

Json = dict[str, Any]
Item = TypeVar("Item")

# The digest of a pair contains the repr of its `Edit`: names of these three classes and their fields stay as they are.


@dataclass(frozen=True)
class Sprite:
    """A drawing in a scene: its size (1 fills the scene), the position of its middle, and how it is changed."""

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
class EmojiKBSplit:
    """The concepts of one split by id, the colours by name, and the digest of each picture.

    `kin` are the concepts that share the value of a key, drawn by an artist: (key, value, artist) -> concepts.
    """

    folder: Path
    concepts: Mapping[str, Json]
    kin: Mapping[tuple[str, str, str], list[Json]]
    colours: Mapping[str, str]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Edit:
    """An edit from one scene to another, with its instruction and the expressive one.

    `plain` is an instruction that does not need the picture, if the usual one does.
    """

    kind: str
    instruction: str
    expressive: str
    before: Scene
    after: Scene
    plain: str = field(default="", repr=False)


def pairs(split: str = "", variation: int = 0) -> list[EditPair]:
    """Return the pairs of a split (train, val, eval; empty: eval) in a mixed but fixed order.

    Another `variation` has the same kinds of edits with other colours, artists and added things. Raises DataError for
    an unknown split, or if EmojiKB is missing.
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
    content = read_json_object(manifest)
    without_effect = set(content.array("without_effect", str))
    every = every_pair(split, variation)
    return [pair for pair in every if pair.uid not in without_effect]


def every_pair(split: str, variation: int = 0) -> list[EditPair]:
    """Return the pairs of a split, also those whose edit changes nothing, such as mirroring a symmetrical drawing."""
    kb = load(split)
    found = []
    for concept in kb.concepts.values():
        for artist in concept["artists"]:
            for edit in edits(kb, concept, artist, variation):
                uid = f"{split}-{edit.kind}-{concept['id']}-{artist}"
                found.append(_pair(kb, uid, edit))
    return sorted(found, key=lambda pair: number(pair.uid))


@cache
def load(split: str) -> EmojiKBSplit:
    """Read the concepts of one split; raise DataError if EmojiKB is missing."""
    folder = emojikb_dir()
    concepts = {}
    for concept in concepts_in(folder):
        if concept["split"] == split:
            concepts[concept["id"]] = concept
    digests: dict[str, str] = {}
    kin: dict[tuple[str, str, str], list[Json]] = {}
    for concept in concepts.values():
        for artist in concept["artists"]:
            name = f"{artist}/{concept['id']}.png"
            digests[name] = _digest_of(folder / name)
            for key in ("kind", "category", "country"):
                shared = (key, concept.get(key, ""), artist)
                kin.setdefault(shared, []).append(concept)
    colours = {**read_json(folder / "backgrounds.json"), WHITE: "#ffffff"}
    return EmojiKBSplit(folder, concepts, kin, colours, digests)


def _digest_of(image: Path) -> str:
    try:
        return sha256_of(image)
    except FileNotFoundError as error:
        raise DataError(f"{image}: no such image", way_out(image)) from error


def number(*key: str) -> int:
    """Return a number that depends on the key alone."""
    text = "/".join(key)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _pick(items: Sequence[Item], *key: str) -> Item:
    """Return one of the items, chosen by a hash of the key."""
    return items[number(*key) % len(items)]


# -- what is done -----------------------------------------------------------------------------------------------


def edits(
    kb: EmojiKBSplit, concept: Json, artist: str, variation: int = 0
) -> Iterator[Edit]:
    """Yield every edit of one drawing; colours and other drawings are chosen by a hash."""
    key = [concept["id"], artist]
    if variation:
        key.append(str(variation))
    ground = _pick(list(kb.colours), "ground", *key)
    sprite = Sprite(concept["id"], artist)
    scene = Scene((sprite,), ground)
    yield from _background_edits(kb, scene, key)
    yield from _shape_edits(concept, scene)
    yield from _style_edits(concept, scene, key)
    kin = _others(kb, concept, "category", artist)
    if kin:
        other = _pick(kin, "other", *key)
        yield from _edits_with_another(kb, concept, other, scene)
    yield from _edits_by_knowledge(kb, concept, scene)


def _with_sprite(scene: Scene, **changes: Any) -> Scene:
    """Return a scene whose only drawing is changed."""
    (sprite,) = scene.sprites
    changed = replace(sprite, **changes)
    return replace(scene, sprites=(changed,))


def _background_edits(
    kb: EmojiKBSplit, scene: Scene, key: Sequence[str]
) -> Iterator[Edit]:
    others = [colour for colour in kb.colours if colour != scene.ground]
    colour = _pick(others, "other ground", *key)
    after = replace(scene, ground=colour)
    yield Edit(
        "background",
        f"make the background {colour}",
        caption(kb, after),
        scene,
        after,
    )
    colour = _pick(list(OPPOSITE), "opposite ground", *key)
    before = replace(scene, ground=colour)
    after = replace(scene, ground=OPPOSITE[colour])
    plain = f"make the background {after.ground}"
    yield Edit(
        "opposite-background",
        "give the background its opposite colour",
        f"{plain}: {caption(kb, after)}",
        before,
        after,
        plain,
    )


def _shape_edits(concept: Json, scene: Scene) -> Iterator[Edit]:
    thing = f"the {_bare_name(concept)}"
    small = _with_sprite(scene, size=0.5)
    yield Edit("bigger", "make it bigger", f"{thing} fills the picture", small, scene)
    yield Edit("smaller", "make it smaller", f"{thing} is half as large", scene, small)
    turned = _with_sprite(scene, turned=180)
    text = f"{thing} stands on its head"
    yield Edit("turn", "turn it upside down", text, scene, turned)
    mirrored = _with_sprite(scene, mirrored=True)
    yield Edit("mirror", "mirror it", f"{thing} looks the other way", scene, mirrored)
    yield Edit(
        "opposite-colour",
        "make it look like its opposite colour",
        f"{thing} in the opposite colours, on the same {scene.ground} background",
        scene,
        _with_sprite(scene, opposite=True),
    )


def _style_edits(concept: Json, scene: Scene, key: Sequence[str]) -> Iterator[Edit]:
    thing = f"the {_bare_name(concept)}"
    own = scene.sprites[0].artist
    artists = [artist for artist in ARTISTS if artist in concept["artists"]]
    if len(artists) < 2:
        return
    others = [artist for artist in artists if artist != own]
    chosen = _pick(others, "artist", *key)
    yield Edit(
        "style",
        f"draw it in the style of {ARTISTS[chosen]}",
        f"{thing} drawn in the style of {ARTISTS[chosen]}",
        scene,
        _with_sprite(scene, artist=chosen),
    )
    following = _following(artists, own)
    yield Edit(
        "another-artist",
        "draw it as the next artist would",
        f"{thing} drawn in the style of {ARTISTS[following]}",
        scene,
        _with_sprite(scene, artist=following),
        f"draw it in the style of {ARTISTS[following]}",
    )


def _edits_with_another(
    kb: EmojiKBSplit, concept: Json, other: Json, scene: Scene
) -> Iterator[Edit]:
    """Yield the edits that need a second drawing."""
    (sprite,) = scene.sprites
    swapped = _with_sprite(scene, concept=other["id"])
    text = _replacing(concept, other)
    yield Edit("replace", text, caption(kb, swapped), scene, swapped)
    left = replace(sprite, size=0.5, x=0.25)
    right = replace(left, concept=other["id"], x=0.75)
    one = replace(scene, sprites=(left,))
    two = replace(scene, sprites=(left, right))
    yield Edit(
        "add",
        f"put {other['it']} beside it",
        caption(kb, two),
        before=one,
        after=two,
    )
    yield Edit(
        "remove",
        f"remove the {_bare_name(other)}",
        caption(kb, one),
        before=two,
        after=one,
    )


def _edits_by_knowledge(
    kb: EmojiKBSplit, concept: Json, scene: Scene
) -> Iterator[Edit]:
    """Yield the edits whose meaning needs the picture and a fact."""
    artist = scene.sprites[0].artist

    def replacing(kind: str, instruction: str, other: Json) -> Edit:
        after = _with_sprite(scene, concept=other["id"])
        return Edit(
            kind,
            instruction,
            caption(kb, after),
            before=scene,
            after=after,
            plain=_replacing(concept, other),
        )

    kin = kb.kin["kind", concept["kind"], artist]
    if len(kin) > 1:
        is_flag = "country flag" in concept["kind"]
        what = "flag" if is_flag else "of its kind"
        following = _following(kin, concept)
        yield replacing(
            "another-kind",
            f"turn it into another {what}",
            following,
        )
    neighbour = NEIGHBOUR.get(concept.get("country", ""), "")
    flags = kb.kin.get(("country", neighbour, artist))
    if neighbour and flags:
        text = "give it the flag of the neighbouring country"
        yield replacing("neighbour", text, flags[0])
    if "country" in concept:
        others = [c for c in kin if "capital" in c and c is not concept]
        chosen = _pick(others, "capital", concept["id"], artist)
        text = f"make it the flag of the country whose capital is {chosen['capital']}"
        yield replacing("capital", text, chosen)


def _bare_name(concept: Json) -> str:
    name: str = concept["name"]
    return name.removeprefix("the ")


def _replacing(concept: Json, other: Json) -> str:
    return f"replace the {_bare_name(concept)} with {other['it']}"


def _following(items: Sequence[Item], item: Item) -> Item:
    """Return the item behind another one; the first follows the last."""
    place = items.index(item) + 1
    return items[place % len(items)]


def _others(kb: EmojiKBSplit, concept: Json, key: str, artist: str) -> list[Json]:
    """Return the other concepts with the same value of a key, drawn by the artist."""
    kin = kb.kin[key, concept[key], artist]
    return [other for other in kin if other is not concept]


# -- pictures and captions --------------------------------------------------------------------------------------


def caption(kb: EmojiKBSplit, scene: Scene) -> str:
    """Return a scene in words, like the captions of mini-sd."""
    names = []
    for sprite in scene.sprites:
        concept = kb.concepts[sprite.concept]
        names.append(concept["it"])
    things = " and ".join(names)
    artist = with_article(scene.sprites[0].artist)
    ground = with_article(scene.ground)
    return f"{artist} drawing of {things} on {ground} background"


def compose(kb: EmojiKBSplit, scene: Scene) -> Image.Image:
    """Return a scene as an RGB picture of SIZE x SIZE pixels; raise DataError for a drawing that is gone."""
    canvas = Image.new("RGBA", (SIZE, SIZE), kb.colours[scene.ground])
    for sprite in scene.sprites:
        drawing = _open_drawing(kb.folder / sprite.artist / f"{sprite.concept}.png")
        if sprite.opposite:
            drawing = _opposite(drawing)
        if sprite.mirrored:
            drawing = ImageOps.mirror(drawing)
        drawing = drawing.rotate(sprite.turned)
        size = round(SIZE * sprite.size)
        drawing = drawing.resize((size, size), Image.Resampling.LANCZOS)
        left = round(SIZE * sprite.x) - size // 2
        top = (SIZE - size) // 2
        layer = Image.new("RGBA", canvas.size)
        layer.paste(drawing, (left, top))
        canvas = Image.alpha_composite(canvas, layer)
    return canvas.convert("RGB")


def _open_drawing(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGBA")
    except OSError as error:
        raise DataError(
            f"{path}: not a readable image ({error})", way_out(path)
        ) from error


def _opposite(drawing: Image.Image) -> Image.Image:
    """Return a drawing with every hue turned by half the circle; grey, black and white stay."""
    hsv = drawing.convert("RGB").convert("HSV")
    hue, saturation, value = hsv.split()
    turned_hue = hue.point([(h + 128) % 256 for h in range(256)])
    turned_hsv = Image.merge("HSV", (turned_hue, saturation, value))
    turned = turned_hsv.convert("RGB")
    alpha = drawing.getchannel("A")
    turned.putalpha(alpha)
    return turned


def _pair(kb: EmojiKBSplit, uid: str, edit: Edit) -> EditPair:
    question, answer = _question_about(kb, edit)
    return EditPair(
        uid=uid,
        instruction=edit.instruction,
        source=partial(compose, kb, edit.before),
        target=partial(compose, kb, edit.after),
        digest=_content_of(kb, edit),
        expressive=edit.expressive,
        caption=caption(kb, edit.before),
        target_caption=caption(kb, edit.after),
        kind=edit.kind,
        place=f"emojikb-edits: {uid}",
        question=question,
        answer=answer,
        plain=edit.plain,
    )


def _question_about(kb: EmojiKBSplit, edit: Edit) -> tuple[str, str]:
    """Return the (question, answer) about the result of an edit; both are empty if there is none."""
    question, key = ASKED.get(edit.kind, ("", ""))
    sprite = edit.after.sprites[0]
    answers = {
        "": "",
        "ground": edit.after.ground,
        "artist": ARTISTS[sprite.artist],
        "name": kb.concepts[sprite.concept]["name"],
    }
    answer = answers[key]
    return ("", "") if answer == WHITE else (question, answer)


def _content_of(kb: EmojiKBSplit, edit: Edit) -> str:
    """Return a digest of an edit and of its drawings."""
    files = set()
    for sprite in (*edit.before.sprites, *edit.after.sprites):
        files.add(f"{sprite.artist}/{sprite.concept}.png")
    facts = [repr(edit)]
    facts += [kb.digests[name] for name in sorted(files)]
    text = "\n".join(facts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
