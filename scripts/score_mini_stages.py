"""Measure where a training in the open world loses names: by the tower, by the bridge, or by the language model.

    python scripts/score_mini_stages.py scripts/mini_blip2_open.yaml --start-from data/models/mini-blip2 \\
        runs/open/tower.safetensors runs/open/bridge.safetensors

For each file of a stage, the share of drawings that get their name: by the tower's classifier on white, by the nearest
mean of a thing's trained drawings in the tower (on white), and by the reader of what the language model gets (on named
grounds). `scripts/score_mini_vlm.py` asks the model itself. Shapes: n drawings, D features, C names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mini_training import load
from mini_vlm_data import DATA, EmojiKB, composed, lines, load_emojikb, read_picture
from mini_vlm_model import Recipe
from mini_vlm_training import Trainee
from score_mini_vlm import measure_and_print
from torch import Tensor

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.data.emojikb_open import EVALUATION, artist_uses

BATCH = 128
OWN = 700  # trained drawings, chosen by chance

Drawings = tuple[Tensor, Tensor]  # rgba (n, 4, H, W) and the index of each name (n,)


def drawings(kb: EmojiKB, trainee: Trainee) -> dict[str, Drawings]:
    """Return trained drawings, held-out ones of trained things, and those by artists whom no training has met."""
    pictures = trainee.pictures
    name = pictures.labels[pictures.concept, 0]
    chance = torch.Generator().manual_seed(0)
    own = pictures.usable[torch.randperm(len(pictures.usable), generator=chance)[:OWN]]
    held = [
        place
        for place, (concept, artist) in enumerate(kb.drawings)
        if concept not in kb.holdout.concepts and not kb.holdout.allows(concept, artist)
    ]
    return {
        "own": (pictures.rgba[own], name[own]),
        "held-out": (pictures.rgba[held], name[held]),
        "unseen artists": _unseen(kb, trainee),
    }


def _unseen(kb: EmojiKB, trainee: Trainee) -> Drawings:
    uses = artist_uses(DATA)
    place = {c["id"]: i for i, c in enumerate(kb.concepts)}
    drawn = [
        (record["id"], artist)
        for record in lines(DATA / "drawings.jsonl.gz")
        for artist in record["artists"]
        if uses[artist] == EVALUATION
        and record["id"] in place
        and record["id"] not in kb.holdout.concepts
    ]
    rgba = [read_picture(DATA / artist / f"{concept}.png") for concept, artist in drawn]
    names = [trainee.pictures.labels[place[concept], 0] for concept, _ in drawn]
    return torch.stack(rgba), torch.stack(names)


def in_parts(see: Callable[[Tensor, int], Tensor], rgba: Tensor) -> Tensor:
    """Return what is seen in drawings (n, 4, H, W), a batch at a time: (n, D)."""
    parts = rgba.split(BATCH)
    return torch.cat([see(part, first) for first, part in enumerate(parts)])


def nearest(seen: Tensor, directions: Tensor, names: Tensor) -> float:
    """Return the share of features (n, D) that lie nearest, by cosine, to the direction (C, D) of their name (n,)."""
    cosines = F.normalize(seen, dim=-1) @ F.normalize(directions, dim=-1).T
    return float((cosines.argmax(-1) == names).float().mean())


@torch.no_grad()
def measure(trainee: Trainee, sets: dict[str, Drawings]) -> dict[str, list[float]]:
    """Return the shares of each set of drawings by what names them."""
    heads, readers, pictures = trainee.heads, trainee.readers, trainee.pictures

    def tower(rgba: Tensor, _: int) -> Tensor:
        return trainee.on_white(rgba)

    def reader(rgba: Tensor, first: int) -> Tensor:
        which = (torch.arange(len(rgba)) + first) % len(pictures.grounds)
        shown = composed(rgba[:, :3], rgba[:, 3:], pictures.grounds[which])
        return readers["norm"](trainee.image_tokens(shown).mean(1))

    names = pictures.labels[pictures.concept[pictures.usable], 0]
    trained = F.normalize(in_parts(tower, pictures.rgba[pictures.usable]), dim=-1)
    means = torch.zeros_like(heads["name"].weight).index_add_(0, names, trained)
    towers = {key: in_parts(tower, rgba) for key, (rgba, _) in sets.items()}
    seen = {key: in_parts(reader, rgba) for key, (rgba, _) in sets.items()}
    ways = {
        "tower's classifier": (towers, heads["name"].weight),
        "tower's nearest mean": (towers, means),
        "reader": (seen, readers["name"].weight),
    }
    return {
        way: [nearest(of[key], directions, sets[key][1]) for key in sets]
        for way, (of, directions) in ways.items()
    }


def put(trainee: Trainee, stage: Path) -> None:
    """Put the weights in the file of a stage into the trainee; raise UserError if it is not there, or another's."""
    if stage.stem not in trainee.recipe.STAGES or not stage.is_file():
        named = ", ".join(trainee.recipe.STAGES)
        raise UserError(f"{stage}: no file of a stage", f"stages are {named}")
    load(trainee, {}, None, stage.stem, stage.parent)


def table(recipe: Recipe, stages: Sequence[Path], start: Path | None) -> str:
    """Return the shares of all stages as a Markdown table."""
    kb = load_emojikb(**recipe.world)
    trainee = Trainee(recipe, kb, torch.device("cpu"), start)
    sets = drawings(kb, trainee)
    rows = [f"| stage | named by | {' | '.join(sets)} |"]
    rows.append(f"|---|---|{'---:|' * len(sets)}")
    for stage in stages:
        put(trainee, stage)
        for way, shares in measure(trainee, sets).items():
            cells = " | ".join(f"{100 * share:.1f}" for share in shares)
            rows.append(f"| {stage} | {way} | {cells} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("stages", type=Path, nargs="+", help="files of a run")
    parser.add_argument("--start-from", type=Path, help="as in train_mini_vlm.py")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    return measure_and_print(
        None,
        lambda: table(
            Recipe.read(args.recipe, quick=args.quick), args.stages, args.start_from
        ),
        str,
    )


if __name__ == "__main__":
    sys.exit(main())
