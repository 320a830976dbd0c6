"""Second moments of text encodings: streamed, in float64, saved with their source, and inverted safely.

C is the uncentred second moment of the encodings of caption tokens (Tewel et al. 2023, Perfusion, appendix C; Meng et
al. 2022, ROME). What is computed from it does not depend on its scale.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
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
_CHUNK = 2048  # captions
_BATCH_TOKENS = 1024
_SAVE_SECONDS = 20.0
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
        flat = encodings.detach().flatten(0, 1)
        rows = flat.double()
        sums = self.sums.to(rows.device)
        self.sums = sums.addmm_(rows.T, rows)
        self.texts += len(encodings)
        self.tokens += len(rows)

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Return the sum over the encodings of both."""
        sums = self.sums.cpu() + other.sums.cpu()
        return SecondMoment(sums, self.texts + other.texts, self.tokens + other.tokens)


@dataclass(frozen=True)
class Covariance:
    """A second moment `matrix` (D, D) in float64, up to scale, and its source.

    `tokens` is None if the number of encodings is not known. `source` names the text encoder, the captions and the
    rule under the keys `encoder`, `captions`, `rule`, ...
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
        """Return the lower Cholesky factor in float64 and the ridge that was added, as a share of the mean diagonal.

        Without a given `ridge`, one is added only if there are fewer than 20 tokens a dimension, or if the matrix is
        not positive definite. Raises DataError if the matrix cannot be factored with the given ridge.
        """
        if ridge is not None:
            shares = [ridge]
        elif self.tokens is not None and self.tokens < ENOUGH * self.width:
            shares = [RIDGE]
        else:
            shares = [0.0, 1e-6, 1e-5, 1e-4, RIDGE]
        identity = torch.eye(self.width, dtype=torch.float64)
        for share in shares:
            added = share * self.matrix.diagonal().mean() * identity
            factor, failed = torch.linalg.cholesky_ex(self.matrix + added)
            if not failed:
                return factor, share
        problem = "the covariance is not positive definite"
        if ridge is not None:
            problem += f" with ridge {ridge:g}"
        raise DataError(
            problem, "use more captions, or a larger ridge (--set ridge=1e-3)"
        )

    def summary(self) -> dict[str, Any]:
        """Return counts, the span of the eigenvalues, the condition number, and the rank in terms of entropy."""
        values = torch.linalg.eigvalsh(self.matrix)
        positive = values.clamp_min(0)
        shares = positive / positive.sum()
        entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
        lowest = float(values[0])
        highest = float(values[-1])
        condition = highest / lowest if lowest > 0 else None
        return {
            "width": self.width,
            "texts": self.texts,
            "tokens": self.tokens,
            "trace": float(values.sum()),
            "smallest_eigenvalue": lowest,
            "largest_eigenvalue": highest,
            "condition": condition,
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
        """Read a file that `save` wrote; raise StateError for any other file."""
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
        return cls(
            matrix.double(),
            counts[0],
            counts[1],
            source.values,
        )


def import_matrix(path: Path, model: StableDiffusion) -> Covariance:
    """Read a published matrix: a bare tensor (D, D) in a `.pt` or safetensors file, never unpickled.

    How many tokens it was made of is not known; padding is taken to be excluded, as in
    lucidrains/perfusion-pytorch's covariance_CLIP_ViT-L-14.pt. Raises DataError if it does not fit the model.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
        matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
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
        size = f"{len(matrix)} x {len(matrix)}"
        raise DataError(
            f"{path}: {size}, but the text encodings of {model.name} have {model.width} numbers",
            "choose the model the matrix was made for",
        )
    source = {
        "encoder": model.text_fingerprint,
        "model": model.name,
        "imported": path.name,
        "file": sha256_of(path)[:16],
        "rule": "valid",
    }
    matrix = matrix.double()
    return Covariance((matrix + matrix.T) / 2, source=source)


