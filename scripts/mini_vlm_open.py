"""EmojiKB as an open world for training: all training artists, all training wordings, pictures changed in many ways.

What only evaluation may use (two artists, twenty wordings a type) is not read here. Shapes as in mini_vlm_data: n
pictures, C concepts, B batch.
"""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emojikb_artists import FURTHER, TRAINING, is_country
from mini_vlm_data import (
    BACKGROUND,
    DATA,
    NONE,
    TYPES,
    WEIGHTS,
    EmojiKB,
    Pictures,
    Rows,
    lines,
)
from PIL import Image
from torch import Generator, Tensor

from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Encoded
from mmedit_cli.types import Query

# Geometry: shares of pictures and ranges. What is not moved stays as sharp as evaluation shows it.
UNMOVED = 0.25
TURN, SHEAR = math.radians(15), 0.1
SCALE = 0.3  # in logarithms: 0.74 to 1.35
SHIFT = 0.13  # of half a side
# Colour: ranges around 1, of things and of country flags, whose colours are what they are.
GAIN, SATURATION = (0.2, 0.07), (0.6, 0.2)
# Backgrounds: named and white ones; the rest is any colour, a gradient or a texture, one third each.
NAMED, WHITE = 0.5, 0.14
DARK = 90.0  # of a background, in 0..255: black lines would not be seen on it
BLURRED, COMPRESSED = 0.15, 0.1
# Another hand: how often a drawing gets other hues, no colours, few colours, outlines, or loses a part.
HUED, ANY_HUE, GREY, FLAT, OUTLINED, CUT = 0.5, 0.1, 0.1, 0.15, 0.2, 0.15
HUE = 0.35  # radians, either way, of what keeps its hue more or less
LEVELS = (3, 6)  # of each colour, in what has few
BENT = 0.09  # of half a side: how far a shape is bent, one standard deviation
QUALITY = (25, 80)  # of JPEG
UNTURNED = {"flags", "symbols"}  # mirrored, these may be something else
# Wordings: how often a question is framed, written small, without its mark, with a slip, or with a word lost.
FRAMED, SMALL, UNMARKED, SLIP, LOST, UNKNOWN = 0.15, 0.25, 0.2, 0.1, 0.08, 0.08
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def further_drawings(
    concepts: list[dict[str, Any]], folder: Path = DATA
) -> list[dict[str, Any]]:
    """Return the concepts with the further artists that may be trained on."""
    artists = json.loads((folder / "artists.json").read_text(encoding="utf-8"))
    drawn = {r["id"]: r["artists"] for r in lines(folder / "drawings.jsonl.gz")}
    return [
        {
            **concept,
            "artists": [
                *concept["artists"],
                *(
                    artist
                    for artist in drawn.get(concept["id"], ())
                    if artists[artist]["use"] == TRAINING
                ),
            ],
        }
        for concept in concepts
    ]


def all_wordings(
    templates: dict[str, dict[str, list[str]]], side: str, folder: Path = DATA
) -> dict[str, dict[str, list[str]]]:
    """Return the templates with the wordings of a side behind those about a picture."""
    wordings = json.loads((folder / "wordings.json").read_text(encoding="utf-8"))
    return {
        kind: {**forms, "image": [*forms["image"], *wordings[kind][side]]}
        for kind, forms in templates.items()
    }


