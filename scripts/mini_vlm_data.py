"""EmojiKB as tensors on one device: pictures, questions, what is held out, augmentation.

Shapes: n pictures, C concepts, R questions with their answers, T tokens, B batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Encoded
from mmedit_cli.reading import read_text
from mmedit_cli.registry import emojikb_dir
from mmedit_cli.types import Query

ROOT = Path(__file__).resolve().parent.parent
DATA = emojikb_dir()
TYPES = (
    "name",
    "kind",
    "category",
    "background",
    "country",
    "capital",
    "continent",
    "currency",
    "language",
)
BACKGROUND = TYPES.index("background")
HEADS = (
    "name",
    "kind",
    "category",
    "background",
)  # what the vision tower is trained to tell first
SHIFT, BRIGHTNESS = 4, 0.15  # pixels; the drawing only, never the background
NAMED, WHITE = 0.7, 0.1  # shares of the backgrounds; the rest are colours of no name
DARKEST = 110  # of a colour of no name, out of 255
# how often a type is asked of a picture that has it, relative to the others
WEIGHTS = {
    "name": 3,
    "kind": 1,
    "category": 1,
    "background": 1.2,
    "country": 3,
    "capital": 3,
    "continent": 1.2,
}
WEIGHTS |= {"currency": 2, "language": 1.5}
NONE = -1


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file, gzipped or not."""
    return [json.loads(line) for line in read_text(path).splitlines()]


def number(*key: object) -> int:
    """Return a 64-bit number that depends on the key alone."""
    return (
        int.from_bytes(
            hashlib.sha256("|".join(map(str, key)).encode()).digest()[:8], "big"
        )
        >> 1
    )


@dataclass(frozen=True)
class Holdout:
    """What the model never sees: `concepts` not at all, and of each concept in `artists` that artist's drawing."""

    concepts: tuple[str, ...]
    artists: dict[str, str]  # the hand that is left out: see `hand`

    def allows(self, concept: str, artist: str | None = None) -> bool:
        """Return whether a concept (and a drawing of it) may be trained on."""
        return concept not in self.concepts and (
            artist is None or self.artists.get(concept) != hand(artist)
        )


def hand(artist: str) -> str:
    """Return whose drawings an artist's are: `fluent-flat` and `fluent-line` are `fluent` in other colours."""
    return artist.removesuffix("-flat").removesuffix("-line")


def choose_holdout(
    concepts: Sequence[dict[str, Any]], n_concepts: int, n_artists: int
) -> Holdout:
    """Choose by hash, so that it depends on nothing but the concepts.

    Whole concepts come from every side in proportion, and only from those that are edited: probes stay known.
    """
    ranked = sorted(concepts, key=lambda c: number("concept", c["id"]))
    left_out: list[str] = []
    for side in ("train", "val", "eval"):
        share = round(
            n_concepts * sum(c["split"] == side for c in ranked) / len(ranked)
        )
        left_out += [
            c["id"] for c in ranked if c["split"] == side and c["role"] == "edit"
        ][:share]
    drawn = sorted(
        (c for c in ranked if c["id"] not in left_out),
        key=lambda c: number("artist", c["id"]),
    )
    artists = {
        c["id"]: c["artists"][number("which", c["id"]) % len(c["artists"])]
        for c in drawn[:n_artists]
    }
    return Holdout(tuple(sorted(left_out)), dict(sorted(artists.items())))


FURTHER_HANDS = ("emojione-v1", "fxemoji", "noto-v1")


def with_further_holdout(
    holdout: Holdout, concepts: Sequence[dict[str, Any]], count: int
) -> Holdout:
    """Leave out `count` further artists' drawings too, of concepts that have all drawings of the first artists.

    So a model that was trained on the first artists alone has seen none of what is held out here either.
    """
    pairs = [
        (c["id"], sorted({hand(a) for a in c["artists"]} & set(FURTHER_HANDS)))
        for c in concepts
        if c["id"] not in holdout.concepts and c["id"] not in holdout.artists
    ]
    drawn = sorted(
        (pair for pair in pairs if pair[1]), key=lambda pair: number("further", pair[0])
    )
    more = {
        concept: hands[number("which further", concept) % len(hands)]
        for concept, hands in drawn[:count]
    }
    return Holdout(holdout.concepts, dict(sorted((holdout.artists | more).items())))


