"""Prompts as token ids: the meaning and the position of new tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import DataError, TooLong


@dataclass(frozen=True)
class Word:
    """What a token such as `<my-dog>` stands for in a prompt.

    `text` takes its place: the superclass, or an identifier and the superclass. With `vectors`, (n, width) for each
    text encoder, learned embeddings stand there instead, and `text` is the plain word for the same thing.
    """

    text: str
    vectors: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Tokens:
    """B prompts as N token ids each, padded to the length of the model; one (B, N) tensor for each text encoder.

    `plain_ids` are those of the same prompts with plain words instead of tokens with vectors, and `aligned` (B, N)
    says which position of the plain prompt corresponds. `places[token]` (B, N) is true where its vectors stand.
    `lengths` (B,) counts the tokens from the start to the first end, both included. `unconditional` (B,) marks the
    rows of classifier-free guidance; row i of the first half of a guided batch belongs to row i of the second.
    """

    prompts: tuple[str, ...]
    ids: tuple[Tensor, ...]
    plain_ids: tuple[Tensor, ...]
    aligned: Tensor
    places: Mapping[str, Tensor]
    lengths: Tensor
    unconditional: Tensor


def tokenize(
    tokenizers: Sequence[Any],
    words: Mapping[str, Word],
    prompts: Sequence[str],
    *,
    unconditional: int = 0,
) -> Tokens:
    """Return the ids of prompts, the first `unconditional` of which are rows of classifier-free guidance.

    Raises TooLong if a prompt is so long that one of its own tokens would be cut off.
    """
    texts = [_spell_out(prompt, words) for prompt in prompts]
    learned = {token: word for token, word in words.items() if word.vectors}
    by_encoder: list[list[_Row]] = []
    for tokenizer in tokenizers:
        rows = [_row(tokenizer, learned, text) for text in texts]
        for prompt, row in zip(prompts, rows, strict=True):
            if row.length == tokenizer.model_max_length:
                _check_whole(tokenizer, words, prompt)
        by_encoder.append(rows)
    first = by_encoder[0]
    ids = [torch.tensor([row.ids for row in rows]) for rows in by_encoder]
    plain_ids = [torch.tensor([row.plain_ids for row in rows]) for rows in by_encoder]
    return Tokens(
        prompts=tuple(prompts),
        ids=tuple(ids),
        plain_ids=tuple(plain_ids),
        aligned=torch.tensor([row.aligned for row in first]),
        places={token: _places_of(token, first) for token in learned},
        lengths=torch.tensor([row.length for row in first]),
        unconditional=torch.arange(len(prompts)) < unconditional,
    )


def _places_of(token: str, rows: Sequence[_Row]) -> Tensor:
    """Return where a token's vectors stand, (B, N)."""
    masks = [[owner == token for owner in row.owners] for row in rows]
    return torch.tensor(masks)


def check_token(token: str) -> None:
    """Raise DataError unless a text can be the name of a concept, such as `<my-dog>`."""
    if not re.fullmatch(r"<[^<>\s]{1,40}>", token):
        raise DataError(
            f"--token {token}: not a name in angle brackets", 'e.g. --token "<my-dog>"'
        )


@dataclass(frozen=True)
class _Row:
    """One prompt as ids; `owners` names the learned token that stands at a position, "" for none."""

    ids: list[int]
    plain_ids: list[int]
    aligned: list[int]
    owners: list[str]
    length: int


def _spell_out(prompt: str, words: Mapping[str, Word]) -> str:
    for token, word in words.items():
        if not word.vectors:
            prompt = prompt.replace(token, word.text)
    return prompt


def _check_whole(tokenizer: Any, words: Mapping[str, Word], prompt: str) -> None:
    """Raise TooLong if a token of a long prompt is spelled out where the model no longer reads."""
    longest = tokenizer.model_max_length
    for token, word in words.items():
        if word.vectors or token not in prompt:
            continue
        end = prompt.rindex(token) + len(token)
        read = _spell_out(prompt[:end], words)
        ids = tokenizer(read, add_special_tokens=False)["input_ids"]
        if len(ids) > longest - 2:  # start and end take two places
            raise TooLong(_cut_off(prompt, token, longest), "shorten the prompt")


def _cut_off(prompt: str, token: str, longest: int) -> str:
    return f"{prompt!r}: {token} stands beyond the {longest} tokens the model reads"


def _row(tokenizer: Any, learned: Mapping[str, Word], text: str) -> _Row:
    """Return one prompt as ids, cut and padded to the longest the tokenizer allows."""
    longest = tokenizer.model_max_length
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = list(start)
    plain = list(start)
    aligned = [0] * len(start)
    owners = [""] * len(start)
    for piece in _pieces(text, learned):
        word = learned.get(piece)
        words = piece if word is None else word.text
        spelled = tokenizer(words, add_special_tokens=False)["input_ids"]
        before = len(plain)
        plain += spelled
        if word is None:
            ids += spelled
            aligned += range(before, len(plain))
            owners += [""] * len(spelled)
        else:
            count = len(word.vectors[0])
            ids += spelled[-1:] * count  # any ids: their embeddings are replaced
            aligned += [len(plain) - 1] * count
            owners += [piece] * count
    cut = [owner for owner in owners[longest - 1 :] if owner]
    if cut:
        raise TooLong(_cut_off(text, cut[0], longest), "shorten the prompt")
    length = min(len(ids) + 1, longest)
    plain_length = min(len(plain) + 1, longest)
    last = longest - 1
    aligned = [min(position, last) for position in aligned[: length - 1]]
    # The end and the padding correspond to the end and the padding of the plain prompt.
    for offset in range(longest - len(aligned)):
        aligned.append(min(plain_length - 1 + offset, last))
    owners = owners[: length - 1]
    owners += [""] * (longest - len(owners))
    return _Row(
        ids=_pad(tokenizer, ids),
        plain_ids=_pad(tokenizer, plain),
        aligned=aligned,
        owners=owners,
        length=length,
    )


def _pieces(text: str, learned: Mapping[str, Word]) -> list[str]:
    """Return a text cut before and behind every learned token."""
    if not learned:
        return [text] if text else []
    alternatives = [f"({re.escape(token)})" for token in learned]
    pieces = re.split("|".join(alternatives), text)
    return [piece for piece in pieces if piece]


def _pad(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return ids cut to the length of the model, with an end, and padded."""
    longest = tokenizer.model_max_length
    padded = ids[: longest - 1]
    padded.append(tokenizer.eos_token_id)
    missing = longest - len(padded)
    padded += [tokenizer.pad_token_id] * missing
    return padded
