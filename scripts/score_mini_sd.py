"""Measure what mini-sd draws: a mini vision-language model is shown its pictures and says what they are.

    python scripts/score_mini_sd.py runs/mini-sd/mini-sd                 # everything
    python scripts/score_mini_sd.py runs/mini-sd/mini-sd --sample 100    # at most 100 pictures a figure

Writes scores.json, a contact sheet (samples.webp) and the model card into the folder.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from mini_sd_data import FULL, MODELS, Drawn, article, caption, load_drawn, on_colour
from mini_vlm_data import Pictures, number
from PIL import Image, ImageDraw
from score_mini_vlm import (
    Item,
    answer,
    figures,
    measure_and_print,
    sampled,
    stages_table,
    table,
)
from torch import Tensor

from mmedit_cli import runtime
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.storage import write_atomic
from mmedit_cli.types import Query

TARGETS = {"name": 0.60, "background": 0.80}
SOURCES = ("the drawing itself", "through the autoencoder")
DRAWN = ("name", "kind", "background")  # what is asked of a picture of a concept
UNSIGNED = "a drawing of {it} on {ground}"
SHEET, LABEL, SIDE = (
    12,
    110,
    64,
)  # rows of the contact sheet; pixels of a row's name, and of a picture
BATCH = 32


@dataclass(frozen=True)
class Wish:
    """A picture to make, and what is then asked of it: (figure, type of question, answer).

    It is drawn by the model to a caption; or, with a source of SOURCES, it is the `drawing` (concept, artist) on a
    colour, as it is or through the autoencoder.
    """

    caption: str
    asks: tuple[tuple[str, str, str], ...]
    source: str = ""
    drawing: tuple[str, str] = ("", "")
    colour: str = ""

    @property
    def seed(self) -> int:
        """Return a number that depends on the caption alone."""
        return number("draw", self.caption)


def wishes(drawn: Drawn) -> Iterator[Wish]:
    """Yield all pictures that are measured; their colours are chosen by a hash."""
    colours = list(drawn.kb.backgrounds)

    def about(
        concept: dict[str, Any], colour: str, mark: str
    ) -> tuple[tuple[str, str, str], ...]:
        known = {"name": concept["name"], "kind": concept["kind"], "background": colour}
        return tuple((mark + kind, kind, known[kind]) for kind in DRAWN)

    def some_colour(*key: str) -> str:
        return colours[number("wish", *key) % len(colours)]

    for concept, artist in drawn.drawings:
        colour = some_colour(concept["id"], artist)
        asks = about(concept, colour, "")
        text = caption(FULL, concept["it"], colour, artist)
        yield Wish(text, (*asks, (f"name by {artist}", "name", concept["name"])))
        for source in SOURCES:
            yield Wish(
                text,
                about(concept, colour, f"{source}: "),
                source,
                (concept["id"], artist),
                colour,
            )
    for concept in drawn.concepts:
        colour = some_colour(concept["id"])
        yield Wish(
            caption(UNSIGNED, concept["it"], colour),
            about(concept, colour, "no artist named: "),
        )
    for concept in drawn.held_out:
        for artist in concept["artists"]:
            colour = some_colour(concept["id"], artist)
            text = caption(FULL, concept["it"], colour, artist)
            yield Wish(text, about(concept, colour, "held-out concept: "))
    for kind in sorted({c["kind"] for c in drawn.concepts}):
        for colour in colours:
            asks = (("kind in place of a name: kind", "kind", kind),)
            yield Wish(caption(UNSIGNED, article(kind), colour), asks)


class Painter:
    """Makes pictures (B, 3, 64, 64) in 0..1 with the pipeline of a model folder."""

    def __init__(
        self, model: Path, drawn: Drawn, device: str, steps: int, guidance: float
    ) -> None:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        self.device = runtime.resolve_device(device)
        self.pipe = StableDiffusionPipeline.from_pretrained(
            model, trust_remote_code=False, dtype=torch.float32
        )
        self.pipe.to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self._settings = {"num_inference_steps": steps, "guidance_scale": guidance}
        self._drawn, self._pictures = drawn, Pictures(drawn.kb, self.device)
        self._row = {key: i for i, key in enumerate(drawn.kb.drawings)}

    @torch.no_grad()
    def __call__(self, wanted: list[Wish]) -> Tensor:
        """Make the pictures of some wishes, all of one source."""
        source = wanted[0].source
        if not source:
            seeds = [torch.Generator().manual_seed(wish.seed) for wish in wanted]
            texts = [wish.caption for wish in wanted]
            made = self.pipe(
                texts, generator=seeds, output_type="pt", **self._settings
            ).images
        else:
            made = torch.cat([self._real(wish) for wish in wanted])
            if source == SOURCES[1]:
                made = self.pipe.vae.decode(
                    self.pipe.vae.encode(made).latent_dist.mean
                ).sample
            made = (made / 2 + 0.5).clamp(0, 1)
        return made.float().cpu()

    def _real(self, wish: Wish) -> Tensor:
        row = torch.tensor([self._row[wish.drawing]], device=self.device)
        return on_colour(self._pictures, row, self._drawn.grounds[wish.colour])


def pictures_of(
    wanted: list[Wish], paint: Callable[[list[Wish]], Tensor], folder: Path
) -> list[Path]:
    """Make all pictures, write them as `folder`/N.png, and return the paths in order."""
    paths = [folder / f"{i}.png" for i in range(len(wanted))]
    started, done = time.monotonic(), 0
    for source in ("", *SOURCES):
        now = [i for i, wish in enumerate(wanted) if wish.source == source]
        for start in range(0, len(now), BATCH):
            part = now[start : start + BATCH]
            for i, made in zip(part, paint([wanted[i] for i in part]), strict=True):
                image(made).save(paths[i])
            done += len(part)
            print(
                f"{done}/{len(wanted)} pictures  {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return paths


def image(pixels: Tensor) -> Image.Image:
    """Return (3, H, W) in 0..1 as a picture."""
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())


def sheet(drawn: Drawn, paint: Callable[[list[Wish]], Tensor]) -> bytes:
    """Return a WebP with a row a concept, chosen by hash: of each artist the drawing, and what the model draws."""
    colours = list(drawn.kb.backgrounds)
    artists = sorted({artist for _, artist in drawn.drawings})
    shown = [
        c
        for c in drawn.concepts
        if all(drawn.kb.holdout.allows(c["id"], a) for a in c["artists"])
    ]
    shown = sorted(shown, key=lambda c: number("sheet", c["id"]))[:SHEET]
    paper = Image.new(
        "RGB", (LABEL + 2 * len(artists) * SIDE, 20 + len(shown) * SIDE), "white"
    )
    pen = ImageDraw.Draw(paper)
    for i, artist in enumerate(artists):
        pen.text((LABEL + 2 * i * SIDE + 4, 4), f"{artist}: drawing, model", "black")
    for row, concept in enumerate(shown):
        pen.text((4, 20 + row * SIDE + SIDE // 2 - 6), concept["name"], "black")
        colour = colours[number("sheet colour", concept["id"]) % len(colours)]
        known = [
            (i, artist)
            for i, artist in enumerate(artists)
            if artist in concept["artists"]
        ]
        real = [
            Wish("", (), SOURCES[0], (concept["id"], artist), colour)
            for _, artist in known
        ]
        made = [
            Wish(caption(FULL, concept["it"], colour, artist), ())
            for _, artist in known
        ]
        for side, wanted in enumerate((real, made)):
            for (i, _), pixels in zip(known, paint(wanted), strict=True):
                paper.paste(
                    image(pixels), (LABEL + (2 * i + side) * SIDE, 20 + row * SIDE)
                )
    data = io.BytesIO()
    paper.save(data, "WEBP", quality=70, method=6)
    return data.getvalue()


def items(drawn: Drawn, wanted: list[Wish], paths: list[Path]) -> Iterator[Item]:
    """Yield every question about every picture; wordings are chosen by a hash."""
    for wish, path in zip(wanted, paths, strict=True):
        for figure, kind, target in wish.asks:
            wordings = drawn.kb.templates[kind]["image"]
            prompt = wordings[number("wording", figure, wish.caption) % len(wordings)]
            yield Item(Query(prompt, target, path), (figure,), kind, str(path))


def card(folder: Path, scores: dict[str, Any], drawn: Drawn) -> str:
    """Return the text of the model card."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    machine = training["machine"]
    size = sum(
        file.stat().st_size for file in folder.rglob("*.*") if file.name != "README.md"
    )
    return Template(
        Path(__file__).with_name("mini_sd_card.md").read_text(encoding="utf-8")
    ).substitute(
        name=training["name"],
        parameters=f"{training['parameters'] / 1e6:.2f} million",
        megabytes=f"{size / 1e6:.1f}",
        concepts=f"{len(drawn.concepts):,}",
        pictures=f"{training['trained_pictures']:,}",
        categories=", ".join(training["data"]["categories"]),
        judge=training["data"]["judge"],
        steps=scores["steps"],
        guidance=scores["guidance"],
        sampled=""
        if scores["sample"] is None
        else f", with at most {scores['sample']} pictures a figure",
        figures=table(scores["figures"]),
        stages=stages_table(training),
        machine=f"{machine['platform']}, {machine['device_name']}, {machine['threads']} threads",
        held_out=", ".join(c["name"] for c in drawn.held_out),
        n_held_out=len(drawn.held_out),
        example=drawn.concepts[0]["it"],
    )


