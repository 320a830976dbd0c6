"""Second moments of text encodings: streamed, in float64, saved with where they come from, and inverted safely.

C is the uncentred second moment of the encodings of caption tokens (Tewel et al. 2023, Perfusion, appendix C; Meng et
al. 2022, ROME). What is computed from it does not depend on its scale.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmedit_cli.errors import DataError, StateError
from mmedit_cli.identity import same_model
from mmedit_cli.reading import parse_json, parse_json_object, read_lines, whole_number
from mmedit_cli.registry import cache_dir, share_dir
from mmedit_cli.storage import read_tensors, sha256_of, write_tensors

if TYPE_CHECKING:
    from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion

Rule = Literal["valid", "all"]
FORMAT = "1"
ENOUGH = 20  # tokens per dimension above which no ridge is needed
RIDGE = 1e-3  # of the mean of the diagonal, below that
_CHUNK, _BATCH_TOKENS, _SAVE_SECONDS = 2048, 1024, 20.0
_CAPTIONS = (
    "a photo of {}",
    "a drawing of {}",
    "{} on a table",
    "{} in the snow",
    "a close-up of {}",
    "{} and {}",
)


@dataclass
class SecondMoment:
    """A running sum of x x^T over token encodings x (D,), in float64: any number of them in the same memory."""

    sums: Tensor
    texts: int = 0
    tokens: int = 0

    @classmethod
    def empty(cls, width: int) -> SecondMoment:
        """Return the sum over no encodings of this width."""
        return cls(torch.zeros(width, width, dtype=torch.float64))

    def add(self, encodings: Tensor) -> None:
        """Add all encodings (B, n, D) of B texts."""
        rows = encodings.detach().flatten(0, 1).double()
        self.sums = self.sums.to(rows.device).addmm_(rows.T, rows)
        self.texts += len(encodings)
        self.tokens += len(rows)

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Return the sum over the encodings of both."""
        sums = self.sums.cpu() + other.sums.cpu()
        return SecondMoment(sums, self.texts + other.texts, self.tokens + other.tokens)


@dataclass(frozen=True)
class Covariance:
    """A second moment `matrix` (D, D) in float64, up to scale, and where it comes from.

    `tokens` is None where it is not known how many encodings there were. `source` says which text encoder, which
    captions, and by which rule: `encoder`, `captions`, `rule`, ...
    """

    matrix: Tensor
    texts: int | None = None
    tokens: int | None = None
    source: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, moment: SecondMoment, source: Mapping[str, str]) -> Covariance:
        """Return the mean over the tokens of a sum, exactly symmetric."""
        mean = moment.sums.cpu() / max(moment.tokens, 1)
        return cls((mean + mean.T) / 2, moment.texts, moment.tokens, dict(source))

    @property
    def width(self) -> int:
        """D."""
        return len(self.matrix)

    @property
    def digest(self) -> str:
        """A digest of the matrix."""
        return hashlib.sha256(self.matrix.numpy().tobytes()).hexdigest()[:16]

    def factor(self, ridge: float | None = None) -> tuple[Tensor, float]:
        """Return (lower Cholesky factor in float64, ridge that was added, as a share of the mean of the diagonal).

        None adds one only where it is needed: with fewer than 20 tokens a dimension, or if the matrix is not positive
        definite. Raises DataError if it cannot be factored with the given ridge.
        """
        few = self.tokens is not None and self.tokens < ENOUGH * self.width
        chosen = (
            [ridge]
            if ridge is not None
            else [RIDGE]
            if few
            else [0.0, 1e-6, 1e-5, 1e-4, RIDGE]
        )
        for share in chosen:
            lifted = self.matrix + share * self.matrix.diagonal().mean() * torch.eye(
                self.width, dtype=torch.float64
            )
            factor, failed = torch.linalg.cholesky_ex(lifted)
            if not failed:
                return factor, share
        problem = "the covariance is not positive definite" + (
            f" with ridge {ridge:g}" if ridge is not None else ""
        )
        raise DataError(
            problem, "use more captions, or a larger ridge (--set ridge=1e-3)"
        )

    def summary(self) -> dict[str, Any]:
        """Return counts, the span of the eigenvalues, the condition number, and the rank in terms of entropy."""
        values = torch.linalg.eigvalsh(self.matrix)
        shares = values.clamp_min(0) / values.clamp_min(0).sum()
        entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
        lowest = float(values[0])
        return {
            "width": self.width,
            "texts": self.texts,
            "tokens": self.tokens,
            "trace": float(values.sum()),
            "smallest_eigenvalue": lowest,
            "largest_eigenvalue": float(values[-1]),
            "condition": float(values[-1]) / lowest if lowest > 0 else None,
            "effective_rank": float(entropy.exp()),
            "ridge": self.factor()[1],
            "digest": self.digest,
            **self.source,
        }

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        counts = {"texts": self.texts, "tokens": self.tokens}
        known = {key: str(value) for key, value in counts.items() if value is not None}
        write_tensors(
            path,
            {"matrix": self.matrix},
            {"format": FORMAT, **known, "source": json.dumps(self.source)},
        )

    @classmethod
    def load(cls, path: Path) -> Covariance:
        """Read what `save` wrote; raise StateError if it is something else."""
        tensors, meta = read_tensors(path)
        matrix = tensors.get("matrix")
        if matrix is None or meta.get("format") != FORMAT:
            raise StateError(
                f"{path}: not a covariance of format {FORMAT}",
                "make one with mmedit covariance",
            )
        _check_matrix(matrix, path)
        counts = [whole_number(meta.get(key, "")) for key in ("texts", "tokens")]
        source = parse_json_object(
            meta.get("source", "{}"), f"{path}: source", error=StateError
        )
        return cls(matrix.double(), counts[0], counts[1], source.values)


