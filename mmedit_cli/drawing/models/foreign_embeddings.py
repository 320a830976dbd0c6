"""Embeddings of textual inversion of others: a word that a text encoder has no vector for, from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mmedit_cli.drawing.models.prompts import Word, check_token
from mmedit_cli.errors import DataError
from mmedit_cli.storage import read_tensors

_AUTOMATIC = "emb_params"  # how AUTOMATIC1111 names the vectors
_OF_XL = ("clip_l", "clip_g")  # of the two encoders of SDXL
_HINT = "files of diffusers (learned_embeds.safetensors), of AUTOMATIC1111 and of SDXL are read"


class EncodingModel(Protocol):
    """What is needed of a text-to-image model: its name and its text encoders."""

    name: str

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, in order."""


def split_token(text: str) -> tuple[Path, str]:
    """Return the file and the token of FILE[:TOKEN], empty without it; raise DataError for what is no token."""
    found = re.fullmatch(r"(.+):(<.*)", text)
    if found is None:
        return Path(text), ""
    check_token(found[2])
    return Path(found[1]), found[2]


def read_embedding(path: Path, token: str, model: EncodingModel) -> tuple[str, Word]:
    """Return the token of an embedding, and the word that it is for a model.

    Without a `token` it is that of the file, in angle brackets, or the name of the file. Raises DataError for a file
    of another kind or for another model, StateError for one that is damaged.
    """
    if not path.is_file():
        raise DataError(f"--embedding {path}: no such file")
    if path.suffix != ".safetensors":
        raise DataError(
            f"{path}: not a .safetensors file, and others are not opened: they may run code",
            "save it as .safetensors",
        )
    tensors, _ = read_tensors(path)
    named, vectors = _vectors(path, tensors)
    token = token or _bracketed(named or path.stem)
    check_token(token)
    encoders = model.text_encoders
    widths = [e.get_input_embeddings().weight.shape[1] for e in encoders]
    if [rows.shape[1] for rows in vectors] != widths:
        found = ", ".join(str(rows.shape[1]) for rows in vectors)
        wanted = ", ".join(map(str, widths))
        raise DataError(
            f"{path}: vectors of {found} numbers, {model.name} needs {wanted}",
            "it was made for a model of another kind",
        )
    if len({len(rows) for rows in vectors}) > 1:
        raise DataError(f"{path}: not as many vectors for both text encoders", _HINT)
    if not all(rows.isfinite().all() for rows in vectors):
        raise DataError(f"{path}: has numbers that are not finite", "copy it again")
    plain = re.sub(r"[^\w]+", " ", token).strip() or "thing"
    return token, Word(plain, vectors)


def _vectors(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[str, tuple[Tensor, ...]]:
    """Return the token that a file names, empty if none, and the vectors (n, width) for each text encoder."""
    names = list(tensors)
    if set(names) == set(_OF_XL):
        chosen = list(_OF_XL)
    elif len(names) == 1:
        chosen = names
    else:
        raise DataError(f"{path}: not an embedding of one word", _HINT)
    vectors = []
    for name in chosen:
        rows = tensors[name].float()
        if rows.dim() == 1:
            rows = rows[None]
        if rows.dim() != 2 or not len(rows):
            raise DataError(f"{path}: {name}: not vectors", _HINT)
        vectors.append(rows)
    named = "" if names[0] in (_AUTOMATIC, *_OF_XL) else names[0]
    return named, tuple(vectors)


def _bracketed(name: str) -> str:
    """Return a name as a token: `<my-cat>` as it is, others in angle brackets."""
    if re.fullmatch(r"<[^<>\s]+>", name):
        return name
    plain = re.sub(r"[<>\s]+", "-", name).strip("-")
    return f"<{plain[:40]}>"