def estimate(
    model: StableDiffusion,
    captions: Path | None,
    path: Path,
    *,
    rule: Rule = "valid",
    limit: int | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> Covariance:
    """Return the second moment of the encodings of caption tokens, and save it to `path`.

    `captions` is a text file with one caption a line; None takes captions about the things of EmojiKB. Rule `valid`
    counts the tokens from the start to the first end, `all` the padding too. Progress is saved beside `path` from time
    to time; a run that continues gives the same result to the last bit. `tick(n)` is called after n more captions.
    Raises DataError if there are no captions.
    """
    digest, total = survey(captions)
    total = total if limit is None else min(limit, total)
    if not total:
        raise DataError(f"{captions}: no captions", "one a line")
    source = {
        "encoder": model.text_fingerprint,
        "model": model.name,
        "captions": digest,
        "rule": rule,
        "limit": str(total),
        "dtype": str(model.dtype),
    }
    partial = path.with_name(path.name + ".partial")
    moment = _continue(partial, model.width, source)
    tick(moment.texts)
    texts = islice(
        read_captions(captions),
        moment.texts,
        total,
    )
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
    """Return the usual file of the covariance of a model's text encoder."""
    folder = cache_dir() / "covariance"
    path = folder / f"{model.text_fingerprint}.safetensors"
    if path.is_file():
        return path
    of_version_0_1 = folder / f"{model.former_text}.safetensors"
    return of_version_0_1 if of_version_0_1.is_file() else path


def check(covariance: Covariance, model: StableDiffusion) -> None:
    """Raise StateError unless a covariance was made for the text encoder of a model."""
    encoder = covariance.source.get("encoder")
    same = same_model(
        encoder,
        model.text_fingerprint,
        model.former_text,
    )
    if not same or covariance.width != model.width:
        other = covariance.source.get("model", "another model")
        raise StateError(
            f"the covariance was made for the text encoder of {other}, this is {model.name}",
            f"mmedit covariance --model {model.name} --captions FILE",
        )


def survey(captions: Path | None) -> tuple[str, int]:
    """Return (digest, number) of the captions of a file, reading it once; raise DataError if it cannot be read."""
    digest = hashlib.sha256()
    count = 0
    for text in read_captions(captions):
        digest.update(text.encode() + b"\n")
        count += 1
    return digest.hexdigest()[:16], count


def read_captions(path: Path | None) -> Iterator[str]:
    """Yield the captions of a file, one a line, without empty lines; None: those about the things of EmojiKB."""
    if path is None:
        from mmedit_cli.knowledge.data.emojikb import concepts_in

        concepts = concepts_in(share_dir("data") / "emojikb")
        things = [concept["it"] for concept in concepts]
        for i, thing in enumerate(things):
            for template in _CAPTIONS:
                yield template.format(thing, things[i - 1])
        return
    hint = "--captions takes a text file with a caption a line"
    for _, line in read_lines(path, hint=hint):
        text = line.strip()
        if text:
            yield text


def batches(
    model: StableDiffusion, texts: list[str], rule: Rule
) -> Iterator[list[Tensor]]:
    """Yield ids (B, n) for each text encoder, of captions of one length; only rule `all` pads."""
    padding: Any = "max_length" if rule == "all" else False
    by_encoder = []
    for tokenizer in model.tokenizers:
        encoded = tokenizer(texts, truncation=True, padding=padding)
        by_encoder.append(encoded["input_ids"])
    captions: list[tuple[list[int], ...]] = list(zip(*by_encoder, strict=True))
    captions.sort(key=_length)
    for length, group in groupby(captions, key=_length):
        size = max(1, _BATCH_TOKENS // length)
        while batch := list(islice(group, size)):
            columns = zip(*batch, strict=True)
            yield [torch.tensor(ids) for ids in columns]


def _length(caption: tuple[list[int], ...]) -> int:
    first_encoder = caption[0]
    return len(first_encoder)


def _continue(path: Path, width: int, source: Mapping[str, str]) -> SecondMoment:
    """Return the sum of an interrupted run if it had the same source, else an empty one."""
    if not path.exists():
        return SecondMoment.empty(width)
    tensors, meta = read_tensors(path)
    text = meta.get("source", "{}")
    if parse_json(text, f"{path}: source", error=StateError) != source:
        return SecondMoment.empty(width)
    # A clone is aligned as torch does it; the last bits of a product depend on the alignment.
    sums = tensors["sums"].clone()
    return SecondMoment(sums, int(meta["texts"]), int(meta["tokens"]))


def _pause(path: Path, moment: SecondMoment, source: Mapping[str, str]) -> None:
    meta = {
        "texts": str(moment.texts),
        "tokens": str(moment.tokens),
        "source": json.dumps(source),
    }
    write_tensors(path, {"sums": moment.sums.cpu()}, meta)


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
