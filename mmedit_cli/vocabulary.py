"""Checks that a tokenizer belongs to its model: one whose vocabulary files are missing raises no error by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedit_cli.errors import ModelError

_LEAST = 0.5  # of the embedding's rows: some models have a few hundred spare ones
_HINT = "copy tokenizer.json there (or vocab.json with merges.txt, or tokenizer.model)"
_WORDS = ("What is this?", "a photo of a dog")


def check_vocabulary(tokenizer: Any, rows: int, place: Path | str) -> None:
    """Raise ModelError unless a tokenizer has about as many tokens as the embedding has rows, and can spell.

    Without its vocabulary files a tokenizer is made from its config alone: every text becomes the same few tokens.
    """
    size = len(tokenizer)
    if size > rows:
        problem = f"{place}: the tokenizer has {size} tokens, the model embeds {rows}"
        raise ModelError(
            problem, "it is the tokenizer of another model: copy the right one there"
        )
    if size < rows * _LEAST:
        raise ModelError(
            f"{place}: the tokenizer has {size} of the {rows} tokens of the model",
            _HINT,
        )
    special = set(tokenizer.all_special_ids)
    spelled = []
    for text in _WORDS:
        ids = tokenizer(text)["input_ids"]
        spelled.append([i for i in ids if i not in special])
    if not all(spelled) or spelled[0] == spelled[1]:
        raise ModelError(f"{place}: the tokenizer cannot spell {_WORDS[0]!r}", _HINT)


def cap_length(tokenizer: Any, encoder: Any) -> None:
    """Let a tokenizer cut texts where its text encoder ends: some come without a limit, or with null."""
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest is None:
        return
    given = tokenizer.model_max_length
    tokenizer.model_max_length = longest if given is None else min(given, longest)


def check_text_encoders(pipe: Any, place: Path | str) -> None:
    """Check every tokenizer of a pipeline against its text encoder, and cap its length; raise ModelError."""
    for suffix in ("", "_2", "_3"):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        if tokenizer is not None and encoder is not None:
            rows = encoder.get_input_embeddings().weight.shape[0]
            check_vocabulary(tokenizer, rows, f"{place}/tokenizer{suffix}")
            cap_length(tokenizer, encoder)