@dataclass(frozen=True)
class EmojiKB:
    """The records of the data set, cut to what a recipe asks for, and what is held out of it."""

    concepts: list[dict[str, Any]]
    facts: list[dict[str, Any]]
    templates: dict[str, dict[str, list[str]]]
    backgrounds: dict[str, str]
    holdout: Holdout
    open: bool = False  # with the further artists and wordings

    @property
    def drawings(self) -> list[tuple[str, str]]:
        """Return (concept, artist) of every picture."""
        return [(c["id"], artist) for c in self.concepts for artist in c["artists"]]

    def texts(self) -> Iterator[str]:
        """Yield every question and every answer, as they are written after each other: for the tokenizer."""
        for fact in self.facts:
            for form in ("image", "text"):
                if form == "image" or "it" in fact or "city" in fact:
                    for template in self.templates[fact["type"]].get(form, ()):
                        yield f"{template.format(**fact)} {fact['answer']}"
        for template in self.templates["background"]["image"]:
            yield from (f"{template} {colour}" for colour in self.backgrounds)


def load_emojikb(
    n: int | None,
    held_out_concepts: int,
    held_out_artists: int,
    folder: Path = DATA,
    *,
    further: int | None = None,
) -> EmojiKB:
    """Read the data set; with `n`, only that many concepts, a third of them flags of countries.

    `further` opens the world: all artists and wordings that may be trained on, of which so many drawings are left out.
    """
    concepts = lines(folder / "concepts.jsonl.gz")
    if n is not None:
        ranked = sorted(concepts, key=lambda c: number("small", c["id"]))
        flags = [c for c in ranked if c.get("capital")][: n // 3]
        concepts = flags + [c for c in ranked if "country" not in c][: n - len(flags)]
    known = {c["id"] for c in concepts}
    holdout = choose_holdout(concepts, held_out_concepts, held_out_artists)
    templates = json.loads((folder / "templates.json").read_text(encoding="utf-8"))
    if further is not None:
        from mini_vlm_open import all_wordings, further_drawings

        concepts = further_drawings(concepts, folder)
        holdout = with_further_holdout(holdout, concepts, further)
        templates = all_wordings(templates, "train", folder)
    return EmojiKB(
        concepts,
        [fact for fact in lines(folder / "facts.jsonl.gz") if fact["concept"] in known],
        templates,
        json.loads((folder / "backgrounds.json").read_text(encoding="utf-8")),
        holdout,
        further is not None,
    )


def rgb(colour: str) -> list[int]:
    """Return #rrggbb as three numbers."""
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


class Pictures:
    """All pictures in one tensor, and the labels of the classification heads.

    rgba: (n, 4, 64, 64) uint8; concept: (n,); labels: (C, 3), name, kind and category; usable: indices that may be
    trained on; grounds: (8, 3), the named backgrounds, in 0..255.
    """

    def __init__(self, kb: EmojiKB, device: torch.device, folder: Path = DATA) -> None:
        place = {c["id"]: i for i, c in enumerate(kb.concepts)}
        self.rgba = torch.stack(
            [read_picture(folder / a / f"{c}.png") for c, a in kb.drawings]
        ).to(device)
        self.concept = torch.tensor([place[c] for c, _ in kb.drawings], device=device)
        usable = [i for i, (c, a) in enumerate(kb.drawings) if kb.holdout.allows(c, a)]
        self.usable = torch.tensor(usable, device=device)
        self.grounds = torch.tensor(
            [rgb(c) for c in kb.backgrounds.values()],
            device=device,
            dtype=torch.float32,
        )
        classes = {head: sorted({c[head] for c in kb.concepts}) for head in HEADS[:3]}
        labels = [
            [classes[head].index(c[head]) for head in classes] for c in kb.concepts
        ]
        self.labels = torch.tensor(labels, device=device)
        self.sizes = {
            **{head: len(names) for head, names in classes.items()},
            "background": len(kb.backgrounds),
        }

    def order(self, generator: Generator) -> Tensor:
        """Return the usable pictures in a random order."""
        return self.usable[
            torch.randperm(
                len(self.usable), generator=generator, device=self.usable.device
            )
        ]

    def some(self, n: int, generator: Generator) -> Tensor:
        """Return n of the usable pictures."""
        return self.usable[
            torch.randint(
                len(self.usable), (n,), generator=generator, device=self.usable.device
            )
        ]

    def draw(self, chosen: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return augmented pictures (B, 3, 64, 64) in 0..255 and the index of their named background (B,), or -1."""
        grounds, colour = self.backgrounds(len(chosen), generator)
        rgba = shifted(self.rgba[chosen], SHIFT, generator)
        light = 1 + BRIGHTNESS * (
            2
            * torch.rand(len(chosen), 1, 1, 1, generator=generator, device=rgba.device)
            - 1
        )
        drawing = (rgba[:, :3] * light).clamp(max=255)
        return composed(drawing, rgba[:, 3:], grounds), colour

    def backgrounds(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return colours (n, 3) by chance, in 0..255, and which of the named ones each is (n,), or -1."""
        device = self.grounds.device
        which = torch.rand(n, generator=generator, device=device)
        colour = torch.randint(
            len(self.grounds), (n,), generator=generator, device=device
        )
        anything = DARKEST + (255 - DARKEST) * torch.rand(
            n, 3, generator=generator, device=device
        )
        anything[which > 1 - WHITE] = 255.0
        named = which < NAMED
        return torch.where(named[:, None], self.grounds[colour], anything), torch.where(
            named, colour, NONE
        )


def read_picture(path: Path) -> Tensor:
    """Return a picture as (4, H, W), uint8."""
    with Image.open(path) as image:
        data = bytearray(image.convert("RGBA").tobytes())
        return (
            torch.frombuffer(data, dtype=torch.uint8)
            .view(image.height, image.width, 4)
            .permute(2, 0, 1)
        )


def composed(drawing: Tensor, alpha: Tensor, grounds: Tensor) -> Tensor:
    """Put drawings on colours, rounded like PIL: (B, 3, H, W), (B, 1, H, W) and (B, 3), all 0..255 -> (B, 3, H, W)."""
    share = alpha.float() / 255
    return (grounds[:, :, None, None] * (1 - share) + drawing * share).round()


def shifted(rgba: Tensor, most: int, generator: Generator) -> Tensor:
    """Move every picture by up to `most` pixels in both directions; what comes in is transparent."""
    n, channels, height, width = rgba.shape
    device = rgba.device
    offset = torch.randint(2 * most + 1, (2, n, 1), generator=generator, device=device)
    rows = (torch.arange(height, device=device) + offset[0])[:, None, :, None]
    columns = (torch.arange(width, device=device) + offset[1])[:, None, None, :]
    index = torch.arange(n, device=device)[:, None, None, None]
    return F.pad(rgba, (most,) * 4)[
        index, torch.arange(channels, device=device)[:, None, None], rows, columns
    ]


@dataclass(frozen=True)
class Rows:
    """A batch of sequences: ids and mask (B, T); `predicting` (B, T) bool, whose logits give `answers` (N,)."""

    ids: Tensor
    mask: Tensor
    predicting: Tensor
    answers: Tensor


class Questions:
    """Every question with its answer as the adapter encodes it, closed by the end token.

    with_picture: (C, 9, 4) and on_colour: (8, 4) hold rows of questions about a picture, text: (n, 3) those without,
    weights: (C, 9) how often each type is asked; -1 and 0 where there is nothing to ask. length: (R,) in tokens.
    """

    def __init__(
        self, kb: EmojiKB, adapter: VisionLanguageModel, device: torch.device
    ) -> None:
        self._adapter = adapter
        self._known: dict[tuple[str, str, bool], int] = {}
        self._encoded: list[Encoded] = []
        place = {c["id"]: i for i, c in enumerate(kb.concepts)}
        with_picture = torch.full((len(place), len(TYPES), 4), NONE)
        text: list[list[int]] = []
        for fact in kb.facts:
            if kb.holdout.allows(fact["concept"]):
                templates, kind = kb.templates[fact["type"]], TYPES.index(fact["type"])
                rows = [self._row(t, fact["answer"], True) for t in templates["image"]]
                with_picture[place[fact["concept"]], kind] = torch.tensor(rows)
                if "it" in fact or "city" in fact:
                    text.append(
                        [
                            self._row(t.format(**fact), fact["answer"], False)
                            for t in templates["text"]
                        ]
                    )
        colours = [
            [self._row(t, c, True) for t in kb.templates["background"]["image"]]
            for c in kb.backgrounds
        ]
        self.with_picture, self.on_colour = (
            with_picture.to(device),
            torch.tensor(colours, device=device),
        )
        self.text = torch.tensor(text, device=device)
        asked = torch.tensor([float(WEIGHTS[name]) for name in TYPES])
        self.weights = (asked * (with_picture[..., 0] != NONE)).to(device)
        self._ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(e.ids) for e in self._encoded], batch_first=True
        )
        self._ids = self._ids.to(device)
        self.length = torch.tensor([len(e.ids) for e in self._encoded], device=device)
        self._n_answer = torch.tensor(
            [e.n_answer for e in self._encoded], device=device
        )
        first = next(e for e in self._encoded if e.n_image)
        self.image_start, self.n_image = first.image_start, first.n_image

    def _row(self, prompt: str, answer: str, picture: bool) -> int:
        key = (prompt, answer, picture)
        if key not in self._known:
            encoded = self._adapter.encode(
                Query(prompt, answer, Path("any.png") if picture else None)
            )
            ids = [*encoded.ids, self._adapter.tokenizer.eos_token_id]
            self._known[key] = len(self._encoded)
            self._encoded.append(
                Encoded(ids, encoded.image_start, encoded.n_image, encoded.n_answer + 1)
            )
        return self._known[key]

    def ask(
        self, concept: Tensor, colour: Tensor, count: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return `count` different questions about each picture: rows (B, count) and their types (B, count)."""
        weights = self.weights[concept]
        weights[:, BACKGROUND] = torch.where(colour != NONE, WEIGHTS["background"], 0.0)
        kinds = torch.multinomial(weights, count, generator=generator)
        wording = torch.randint(
            4, kinds.shape, generator=generator, device=kinds.device
        )
        about = self.with_picture[concept[:, None], kinds, wording]
        return torch.where(
            kinds == BACKGROUND, self.on_colour[colour[:, None], wording], about
        ), kinds

    def ask_text(self, count: int, generator: Generator) -> Tensor:
        """Return rows (count,) of questions without a picture."""
        device = self.text.device
        fact = torch.randint(
            len(self.text), (count,), generator=generator, device=device
        )
        return self.text[
            fact, torch.randint(3, (count,), generator=generator, device=device)
        ]

    def rows(self, chosen: Tensor) -> Rows:
        """Return the sequences of some rows, padded on the right."""
        length, n_answer = self.length[chosen, None], self._n_answer[chosen, None]
        ids = self._ids[chosen, : int(length.max())]
        at = torch.arange(ids.shape[1], device=ids.device)
        answer = (at >= length - n_answer) & (at < length)
        return Rows(ids, (at < length).long(), answer.roll(-1, dims=1), ids[answer])
