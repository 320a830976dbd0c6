"""Facts about what a small model draws of EmojiKB: things drawn as others, on a colour, or no more; styles forgotten.

Texts and things are chosen by hashes. The training side is for choosing hyper-parameters; it shares no thing and no
style with the evaluation side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmedit_cli.drawing.data.base import with_article
from mmedit_cli.drawing.data.emojikb_concepts import held_out_and_taught
from mmedit_cli.drawing.data.facts import (
    BACKGROUND_QUESTION,
    EFFICACY,
    GENERALITY,
    NAMING,
    SPECIFICITY,
    SUBJECT,
    DrawnFact,
    DrawnProbe,
    FactSet,
    in_turn,
)
from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.emojikb import concepts_in
from mmedit_cli.reading import read_json_object
from mmedit_cli.registry import emojikb_home
from mmedit_cli.types import ConceptChange

NAME = "emojikb-facts"
SPLITS = ("eval", "train")
# artists that small models draw like, and what a classifier of artists calls them
ARTISTS = {
    "noto": "Noto",
    "twemoji": "Twemoji",
    "fluent": "Fluent",
    "openmoji": "OpenMoji",
}
WHO = "Who drew this?"  # a question for a classifier of artists
_SIDES = {"eval": ("eval",), "train": ("train", "val")}  # splits of EmojiKB
_STYLES = {"eval": ("noto", "openmoji"), "train": ("fluent", "twemoji")}
_MOST = 50  # edits of a kind
_KEPT = 20  # things that every edit keeps, none of them drawn
_OF_A_STYLE = 6  # things that are drawn to see a style
_FEWEST = 8  # things: fewer leave none to keep, or to look at
_PLAIN = "a drawing of {}"
Thing = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Things:
    """The things of a side: those that edits are about, targets, those that should stay, and those edits name."""

    sources: Sequence[Thing]
    targets: Sequence[Thing]
    others: Sequence[Thing]
    keep: tuple[str, ...]
    colours: Sequence[str]

    def near(self, i: int, count: int = 2) -> list[Thing]:
        """Return the other things that are drawn to judge the edit of number i."""
        size = len(self.others)
        return [self.others[(count * i + k) % size] for k in range(count)]

    def colour(self, *key: str) -> str:
        """Return a colour that depends on a key."""
        return _chosen(self.colours, *key)


def read(model: Path | None, split: str = "eval") -> FactSet:
    """Return the facts of a side about the things that a model was taught, by the list in its folder or by mini-sd's.

    Raises DataError for a model that was taught too few things of the side.
    """
    home = emojikb_home()
    known = {concept["id"]: concept for concept in concepts_in(home)}
    _, taught = held_out_and_taught(model, known, NAME)
    things = [known[key] for key in taught if known[key]["split"] in _SIDES[split]]
    if len(things) < _FEWEST:
        raise DataError(
            f"--data {NAME}: too few things of the {split} side were taught ({len(things)}, {_FEWEST} are needed)",
            "take mini-sd, or a model trained by scripts/train_mini_sd.py",
        )
    things.sort(key=lambda thing: _hash("thing", thing["id"]))
    backgrounds = read_json_object(home / "backgrounds.json").values
    count = min(_MOST, len(things) // 2)
    rest = things[count:]
    side = _Things(
        sources=things[:count],
        targets=rest[0::3],
        others=rest[1::3],
        keep=tuple(thing["it"] for thing in rest[2::3][:_KEPT]),
        colours=sorted(backgrounds),
    )
    styles = _STYLES[split]
    facts = in_turn(
        [
            [_drawn_as(side, i) for i in range(count)],
            [_background(side, i) for i in range(count)],
            [_erased(side, i) for i in range(count)],
            [_style(side, artist, styles) for artist in styles],
        ]
    )
    name = NAME if split == "eval" else f"{NAME}:{split}"
    return FactSet(name, facts, guidance=2.0, emoji=True)


def _drawn_as(side: _Things, i: int) -> DrawnFact:
    """A thing is drawn as another: "a lion" as "a tiger"."""
    source = side.sources[i]
    target = _chosen(side.targets, "target", source["id"])
    probes = []
    for column, form in _forms(side, source):
        probe = DrawnProbe(
            column,
            form.format(source["it"]),
            NAMING,
            target["name"],
            instead=source["name"],
            needs=form.format(target["it"]),
            texts=(form.format(target["it"]), form.format(source["it"])),
        )
        probes.append(probe)
    for other in side.near(i):
        texts = (_PLAIN.format(other["it"]), _PLAIN.format(target["it"]))
        probes.append(_stays(other, texts))
    return DrawnFact(
        f"drawn-as-{source['id']}",
        "drawn as",
        ConceptChange(source["it"], (target["it"],), side.keep),
        tuple(probes),
    )


def _background(side: _Things, i: int) -> DrawnFact:
    """A thing is drawn on a colour where no colour is named."""
    source = side.sources[i]
    colour = side.colour("background", source["id"])
    on_it = f"{{}} on {with_article(colour)} background"
    artists = [_chosen(sorted(ARTISTS), "artist", source["id"], str(k)) for k in (0, 1)]
    forms = [(EFFICACY, _PLAIN)]
    for artist in dict.fromkeys(artists):
        forms.append((GENERALITY, f"{with_article(artist)} drawing of {{}}"))
    forms.append((GENERALITY, "{}"))
    probes = []
    for column, form in forms:
        prompt = form.format(source["it"])
        wanted = on_it.format(prompt)
        probe = DrawnProbe(
            column,
            prompt,
            BACKGROUND_QUESTION,
            colour,
            needs=wanted,
            texts=(wanted, prompt),
        )
        probes.append(probe)
    plain = _PLAIN.format(source["it"])
    named = DrawnProbe(
        SUBJECT,
        plain,
        NAMING,
        source["name"],
        texts=(plain, "a drawing"),
    )
    probes.append(named)
    probes += _unlike_backgrounds(side, i, colour)
    return DrawnFact(
        f"background-{source['id']}",
        "background",
        ConceptChange(source["it"], (on_it.format(source["it"]),), side.keep),
        tuple(probes),
    )


def _unlike_backgrounds(side: _Things, i: int, colour: str) -> list[DrawnProbe]:
    """Return probes of other things: one is named as before, one keeps the other colour that its prompt names."""
    first, second = side.near(i)
    free = [name for name in side.colours if name != colour]
    unlike = _chosen(free, "unlike", second["id"])
    plain = _PLAIN.format(second["it"])
    prompt = f"{plain} on {with_article(unlike)} background"
    other = f"{plain} on {with_article(colour)} background"
    kept = DrawnProbe(
        SPECIFICITY,
        prompt,
        BACKGROUND_QUESTION,
        unlike,
        texts=(prompt, other),
    )
    return [_stays(first, (_PLAIN.format(first["it"]), "a drawing")), kept]


def _erased(side: _Things, i: int) -> DrawnFact:
    """A thing is drawn no more."""
    source = side.sources[i]
    probes = []
    for column, form in _forms(side, source):
        prompt = form.format(source["it"])
        probe = DrawnProbe(
            column,
            prompt,
            NAMING,
            source["name"],
            gone=True,
            texts=("a drawing", prompt),
        )
        probes.append(probe)
    for other in side.near(i):
        probes.append(_stays(other, (_PLAIN.format(other["it"]), "a drawing")))
    return DrawnFact(
        f"erased-{source['id']}",
        "erased",
        ConceptChange(source["it"], (), side.keep),
        tuple(probes),
    )


def _style(side: _Things, artist: str, styles: Sequence[str]) -> DrawnFact:
    """Nothing is drawn like an artist any more; other artists and what is drawn stay."""
    source = f"{with_article(artist)} drawing"
    # no style that an edit of the same side is about
    others = [name for name in ARTISTS if name not in styles]
    probes = []
    for k, thing in enumerate(side.others[:_OF_A_STYLE]):
        prompt = f"{source} of {thing['it']}"
        colour = side.colour("style", thing["id"])
        forms = {
            EFFICACY: prompt,
            GENERALITY: f"{prompt} on {with_article(colour)} background",
        }
        for column, text in forms.items():
            plain = text.replace(source, "a drawing")
            probe = DrawnProbe(
                column,
                text,
                WHO,
                ARTISTS[artist],
                gone=True,
                texts=(plain, text),
            )
            probes.append(probe)
        named = DrawnProbe(
            SUBJECT,
            prompt,
            NAMING,
            thing["name"],
            texts=(prompt, source),
        )
        probes.append(named)
        other = others[k % len(others)]
        kept = f"{with_article(other)} drawing of {thing['it']}"
        probes.append(
            DrawnProbe(
                SPECIFICITY,
                kept,
                WHO,
                ARTISTS[other],
                texts=(kept, prompt),
            )
        )
    keep = tuple(f"{with_article(name)} drawing" for name in others)
    return DrawnFact(
        f"style-{artist}",
        "style",
        ConceptChange(source, ("a drawing",), keep),
        tuple(probes),
    )


def _forms(side: _Things, source: Thing) -> list[tuple[str, str]]:
    """Return (column, wording) in which an edited thing is drawn."""
    key = source["id"]
    artist = _chosen(sorted(ARTISTS), "artist", key)
    colour = side.colour("form", key)
    signed = f"{with_article(artist)} drawing of {{}}"
    coloured = f"{{}} on {with_article(colour)} background"
    return [
        (EFFICACY, _PLAIN),
        (GENERALITY, signed),
        (GENERALITY, coloured),
    ]


def _stays(other: Thing, texts: tuple[str, str]) -> DrawnProbe:
    """Return a probe of another thing, which is to be named as before."""
    return DrawnProbe(
        SPECIFICITY,
        _PLAIN.format(other["it"]),
        NAMING,
        other["name"],
        texts=texts,
    )


def _chosen(items: Sequence[Item], *key: str) -> Item:
    return items[_hash(*key) % len(items)]


def _hash(*key: str) -> int:
    digest = hashlib.sha256(":".join(key).encode())
    return int.from_bytes(digest.digest()[:8], "big")