def import_matrix(path: Path, model: StableDiffusion) -> Covariance:
    """Read a published matrix: a bare tensor (D, D) in a `.pt` or safetensors file, never unpickled.

    How many tokens it was made of is not known; padding is taken to be excluded, as in
    lucidrains/perfusion-pytorch's covariance_CLIP_ViT-L-14.pt. Raises DataError if it does not fit the model.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        matrices = [
            tensor for tensor in read_tensors(path)[0].values() if tensor.dim() == 2
        ]
        matrix: Any = matrices[0] if len(matrices) == 1 else None
    else:
        try:
            matrix = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds; whatever it is, the file is not a plain tensor
            reason = str(error).partition("\n")[0][:120]
            raise DataError(
                f"{path}: not a plain tensor ({reason})", "save the matrix alone"
            ) from error
    if not isinstance(matrix, Tensor):
        raise DataError(f"{path}: holds no single matrix", "save the matrix alone")
    _check_matrix(matrix, path)
    if len(matrix) != model.width:
        raise DataError(f"{path}: {len(matrix)} x {len(matrix)}, but the text encodings of {model.name} have "
                        f"{model.width} numbers", "choose the model the matrix was made for")  # fmt: skip
    digest = sha256_of(path)[:16]
    source = {"encoder": model.text_fingerprint, "model": model.name, "imported": path.name, "file": digest,
              "rule": "valid"}  # fmt: skip
    return Covariance((matrix.double() + matrix.double().T) / 2, source=source)


def estimate(
    model: StableDiffusion,
    captions: Path | None,
    path: Path,
    *,
    rule: Rule = "valid",
    limit: int | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> Covariance:
    """Return the second moment of the caption tokens' encodings, and save it to `path`.

    `captions` has one a line; None takes those about the things of EmojiKB. Rule `valid` counts the tokens from the
    start to the first end, `all` the padding too. What is done is saved beside `path` now and then, and continued;
    the result is the same to the last bit. `tick(n)` is told of n more captions. Raises DataError without captions.
    """
    digest, total = survey(captions)
    total = total if limit is None else min(limit, total)
    if not total:
        raise DataError(f"{captions}: no captions", "one a line")
    source = {
        "encoder": model.text_fingerprint, "model": model.name, "captions": digest, "rule": rule,
        "limit": str(total), "dtype": str(model.dtype),
    }  # fmt: skip
    partial = path.with_name(path.name + ".partial")
    moment = _continue(partial, model.width, source)
    tick(moment.texts)
    texts = islice(read_captions(captions), moment.texts, total)
    saved = time.monotonic()
    with torch.inference_mode():
        while chunk := list(islice(texts, _CHUNK)):
            for ids in batches(model, chunk, rule):
                moment.add(model.encode_ids(ids))
                tick(len(ids[0]))
            if time.monotonic() - saved > _SAVE_SECONDS:
                _pause(partial, moment, source)
                saved = time.monotonic()
    found = Covariance.of(moment, source)
    found.save(path)
    partial.unlink(missing_ok=True)
    return found


def default_path(model: StableDiffusion) -> Path:
    """Return where the covariance of a model's text encoder is looked for."""
    folder = cache_dir() / "covariance"
    path = folder / f"{model.text_fingerprint}.safetensors"
    former = folder / f"{model.former_text}.safetensors"  # kept by version 0.1.0
    return former if former.is_file() and not path.is_file() else path


