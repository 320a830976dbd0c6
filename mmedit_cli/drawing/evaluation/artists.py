"""A small convolutional network that recognises the artist of a picture of EmojiKB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmedit_cli.drawing.data.emojikb_facts import ARTISTS
from mmedit_cli.errors import StateError
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.registry import share_dir
from mmedit_cli.storage import read_tensors

WIDTH = 24  # channels of the first layer
_SIDE = 64  # pixels of a picture that the classifier was trained on
_GROUPS = 4
_BATCH = 64  # pictures


def weights_file() -> Path:
    """Return the file of weights that scripts/train_artist_classifier.py writes."""
    return share_dir("data") / "emojikb-edits" / "artists.safetensors"


class ArtistClassifier(nn.Module):
    """Four convolutions, and a linear layer on mean, spread and maximum of their channels."""

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * WIDTH
        shapes = [  # input channels, output channels, kernel, stride
            (3, WIDTH, 5, 2),
            (WIDTH, wide, 3, 1),
            (wide, wide, 3, 2),
            (wide, wide, 3, 1),
        ]
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        for inputs, outputs, kernel, stride in shapes:
            convolution = nn.Conv2d(
                inputs,
                outputs,
                kernel,
                stride,
                kernel // 2,
            )
            self.convolutions.append(convolution)
            self.norms.append(nn.GroupNorm(_GROUPS, outputs))
        self.head = nn.Linear(3 * wide, len(ARTISTS))

    @classmethod
    def load(cls, path: Path | None = None) -> ArtistClassifier:
        """Return the classifier of this package, or that of a file; raise StateError if it cannot be used."""
        file = path or weights_file()
        tensors, _ = read_tensors(file)
        found = cls()
        try:
            found.load_state_dict(tensors)
        except RuntimeError as error:
            raise StateError(
                f"{file}: not the weights of an artist classifier", "copy it again"
            ) from error
        return found.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, artists) of pictures (B, 3, 64, 64) in -1..1."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            pixels = F.silu(norm(convolution(pixels)))
        area = (2, 3)
        features = [
            pixels.mean(area),
            pixels.std(area),
            pixels.amax(area),
        ]
        logits: Tensor = self.head(torch.cat(features, 1))
        return logits

    def classify_files(self, files: Sequence[Path]) -> list[str]:
        """Return the artist of each picture file, looked at in the size of those the classifier was trained on."""
        pictures = []
        for file in files:
            picture = load_picture(Picture(file))
            pictures.append(picture.resize((_SIDE, _SIDE)))
        return self.classify(pictures)

    @torch.no_grad()
    def classify(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Return the artist of each picture, by name; the pictures have one size."""
        names = list(ARTISTS.values())
        artists = []
        for start in range(0, len(pictures), _BATCH):
            end = start + _BATCH
            logits = self(_pixels(pictures[start:end]))
            best = logits.argmax(1)
            artists += [names[i] for i in best.tolist()]
        return artists


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Return RGB pictures of one size as (B, 3, H, W) in -1..1."""
    arrays = [np.asarray(picture) for picture in pictures]
    channels_last = torch.from_numpy(np.stack(arrays))
    pixels = channels_last.permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1
