"""Who drew a picture of EmojiKB: a small convolutional network that tells its artists apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmedit_cli.errors import StateError
from mmedit_cli.picture_editing.data.emojikb_edits import ARTISTS
from mmedit_cli.picture_editing.methods.shared.latent import to_pixels
from mmedit_cli.registry import share_dir
from mmedit_cli.storage import read_tensors

WIDTH = 24  # channels of the first layer
_GROUPS, _CHUNK = 4, 64


def weights_file() -> Path:
    """Return where the weights are that scripts/train_artist_classifier.py writes."""
    return share_dir("data") / "emojikb-edits" / "artists.safetensors"


class ArtistClassifier(nn.Module):
    """Four convolutions, and a linear layer on mean, spread and maximum of their channels."""

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * WIDTH
        shapes = [
            (3, WIDTH, 5, 2),
            (WIDTH, wide, 3, 1),
            (wide, wide, 3, 2),
            (wide, wide, 3, 1),
        ]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, k, s, k // 2) for i, o, k, s in shapes
        )
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, o) for _, o, _, _ in shapes)
        self.head = nn.Linear(3 * wide, len(ARTISTS))

    @classmethod
    def load(cls, path: Path | None = None) -> ArtistClassifier:
        """Return the one that comes along, or that of a file; raise StateError if it cannot be used."""
        file = path or weights_file()
        found = cls()
        try:
            found.load_state_dict(read_tensors(file)[0])
        except RuntimeError as error:
            raise StateError(
                f"{file}: not the weights of an artist classifier", "copy it again"
            ) from error
        return found.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, artists) of pictures (B, 3, 64, 64) in -1..1."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            pixels = F.silu(norm(convolution(pixels)))
        return self.head(
            torch.cat([pixels.mean((2, 3)), pixels.std((2, 3)), pixels.amax((2, 3))], 1)
        )  # type: ignore[no-any-return]

    @torch.no_grad()
    def tell(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Return the artist of each picture, by name; the pictures have one size."""
        parts = [pictures[i : i + _CHUNK] for i in range(0, len(pictures), _CHUNK)]
        names = list(ARTISTS.values())
        return [
            names[i] for part in parts for i in self(to_pixels(part)).argmax(1).tolist()
        ]
