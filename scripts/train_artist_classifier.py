"""Train the network that tells the artists of EmojiKB apart, on the drawings of its training side; two minutes.

    python scripts/train_artist_classifier.py

It judges whether an edit such as "draw it in the style of OpenMoji" was made. Prints how often it is right about the
drawings of the other sides, whose things it never saw, on backgrounds by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from mini_sd_data import scaled
from mini_training import Schedule, rate_at
from mini_vlm_data import Pictures, composed, load_emojikb
from torch import Generator, Tensor

from mmedit_cli.drawing.data.emojikb_facts import ARTISTS
from mmedit_cli.drawing.evaluation.artists import ArtistClassifier, weights_file
from mmedit_cli.storage import write_tensors

STEPS, BATCH, SMOOTHING = 1500, 32, 0.05
RATE = Schedule(passes=1, pictures=BATCH, rate=3e-3, decay=0.02)


class Drawings:
    """The pictures of EmojiKB with their artists and sides."""

    def __init__(self) -> None:
        kb = load_emojikb(None, 0, 0)
        side, artists = {c["id"]: c["split"] for c in kb.concepts}, list(ARTISTS)
        self._pictures = Pictures(kb, torch.device("cpu"))
        self.artist = torch.tensor([artists.index(artist) for _, artist in kb.drawings])
        self._side = [side[concept] for concept, _ in kb.drawings]

    def of(self, side: str) -> Tensor:
        """Return the indices of the drawings of a side."""
        return torch.tensor([i for i, other in enumerate(self._side) if other == side])

    def show(self, chosen: Tensor, generator: Generator) -> Tensor:
        """Return drawings (B,) as they are, on backgrounds by chance: (B, 3, 64, 64) in -1..1."""
        grounds, _ = self._pictures.backgrounds(len(chosen), generator)
        rgba = self._pictures.rgba[chosen]
        return scaled(composed(rgba[:, :3], rgba[:, 3:], grounds))


def train(drawings: Drawings, steps: int, seed: int = 0) -> ArtistClassifier:
    """Return a trained network; half of what it is shown is mirrored."""
    generator = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, taught = ArtistClassifier(), drawings.of("train")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=RATE.decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, RATE)
        chosen = taught[torch.randint(len(taught), (BATCH,), generator=generator)]
        pixels = drawings.show(chosen, generator)
        logits = model(pixels.flip(-1) if step % 2 else pixels)
        loss = F.cross_entropy(
            logits, drawings.artist[chosen], label_smoothing=SMOOTHING
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: ArtistClassifier, drawings: Drawings, side: str) -> float:
    """Return the share of the drawings of a side whose artist is told right."""
    chosen, generator = drawings.of(side), Generator().manual_seed(1)
    told = torch.cat(
        [model(drawings.show(part, generator)).argmax(1) for part in chosen.split(128)]
    )
    return (told == drawings.artist[chosen]).float().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=weights_file())
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    drawings = Drawings()
    model = train(drawings, args.steps)
    right = {
        side: round(accuracy(model, drawings, side), 4)
        for side in ("train", "val", "eval")
    }
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    write_tensors(
        args.out,
        tensors,
        {"artists": json.dumps(list(ARTISTS)), "right": json.dumps(right)},
    )
    print(
        f"{args.out}: right about {', '.join(f'{100 * value:.1f} % of {side}' for side, value in right.items())}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