def check(covariance: Covariance, model: StableDiffusion) -> None:
    """Raise StateError unless a covariance was made for the text encoder of a model."""
    made_for = covariance.source.get("encoder")
    if (
        not same_model(made_for, model.text_fingerprint, model.former_text)
        or covariance.width != model.width
    ):
        made = covariance.source.get("model", "another model")
        raise StateError(f"the covariance was made for the text encoder of {made}, this is {model.name}",
                         f"mmedit covariance --model {model.name} --captions FILE")  # fmt: skip


def survey(captions: Path | None) -> tuple[str, int]:
    """Return (digest, number) of the captions of a file, reading it once; raise DataError if it cannot be read."""
    digest, count = hashlib.sha256(), 0
    for text in read_captions(captions):
        digest.update(text.encode() + b"\n")
        count += 1
    return digest.hexdigest()[:16], count


def read_captions(path: Path | None) -> Iterator[str]:
    """Yield the captions of a file, one a line, without empty lines; None: those about the things of EmojiKB."""
    if path is None:
        from mmedit_cli.knowledge.data.emojikb import concepts_in

        named = [
            concept["it"] for concept in concepts_in(share_dir("data") / "emojikb")
        ]
        for i, thing in enumerate(named):
            yield from (template.format(thing, named[i - 1]) for template in _CAPTIONS)
        return
    for _, line in read_lines(
        path, hint="--captions takes a text file with a caption a line"
    ):
        if text := line.strip():
            yield text


def batches(
    model: StableDiffusion, texts: list[str], rule: Rule
) -> Iterator[list[Tensor]]:
    """Yield ids (B, n) for each text encoder, of captions of one length: nothing is padded but by rule `all`."""
    padding: Any = "max_length" if rule == "all" else False
    spelled = [
        tokenizer(texts, truncation=True, padding=padding)["input_ids"]
        for tokenizer in model.tokenizers
    ]
    rows: Iterable[tuple[list[int], ...]] = sorted(
        zip(*spelled, strict=True), key=lambda row: len(row[0])
    )
    for length, group in groupby(rows, key=lambda row: len(row[0])):
        while some := list(islice(group, max(1, _BATCH_TOKENS // length))):
            yield [torch.tensor([row[i] for row in some]) for i in range(len(spelled))]


def _continue(path: Path, width: int, source: Mapping[str, str]) -> SecondMoment:
    """Return what an interrupted run has done already, if it was the same."""
    if path.exists():
        tensors, meta = read_tensors(path)
        if (
            parse_json(meta.get("source", "{}"), f"{path}: source", error=StateError)
            == source
        ):
            sums = tensors[
                "sums"
            ].clone()  # into memory as torch aligns it, on which the last bits of a product depend
            return SecondMoment(sums, int(meta["texts"]), int(meta["tokens"]))
    return SecondMoment.empty(width)


def _pause(path: Path, moment: SecondMoment, source: Mapping[str, str]) -> None:
    counts = {"texts": str(moment.texts), "tokens": str(moment.tokens)}
    write_tensors(
        path, {"sums": moment.sums.cpu()}, {**counts, "source": json.dumps(source)}
    )


def _check_matrix(matrix: Tensor, path: Path) -> None:
    if (
        matrix.dim() != 2
        or matrix.shape[0] != matrix.shape[1]
        or not matrix.is_floating_point()
    ):
        raise DataError(
            f"{path}: not a square matrix of numbers, its shape is {tuple(matrix.shape)}"
        )
    if not matrix.isfinite().all():
        raise DataError(f"{path}: holds numbers that are not finite")
    if (matrix - matrix.T).abs().max() > 1e-4 * matrix.abs().max():
        raise DataError(f"{path}: not symmetric, so not a second moment")