def score(
    model: Path,
    *,
    device: str,
    sample: int | None,
    steps: int,
    guidance: float,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Measure a model folder, write scores.json, samples.webp and README.md into it, and return the scores.

    With `keep`, the pictures stay in that folder, beside what the judge said of each.
    """
    training = json.loads((model / "training.json").read_text(encoding="utf-8"))
    drawn = load_drawn(**training["data"])
    paint = Painter(model, drawn, device, steps, guidance)
    judge = load_backbone(str(MODELS / training["data"]["judge"]), device=device)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = some(list(wishes(drawn)), sample)
        asked = list(items(drawn, wanted, pictures_of(wanted, paint, folder)))
        answers = answer(judge, asked, 128)
        if keep is not None:
            said = [
                {"picture": i.picture, "target": i.query.target, "answer": a}
                for i, a in zip(asked, answers, strict=True)
            ]
            write_atomic(
                keep / "answers.jsonl",
                "".join(json.dumps(line) + "\n" for line in said),
            )
    scores = {
        "model": training["name"],
        "protocol": f"{training['data']['judge']} is asked about the pictures: greedy free generation, answer_match",
        "steps": steps,
        "guidance": guidance,
        "sample": sample,
        "figures": figures(asked, answers, TARGETS),
        "seconds": round(time.monotonic() - started, 1),
        "versions": runtime.versions(),
    }
    write_atomic(model / "scores.json", json.dumps(scores, indent=1) + "\n")
    write_atomic(model / "samples.webp", sheet(drawn, paint))
    write_atomic(model / "README.md", card(model, scores, drawn))
    return scores


def some(wanted: list[Wish], most: int | None) -> list[Wish]:
    """Return at most `most` wishes of each first figure, chosen by hash."""
    return sampled(wanted, most, lambda w: w.asks[0][0], lambda w: number(w.caption))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="the model folder, as train_mini_sd.py writes it"
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=None,
        metavar="N",
        help="at most N pictures a figure",
    )
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument(
        "--guidance", type=float, default=2.0, help="scale of classifier-free guidance"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        default=None,
        help="keep the pictures, and what was said, in this folder",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    options = {
        name: vars(args)[name]
        for name in ("device", "sample", "steps", "guidance", "keep")
    }
    return measure_and_print(
        args.threads,
        lambda: score(args.model, **options),
        lambda scores: table(scores["figures"]),
    )


if __name__ == "__main__":
    sys.exit(main())
