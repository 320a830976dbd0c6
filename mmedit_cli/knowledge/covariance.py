"""Second moments of what enters the feed-forward matrices of a language model: streamed, kept once a model, shared.

The moment of a layer is the mean of k k' over tokens, k (F,) being the input of its last feed-forward matrix (Meng et
al. 2022, ROME, section 3.1). Here the tokens are those of questions with their pictures and answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmedit_cli.errors import StateError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch
from mmedit_cli.patch import Patch
from mmedit_cli.reading import parse_json
from mmedit_cli.registry import cache_dir
from mmedit_cli.storage import read_tensors, write_tensors
from mmedit_cli.types import Query

Tokens = Literal["all", "predicting"]
FORMAT = "1"
_GROUP = 16  # questions of one pass


@dataclass(frozen=True)
class FfnMoments:
    """The moments (F, F) by layer, in float32, and of how many tokens each is the mean."""

    matrices: dict[int, Tensor]
    tokens: int

    def save(self, path: Path, source: str) -> None:
        """Write one safetensors file, atomically."""
        tensors = {}
        for layer, matrix in self.matrices.items():
            tensors[str(layer)] = matrix
        about = {
            "format": FORMAT,
            "tokens": str(self.tokens),
            "source": source,
        }
        write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: Path, source: str) -> FfnMoments | None:
        """Read a file that `save` wrote; None if there is none of this source. Raises StateError for another file."""
        if not path.is_file():
            return None
        tensors, about = read_tensors(path)
        if about.get("format") != FORMAT:
            raise StateError(f"{path}: no moments of format {FORMAT}", "delete it")
        if about.get("source") != source:
            return None
        tokens = parse_json(about["tokens"], f"{path}: tokens", error=StateError)
        matrices = {int(layer): matrix for layer, matrix in tensors.items()}
        return cls(matrices, int(tokens))


def ffn_moments(
    backbone: VisionLanguageModel,
    questions: Sequence[Query],
    layers: Sequence[int],
    rule: Tokens = "all",
    *,
    path: Path | None = None,
    tick: Callable[[int], None] = lambda _n: None,
) -> FfnMoments:
    """Return the moments of some layers, from the file if they are there, else computed and added to it.

    The model must be the untouched one. `rule`: every token with its picture, or those that predict an answer token.
    `path`: the file, by default one a model in the cache folder. `tick(n)` is told of n more questions.
    """
    source = _source(backbone, questions, rule)
    path = path or default_path(backbone, rule)
    known = FfnMoments.load(path, source)
    present = {} if known is None else known.matrices
    missing = [layer for layer in layers if layer not in present]
    if missing:
        found = _collect(backbone, questions, missing, rule, tick)
        together = {**present, **found.matrices}
        known = FfnMoments(together, found.tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        known.save(path, source)
    assert known is not None
    wanted = {layer: known.matrices[layer] for layer in layers}
    return FfnMoments(wanted, known.tokens)


def default_path(backbone: VisionLanguageModel, rule: Tokens) -> Path:
    """Return the usual file of the moments of a model."""
    folder = cache_dir() / "covariance"
    dtype = str(backbone.dtype).removeprefix("torch.")
    name = f"ffn-{backbone.fingerprint}-{dtype}-{rule}"
    return folder / f"{name}.safetensors"


def _source(
    backbone: VisionLanguageModel, questions: Sequence[Query], rule: str
) -> str:
    """Return what the moments depend on, in one line; pictures by name, since those that come along do not change."""
    digest = hashlib.sha256()
    for query in questions:
        name = query.image.name if query.image is not None else ""
        line = "\0".join((query.prompt, query.target, name, query.background))
        digest.update(line.encode())
    about = {
        "model": backbone.fingerprint,
        "questions": digest.hexdigest()[:16],
        "count": len(questions),
        "rule": rule,
    }
    return json.dumps(about, sort_keys=True)


def _collect(
    backbone: VisionLanguageModel,
    questions: Sequence[Query],
    layers: Sequence[int],
    rule: Tokens,
    tick: Callable[[int], None],
) -> FfnMoments:
    """Run the questions once; each group is added to sums in float64 and forgotten."""
    paths = {backbone.anchors.path("ffn_out", layer): layer for layer in layers}
    sums: dict[int, Tensor] = {}
    tokens = 0
    by_length = backbone.by_length(questions)
    for start in range(0, len(by_length), _GROUP):
        group = by_length[start : start + _GROUP]
        batch = backbone.batch(group)
        at = _counted(batch, rule)
        tokens += int(at.sum())
        inputs = _inputs(backbone, batch, at, list(paths))
        for path, rows in inputs.items():
            product = rows.T @ rows
            layer = paths[path]
            before = sums.get(layer)
            sums[layer] = product if before is None else before + product
        tick(len(group))
    means = {}
    for layer, total in sums.items():
        mean = total / tokens
        means[layer] = mean.float().cpu()
    return FfnMoments(means, tokens)


def _counted(batch: Batch, rule: Tokens) -> Tensor:
    if rule == "all":
        return batch.attention_mask.bool()
    # the token that ends an answer is predicted too
    return batch.predicting | batch.ends


@torch.no_grad()
def _inputs(
    backbone: VisionLanguageModel, batch: Batch, at: Tensor, paths: Sequence[str]
) -> dict[str, Tensor]:
    """Return what each of the modules `paths` reads at `at` (B, T) bool: (n, F) each, float64."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[Tensor], None]:
        def read(entering: Tensor) -> None:
            # OPT gives its FFN one row for all tokens of a batch
            by_row = entering.reshape(*at.shape, entering.shape[-1])
            found[path] = by_row[at.to(by_row.device)].double()

        return read

    with Patch(backbone.model) as patch:
        for path in paths:
            patch.hook_input(path, keep(path))
        backbone.logits(batch)
    return found
