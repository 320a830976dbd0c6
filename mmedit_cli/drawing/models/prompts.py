"""Prompts as token ids: what a token of one's own stands for, and where it stands."""

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
    rows = [
        [_row(tokenizer, learned, text) for text in texts] for tokenizer in tokenizers
    ]
    for tokenizer, some in zip(tokenizers, rows, strict=True):
        for prompt, row in zip(prompts, some, strict=True):
            if row.length == tokenizer.model_max_length:
                _check_whole(tokenizer, words, prompt)
    first = rows[0]
    return Tokens(
        tuple(prompts),
        tuple(torch.tensor([row.ids for row in some]) for some in rows),
        tuple(torch.tensor([row.plain_ids for row in some]) for some in rows),
        torch.tensor([row.aligned for row in first]),
        {
            token: torch.tensor([[t == token for t in row.owners] for row in first])
            for token in learned
        },
        torch.tensor([row.length for row in first]),
        torch.arange(len(prompts)) < unconditional,
    )


def check_token(token: str) -> None:
    """Raise DataError unless a token can name something of one's own."""
    if not re.fullmatch(r"<[^<>\s]{1,40}>", token):
        raise DataError(
            f"--token {token}: not a name in angle brackets", 'e.g. --token "<my-dog>"'
        )


@dataclass(frozen=True)
class _Row:
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
    for token, word in words.items():
        if word.vectors or token not in prompt:
            continue
        until = _spell_out(prompt[: prompt.rindex(token) + len(token)], words)
        if (
            len(tokenizer(until, add_special_tokens=False)["input_ids"])
            > tokenizer.model_max_length - 2
        ):
            raise TooLong(
                _cut_off(prompt, token, tokenizer.model_max_length),
                "shorten the prompt",
            )


def _cut_off(prompt: str, token: str, longest: int) -> str:
    return f"{prompt!r}: {token} stands beyond the {longest} tokens the model reads"


def _row(tokenizer: Any, learned: Mapping[str, Word], text: str) -> _Row:
    """Return one prompt as ids, cut and padded to the longest the tokenizer allows."""
    longest = tokenizer.model_max_length
    ids, plain, aligned, owners = (
        [tokenizer.bos_token_id],
        [tokenizer.bos_token_id],
        [0],
        [""],
    )
    pieces = (
        re.split("|".join(f"({re.escape(token)})" for token in learned), text)
        if learned
        else [text]
    )
    for piece in filter(None, pieces):
        word = learned.get(piece)
        spelled = tokenizer(
            piece if word is None else word.text, add_special_tokens=False
        )["input_ids"]
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
    aligned = [min(i, longest - 1) for i in aligned[: length - 1]]
    aligned += [
        min(plain_length - 1 + i, longest - 1) for i in range(longest - len(aligned))
    ]
    owners = (owners[: length - 1] + [""] * longest)[:longest]
    return _Row(_pad(tokenizer, ids), _pad(tokenizer, plain), aligned, owners, length)


def _pad(tokenizer: Any, ids: list[int]) -> list[int]:
    longest = tokenizer.model_max_length
    whole = [*ids[: longest - 1], tokenizer.eos_token_id]
    return whole + [tokenizer.pad_token_id] * (longest - len(whole))