class OpenPictures(Pictures):
    """Pictures that are turned, scaled, mirrored, recoloured, blurred and put on anything when they are drawn."""

    def __init__(self, kb: EmojiKB, device: torch.device, folder: Path = DATA) -> None:
        super().__init__(kb, device, folder)
        turns = [c["category"] not in UNTURNED for c in kb.concepts]
        self._turns = torch.tensor(turns, device=device)[self.concept]
        flags = [is_country(c) for c, _ in kb.drawings]
        self._flag = torch.tensor(flags, device=device)
        lined = [artist.endswith("-line") for _, artist in kb.drawings]
        self._line = torch.tensor(lined, device=device)
        self._others = _others(self.concept, self.usable, len(kb.concepts))
        first = [artist not in FURTHER for _, artist in kb.drawings]
        self.plain = self.usable[torch.tensor(first, device=device)[self.usable]]

    def draw_plainly(
        self, chosen: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return pictures as the closed world draws them (B, 3, 64, 64) in 0..255, and their background (B,)."""
        return super().draw(chosen, generator)

    def ground_of(self, pixels: Tensor) -> Tensor:
        """Return the named background that the corners of pictures (B, 3, H, W) in 0..255 look most like: (B,)."""
        edge = pixels.shape[-1] // 8
        left, right = pixels[..., :edge], pixels[..., -edge:]
        sides = torch.cat((left, right), -1)
        top, bottom = sides[..., :edge, :], sides[..., -edge:, :]
        corners = torch.cat((top, bottom), -2)
        colour = corners.mean((2, 3))
        distance = torch.cdist(colour, self.grounds)
        return distance.argmin(-1)

    def partners(self, chosen: Tensor, generator: Generator) -> Tensor:
        """Return for each picture a usable one of the same concept, of another artist where there is one: (B,)."""
        mine = self._others[self.concept[chosen]]
        other = (mine != NONE) & (mine != chosen[:, None])
        weights = torch.where(other.any(1, keepdim=True), other, mine != NONE)
        place = torch.multinomial(weights.float(), 1, generator=generator)
        return mine.gather(1, place)[:, 0]

    def draw(self, chosen: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return changed pictures (B, 3, 64, 64) in 0..255 and the index of their named background (B,), or -1."""
        grounds, colour = self.grounds_behind(len(chosen), generator)
        rgba = self.rgba[chosen].float() / 255
        drawing = self._recoloured(rgba[:, :3], chosen, grounds, generator)
        drawing = restyled(drawing, rgba[:, 3:], self._flag[chosen], generator)
        moved = moved_about(
            torch.cat((drawing * rgba[:, 3:], rgba[:, 3:]), 1),
            self._turns[chosen],
            generator,
        )
        moved = moved * kept(len(chosen), moved.shape[-1], generator)
        pictures = 255 * moved[:, :3] + grounds * (1 - moved[:, 3:])
        return spoilt(pictures.clamp(0, 255), generator).round(), colour

    def grounds_behind(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return what lies behind n drawings (n, 3, 64, 64), in 0..255, and which named colour it is (n,), or -1."""
        which = torch.rand(n, generator=generator)
        colour = torch.randint(len(self.grounds), (n,), generator=generator)
        plain = 255 * torch.rand(n, 3, generator=generator)
        plain[(which >= NAMED) & (which < NAMED + WHITE)] = 255.0
        named = which < NAMED
        plain = torch.where(named[:, None], self.grounds[colour], plain)
        side = self.rgba.shape[-1]
        grounds = plain[:, :, None, None].expand(-1, -1, side, side).clone()
        rest = 1 - NAMED - WHITE
        gradient = which > 1 - rest / 3
        texture = ~gradient & (which > 1 - 2 * rest / 3)
        grounds[gradient] = gradients(int(gradient.sum()), side, generator)
        grounds[texture] = textures(int(texture.sum()), side, generator)
        return grounds, torch.where(named, colour, NONE)

    def _recoloured(
        self, drawing: Tensor, chosen: Tensor, grounds: Tensor, generator: Generator
    ) -> Tensor:
        """Change the colours of drawings (B, 3, 64, 64) in 0..1; drawings of lines take any that can be seen."""
        flag = self._flag[chosen]
        gain, saturation = (
            torch.where(flag, of_flags, of_things)[:, None, None, None]
            for of_things, of_flags in (GAIN, SATURATION)
        )
        n = len(chosen)
        change = 2 * torch.rand(n, 5, 1, 1, generator=generator) - 1
        grey = drawing.mean(1, keepdim=True)
        done = grey + (drawing - grey) * (1 + saturation * change[:, :1])
        done = done * (1 + gain * change[:, 1:2]) * (1 + 0.5 * gain * change[:, 2:])
        ink = 0.35 * torch.rand(n, 3, 1, 1, generator=generator)
        dark = grounds.mean((1, 2, 3)) < DARK
        ink = torch.where(dark[:, None, None, None], 1 - ink, ink)
        line = self._line[chosen][:, None, None, None]
        return torch.where(line, ink.expand_as(drawing), done).clamp(0, 1)


def restyled(
    drawing: Tensor, alpha: Tensor, flag: Tensor, generator: Generator
) -> Tensor:
    """Draw as another artist might: drawings (B, 3, H, W) and alpha (B, 1, H, W) in 0..1; flags (B,) keep colours."""
    chance = torch.rand(len(drawing), 5, generator=generator)
    done = _with_hue(drawing, chance[:, 0], flag, generator)
    grey = (chance[:, 1] < GREY) & ~flag
    done = torch.where(_wide(grey), done.mean(1, keepdim=True).expand_as(done), done)
    levels = torch.randint(*LEVELS, (len(drawing), 1, 1, 1), generator=generator)
    flat = _wide(chance[:, 2] < FLAT)
    done = torch.where(flat, (done * levels).round() / levels, done)
    outlined = chance[:, 3] < OUTLINED
    if outlined.any():
        dark = edges(done[outlined], alpha[outlined])
        done[outlined] = done[outlined] * (1 - dark)
    return done.clamp(0, 1)


def _wide(mask: Tensor) -> Tensor:
    return mask[:, None, None, None]


def _with_hue(
    drawing: Tensor, chance: Tensor, flag: Tensor, generator: Generator
) -> Tensor:
    """Turn the colours of some drawings (B, 3, H, W) about the greys (Rodrigues' formula)."""
    turn = 2 * torch.rand(len(drawing), generator=generator) - 1
    angle = torch.where(chance < ANY_HUE, math.pi * turn, HUE * turn)
    is_turned = (chance < HUED) & ~flag
    angle = torch.where(is_turned, angle, 0.0)[:, None, None]
    along = torch.full((3, 3), 1 / 3)
    around = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    cross = around / math.sqrt(3)
    cos = torch.cos(angle)
    still = cos * torch.eye(3)
    rotation = still + torch.sin(angle) * cross + (1 - cos) * along
    return torch.einsum("bij,bjhw->bihw", rotation, drawing)


def edges(drawing: Tensor, alpha: Tensor) -> Tensor:
    """Return how much each pixel is an edge: (B, 3, H, W) and (B, 1, H, W) in 0..1 -> (B, 1, H, W) in 0..1."""
    whole = torch.cat((drawing * alpha, alpha), 1)
    most = F.max_pool2d(whole, 3, 1, 1)
    least = -F.max_pool2d(-whole, 3, 1, 1)
    contrast = (most - least).amax(1, keepdim=True)
    return (2 * contrast - 0.3).clamp(0, 1)


def _others(concept: Tensor, usable: Tensor, n: int) -> Tensor:
    """Return the usable pictures of each concept, padded with -1: (C, most)."""
    of = [usable[concept[usable] == place] for place in range(n)]
    return torch.nn.utils.rnn.pad_sequence(of, batch_first=True, padding_value=NONE)


def moved_about(pictures: Tensor, turns: Tensor, generator: Generator) -> Tensor:
    """Turn, scale, shear, shift and mirror pictures (B, 4, H, W); what comes in is empty."""
    n = len(pictures)
    change = 2 * torch.rand(n, 6, generator=generator) - 1
    chance = torch.rand(n, 2, generator=generator)
    angle, scale = TURN * change[:, 0], torch.exp(-SCALE * change[:, 1])
    mirror = torch.where((chance[:, 0] < 0.5) & turns, -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack(
        (
            torch.stack((cos * mirror, -sin, SHIFT * change[:, 2]), 1),
            torch.stack(
                (sin * mirror, cos * (1 + SHEAR * change[:, 4]), SHIFT * change[:, 3]),
                1,
            ),
        ),
        1,
    )
    grid = F.affine_grid(rows, list(pictures.shape), align_corners=False)
    grid = grid + bends(n, pictures.shape[-1], generator)
    moved = F.grid_sample(pictures, grid, align_corners=False)
    still = (chance[:, 1] < UNMOVED)[:, None, None, None]
    return torch.where(still, pictures, moved)


def bends(n: int, side: int, generator: Generator) -> Tensor:
    """Return smooth random displacements of n pictures: (n, side, side, 2), of half a side."""
    coarse = BENT * torch.randn(n, 2, 4, 4, generator=generator)
    amount = torch.rand(n, 1, 1, 1, generator=generator)
    smooth = F.interpolate(coarse * amount, size=(side, side), mode="bicubic")
    return smooth.permute(0, 2, 3, 1)


def gradients(n: int, side: int, generator: Generator) -> Tensor:
    """Return n gradients between two colours in any direction: (n, 3, side, side) in 0..255."""
    ends = 255 * torch.rand(2, n, 3, 1, 1, generator=generator)
    angle = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    at = torch.linspace(-0.7, 0.7, side)
    along = torch.cos(angle) * at[None, :, None] + torch.sin(angle) * at[None, None]
    share = (along + 0.5).clamp(0, 1)[:, None]
    return ends[0] * share + ends[1] * (1 - share)


def kept(n: int, side: int, generator: Generator) -> Tensor:
    """Return what is left of n drawings: ones, and in some a square of zeros: (n, 1, side, side)."""
    at = torch.linspace(-1, 1, side)
    middle = 2 * torch.rand(n, 2, 1, 1, generator=generator) - 1
    half = 0.15 + 0.2 * torch.rand(n, 1, 1, generator=generator)
    across = (at[None, None] - middle[:, 0]).abs() < half
    down = (at[None, :, None] - middle[:, 1]).abs() < half
    cut = torch.rand(n, 1, 1, generator=generator) < CUT
    return 1.0 - (across & down & cut).float()[:, None]


def textures(n: int, side: int, generator: Generator) -> Tensor:
    """Return n textures like photos out of focus, with grain: (n, 3, side, side) in 0..255."""
    if n == 0:
        return torch.zeros(0, 3, side, side)
    base = torch.rand(n, 3, 1, 1, generator=generator)
    spots = base + 0.35 * torch.randn(n, 3, 5, 5, generator=generator)
    smooth = F.interpolate(spots, size=(side, side), mode="bilinear")
    grain = 0.06 * torch.randn(n, 1, side, side, generator=generator)
    return 255 * (smooth + grain).clamp(0, 1)


def spoilt(pictures: Tensor, generator: Generator) -> Tensor:
    """Blur some pictures (B, 3, H, W) in 0..255, and pass some through JPEG."""
    chance = torch.rand(len(pictures), 3, generator=generator)
    blurred = chance[:, 0] < BLURRED
    if blurred.any():
        soft = pictures[blurred]
        for _ in range(2):
            soft = F.avg_pool2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), 3, 1)
        share = chance[blurred, 1][:, None, None, None]
        pictures = pictures.clone()
        pictures[blurred] = soft * share + pictures[blurred] * (1 - share)
    for place in (chance[:, 1] < COMPRESSED).nonzero()[:, 0].tolist():
        quality = QUALITY[0] + int(chance[place, 2] * (QUALITY[1] - QUALITY[0]))
        pictures[place] = _through_jpeg(pictures[place], quality)
    return pictures


def _through_jpeg(picture: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    pixels = picture.permute(1, 2, 0).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(picture.dtype)


def noisy(text: str, frames: list[str], chance: random.Random) -> str:
    """Return a question as people may type it: framed, small, without its mark, with a slip or a word lost."""
    words = text.split()
    if chance.random() < LOST and len(words) > 3:
        del words[chance.randrange(len(words))]
    if chance.random() < UNKNOWN:
        letters = chance.choices(LETTERS, k=chance.randint(4, 8))
        words[chance.randrange(len(words))] = "".join(letters)
    if chance.random() < SLIP:
        place = chance.randrange(len(words))
        words[place] = _slip(words[place], chance)
    text = " ".join(words)
    if chance.random() < UNMARKED:
        text = text.rstrip("?.") or text
    if chance.random() < FRAMED:
        text = chance.choice(frames).format(text)
    return text.lower() if chance.random() < SMALL else text


def _slip(word: str, chance: random.Random) -> str:
    """Swap two letters, or leave one out."""
    if len(word) < 4:
        return word
    at = chance.randrange(1, len(word) - 1)
    if chance.random() < 0.5:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :]


class OpenQuestions:
    """Questions in all training wordings, made noisy; each batch is worded and encoded anew.

    It stands in for `mini_vlm_data.Questions`: `rows` takes what `ask` and `ask_text` have returned since the last
    `ask`.
    """

    def __init__(
        self,
        kb: EmojiKB,
        adapter: VisionLanguageModel,
        device: torch.device,
        folder: Path = DATA,
    ) -> None:
        self._adapter, self._device = adapter, device
        place = {c["id"]: i for i, c in enumerate(kb.concepts)}
        self._wordings = [kb.templates[kind]["image"] for kind in TYPES]
        wordings = json.loads((folder / "wordings.json").read_text(encoding="utf-8"))
        self._frames: list[str] = wordings["frames"]["train"]
        self._answers: dict[tuple[int, int], str] = {}
        self._colours = list(kb.backgrounds)
        self._texts: list[tuple[list[str], str]] = []
        for fact in kb.facts:
            if kb.holdout.allows(fact["concept"]):
                key = place[fact["concept"]], TYPES.index(fact["type"])
                self._answers[key] = fact["answer"]
                if "it" in fact or "city" in fact:
                    templates = kb.templates[fact["type"]]["text"]
                    texts = [template.format(**fact) for template in templates]
                    self._texts.append((texts, fact["answer"]))
        asked = torch.zeros(len(place), len(TYPES))
        for concept, kind in self._answers:
            asked[concept, kind] = WEIGHTS[TYPES[kind]]
        self.weights = asked.to(device)
        self._encoded: list[Encoded] = []
        first = self._encode(Query("What is this?", "a", Path("any.png")))
        self.image_start, self.n_image = first.image_start, first.n_image

    @property
    def length(self) -> Tensor:
        """Return how many tokens each row has that was asked since the last `ask`: (R,)."""
        lengths = [len(row.ids) for row in self._encoded]
        return torch.tensor(lengths, device=self._device)

    def ask(
        self, concept: Tensor, colour: Tensor, count: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return `count` different questions about each picture: rows (B, count) and their types (B, count)."""
        self._encoded = []
        weights = self.weights[concept]
        weights[:, BACKGROUND] = torch.where(colour != NONE, WEIGHTS["background"], 0.0)
        kinds = torch.multinomial(weights, count, generator=generator)
        chance = _python_chance(generator)
        rows = []
        for about, ground, asked in zip(
            concept.tolist(), colour.tolist(), kinds.tolist(), strict=True
        ):
            for kind in asked:
                behind = kind == BACKGROUND
                answer = self._colours[ground] if behind else self._answers[about, kind]
                prompt = chance.choice(self._wordings[kind])
                rows.append(self._row(prompt, answer, chance, picture=True))
        return torch.tensor(rows, device=self._device).view(kinds.shape), kinds

    def ask_text(self, count: int, generator: Generator) -> Tensor:
        """Return rows (count,) of questions without a picture."""
        chance = _python_chance(generator)
        rows = []
        for _ in range(count):
            texts, answer = chance.choice(self._texts)
            prompt = chance.choice(texts)
            rows.append(self._row(prompt, answer, chance, picture=False))
        return torch.tensor(rows, device=self._device, dtype=torch.long)

    def _row(
        self, prompt: str, answer: str, chance: random.Random, *, picture: bool
    ) -> int:
        if picture:  # names of things in a text are not to be misspelt
            prompt = noisy(prompt, self._frames, chance)
        image = Path("any.png") if picture else None
        self._encoded.append(self._encode(Query(prompt, answer, image)))
        return len(self._encoded) - 1

    def _encode(self, query: Query) -> Encoded:
        encoded = self._adapter.encode(query)
        ids = [*encoded.ids, self._adapter.tokenizer.eos_token_id]
        return Encoded(ids, encoded.image_start, encoded.n_image, encoded.n_answer + 1)

    def encoded(self, row: int) -> Encoded:
        """Return the sequence of one row, with the end token behind its answer."""
        return self._encoded[row]

    def rows(self, chosen: Tensor) -> Rows:
        """Return the sequences of some rows, padded on the right."""
        rows = [self._encoded[place] for place in chosen.tolist()]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row.ids) for row in rows], batch_first=True
        ).to(self._device)
        length = torch.tensor([[len(row.ids)] for row in rows], device=self._device)
        count = torch.tensor([[row.n_answer] for row in rows], device=self._device)
        at = torch.arange(ids.shape[1], device=self._device)
        answer = (at >= length - count) & (at < length)
        return Rows(ids, (at < length).long(), answer.roll(-1, dims=1), ids[answer])


def _python_chance(generator: Generator) -> random.Random:
    seed = torch.randint(1 << 62, (1,), generator=generator, device=generator.device)
    return random.Random(int(seed))
