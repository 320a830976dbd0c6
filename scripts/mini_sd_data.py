"""What mini-sd is shown: which concepts, on which backgrounds, and what is written under the pictures.

The judge of its pictures is a mini vision-language model, so it draws only what that one was trained to name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mini_vlm_data import (
    NONE,
    ROOT,
    EmojiKB,
    Holdout,
    Pictures,
    choose_holdout,
    composed,
    load_emojikb,
    number,
    rgb,
)
from torch import Generator, Tensor

MODELS = ROOT / "data" / "models"
WHITE = "white"
EMPTY, KIND = (
    0.1,
    0.1,
)  # shares of captions that say nothing, and that say the kind instead of the name
# how often a caption has each form
FORMS = {
    "{artist} drawing of {it} on {ground}": 4,
    "a drawing of {it} on {ground}": 2,
    "{artist} drawing of {it}": 1,
    "a drawing of {it}": 1,
    "{it} on {ground}": 1,
    "{it}": 1,
}
FULL = next(iter(FORMS))


def article(words: str) -> str:
    """Return the words with `a` or `an` before them."""
    return f"{'an' if words[:1].lower() in set('aeiou') else 'a'} {words}"


def caption(form: str, it: str, colour: str, artist: str = "") -> str:
    """Return a caption in one of FORMS."""
    return form.format(
        artist=article(artist), it=it, ground=f"{article(colour)} background"
    )


@dataclass(frozen=True)
class Drawn:
    """EmojiKB as the model meets it.

    `kb.concepts` are all it could be shown, `kb.holdout` what it never sees: what the judge does not know either, and
    `held_out`, concepts of its own kinds that are left to be learned later. `concepts` are those it is taught to draw.
    """

    kb: EmojiKB
    concepts: list[dict[str, Any]]
    held_out: list[dict[str, Any]]

    @property
    def drawings(self) -> list[tuple[dict[str, Any], str]]:
        """Return (concept, artist) of every picture that the model is taught to draw."""
        return [
            (c, a)
            for c in self.concepts
            for a in c["artists"]
            if self.kb.holdout.allows(c["id"], a)
        ]

    @property
    def grounds(self) -> dict[str, str]:
        """Return the colours of the backgrounds by name: #rrggbb."""
        return {**self.kb.backgrounds, WHITE: "#ffffff"}

    def texts(self) -> Iterator[str]:
        """Yield every word a caption may have, as it is written there, held-out concepts included."""
        for concept in (*self.concepts, *self.held_out):
            yield from (concept["it"], article(concept["kind"]))
        artists = sorted({artist for _, artist in self.drawings})
        yield from (
            caption(FULL, "", colour, artist)
            for artist in artists
            for colour in self.grounds
        )


def load_drawn(
    judge: str, categories: list[str], held_out: int, concepts: int | None
) -> Drawn:
    """Read the data set; with `concepts`, only that many are shown. `held_out` more are chosen by hash.

    Held out are only concepts of which every drawing is there, and whose kind has others that are taught.
    """
    unknown = Holdout(
        **json.loads((MODELS / judge / "holdout.json").read_text(encoding="utf-8"))
    )
    kb = load_emojikb(None, 0, 0)
    known = [
        c
        for c in kb.concepts
        if c["category"] in categories and unknown.allows(c["id"])
    ]
    lonely = {
        c["kind"]
        for c in known
        if sum(c["kind"] == other["kind"] for other in known) < 5
    }
    out = choose_holdout(
        [c for c in known if c["kind"] not in lonely and len(c["artists"]) == 4],
        held_out,
        0,
    ).concepts
    taught = [c for c in known if c["id"] not in out]
    if concepts is not None:
        taught = sorted(taught, key=lambda c: number("small", c["id"]))[:concepts]
    holdout = Holdout(tuple(sorted({*unknown.concepts, *out})), unknown.artists)
    left = [c for c in known if c["id"] in out]
    shown = kb.concepts if concepts is None else [*taught, *left]
    return Drawn(
        EmojiKB(**{**vars(kb), "concepts": shown, "holdout": holdout}), taught, left
    )


class Captions:
    """Writes captions by chance, under pictures that are named by their place in `drawn.drawings`."""

    def __init__(self, drawn: Drawn, tokenizer: Any) -> None:
        self._drawings, self._colours, self._tokenizer = (
            drawn.drawings,
            list(drawn.grounds),
            tokenizer,
        )
        self._weights = torch.tensor([float(weight) for weight in FORMS.values()])

    def write(
        self,
        chosen: Tensor,
        colour: Tensor,
        generator: Generator,
        beside: Tensor | None = None,
    ) -> list[str]:
        """Return a caption for each of some pictures (B,) on colours (B,), where not NONE with another `beside` it."""
        device = generator.device
        form = torch.multinomial(
            self._weights.to(device), len(chosen), replacement=True, generator=generator
        )
        chance = torch.rand(len(chosen), generator=generator, device=device)
        others = [NONE] * len(chosen) if beside is None else beside.tolist()
        captions = []
        for i, j, k, f, p in zip(
            chosen.tolist(),
            others,
            colour.tolist(),
            form.tolist(),
            chance.tolist(),
            strict=True,
        ):
            concept, artist = self._drawings[i]
            it = article(concept["kind"]) if p > 1 - KIND else concept["it"]
            it = it if j == NONE else f"{it} and {self._drawings[j][0]['it']}"
            captions.append(
                ""
                if p < EMPTY
                else caption(list(FORMS)[f], it, self._colours[k], artist)
            )
        return captions

    def encode(self, captions: list[str]) -> Tensor:
        """Return token ids (B, T), padded to the longest the text encoder reads, as the pipeline does."""
        encoded = self._tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids: Tensor = encoded["input_ids"]
        return ids


def on_colour(pictures: Pictures, rows: Tensor, colour: str) -> Tensor:
    """Return pictures (B,) on a background #rrggbb: (B, 3, 64, 64) in -1..1, as a VAE takes them."""
    return scaled(_composed(pictures, rows, colours([colour], rows)))


def side_by_side(
    pictures: Pictures, left: Tensor, right: Tensor, grounds: Tensor
) -> Tensor:
    """Return pictures (B,) and (B,) in half their size beside each other on colours (B, 3): as `on_colour`."""
    halves = [
        F.avg_pool2d(_composed(pictures, rows, grounds), 2) for rows in (left, right)
    ]
    scene = torch.cat(halves, -1)
    bar = grounds[:, :, None, None].expand(-1, -1, scene.shape[2] // 2, scene.shape[3])
    return scaled(torch.cat([bar, scene.round(), bar], -2))


def colours(named: Sequence[str], like: Tensor) -> Tensor:
    """Return colours #rrggbb as (n, 3) in 0..255, where `like` is."""
    return torch.tensor(
        [rgb(colour) for colour in named], device=like.device, dtype=torch.float32
    )


def _composed(pictures: Pictures, rows: Tensor, grounds: Tensor) -> Tensor:
    rgba = pictures.rgba[rows]
    return composed(rgba[:, :3], rgba[:, 3:], grounds.expand(len(rows), 3))


def scaled(pixels: Tensor) -> Tensor:
    """Return pixels in 0..255 as -1..1."""
    return pixels / 127.5 - 1
