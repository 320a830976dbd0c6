"""Measure where a training in the open world loses names: by the tower, by the bridge, or by the language model.

    python scripts/score_mini_stages.py scripts/mini_blip2_open.yaml runs/open/tower.safetensors \\
        runs/open/bridge.safetensors --start-from data/models/mini-blip2

For the model that is started from and each file of a stage, the share of drawings that get their name: by the tower's
classifier on white, by the nearest mean of a thing's trained drawings in the tower (on white), by the reader of what
the language model gets (on named grounds), and by the drawing of a first artist, on another ground, whose mean image
token lies nearest: so editors find a thing again. `scripts/score_mini_vlm.py` asks the model itself. Shapes: n
drawings, D features, C names.
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
from mini_vlm_open import OpenPictures
from mini_vlm_training import Trainee
from score_mini_vlm import measure_and_print
from torch import Tensor

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.data.emojikb_open import EVALUATION, artist_uses

BATCH = 128
OWN = 700  # trained drawings, chosen by chance

Drawings = tuple[Tensor, Tensor]  # rgba (n, 4, H, W) and the index of each name (n,)


def drawings(kb: EmojiKB, trainee: Trainee) -> dict[str, Drawings]:
    """Return trained drawings by the first artists and by all, held-out ones, and those by unseen artists."""
    pictures = trainee.pictures
    assert isinstance(pictures, OpenPictures)
    name = pictures.labels[pictures.concept, 0]
    first = some_of(pictures.plain, pictures)
    own = some_of(pictures.usable, pictures)
    held = [
        place
        for place, (concept, artist) in enumerate(kb.drawings)
        if concept not in kb.holdout.concepts and not kb.holdout.allows(concept, artist)
    ]
    return {
        "first artists": (pictures.rgba[first], name[first]),
        "own": (pictures.rgba[own], name[own]),
        "held-out": (pictures.rgba[held], name[held]),
        "unseen artists": _unseen(kb, trainee),
    }


def some_of(places: Tensor, pictures: OpenPictures) -> Tensor:
    """Return drawings among `places` (n,) that are not the one of their thing to be found again."""
    others = places[~torch.isin(places, one_a_thing(pictures))]
    chance = torch.Generator().manual_seed(0)
    return others[torch.randperm(len(others), generator=chance)[:OWN]]


def one_a_thing(pictures: OpenPictures) -> Tensor:
    """Return the place of one trained drawing by a first artist of each thing that has one: (n,)."""
    of_thing = {int(pictures.concept[at]): int(at) for at in pictures.plain.flip(0)}
    return torch.tensor(list(of_thing.values()))


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
    assert isinstance(pictures, OpenPictures)

    def tower(rgba: Tensor, _: int) -> Tensor:
        return trainee.on_white(rgba)

    def token(rgba: Tensor, first: int) -> Tensor:
        which = (torch.arange(len(rgba)) + first) % len(pictures.grounds)
        shown = composed(rgba[:, :3], rgba[:, 3:], pictures.grounds[which])
        return trainee.image_tokens(shown).mean(1)

    names = pictures.labels[pictures.concept[pictures.usable], 0]
    trained = F.normalize(in_parts(tower, pictures.rgba[pictures.usable]), dim=-1)
    means = torch.zeros_like(heads["name"].weight).index_add_(0, names, trained)
    towers = {key: in_parts(tower, rgba) for key, (rgba, _) in sets.items()}
    tokens = {key: in_parts(token, rgba) for key, (rgba, _) in sets.items()}
    seen = {key: readers["norm"](mean) for key, mean in tokens.items()}
    places = one_a_thing(pictures)
    edited = in_parts(lambda rgba, n: token(rgba, n + 3), pictures.rgba[places])
    by_name = torch.zeros(len(heads["name"].weight), edited.shape[1])
    by_name[pictures.labels[pictures.concept[places], 0]] = edited
    ways = {
        "tower's classifier": (towers, heads["name"].weight),
        "tower's nearest mean": (towers, means),
        "reader": (seen, readers["name"].weight),
        "nearest image token": (tokens, by_name),
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
    measured: list[Path | None] = [None, *stages] if start else [*stages]
    for stage in measured:
        if stage is not None:
            put(trainee, stage)
        for way, shares in measure(trainee, sets).items():
            cells = " | ".join(f"{100 * share:.1f}" for share in shares)
            rows.append(f"| {stage or start} | {way} | {cells} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("stages", type=Path, nargs="*", help="files of a run")
    parser.add_argument("--start-from", type=Path, help="as in train_mini_vlm.py")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_intermixed_args(argv)
    return measure_and_print(
        None,
        lambda: table(
            Recipe.read(args.recipe, quick=args.quick), args.stages, args.start_from
        ),
        str,
    )


if __name__ == "__main__":
    sys.exit(main())
