"""Answers as they are generated: every row of a batch has a reader of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.knowledge.models.base import VisionLanguageModel


class Abandoned(Exception):
    """Nobody waits for the answers any more."""


class RowStream:
    """One answer while it is generated; `write` gets, in parts, just the words that `generate` returns.

    `tokens` counts what was generated, the end included. `finish` is empty while the answer goes on, then "stop", or
    "length" where it was cut at its `limit` of tokens.
    """

    def __init__(
        self, backbone: VisionLanguageModel, limit: int, write: Callable[[str], None]
    ) -> None:
        self.backbone = backbone
        self.limit = limit
        self.tokens = 0
        self.finish = ""
        self._words = _streamer(backbone.tokenizer, write)

    def take(self, token: int) -> None:
        """Take the next token; what comes behind the end is padding."""
        if self.finish:
            return
        self.tokens += 1
        if not self.backbone.is_end(token):
            self._words.put(torch.tensor([token]))
        if self.backbone.stops(token):
            self.close("stop")
        elif self.tokens == self.limit:
            self.close("length")

    def close(self, finish: str) -> None:
        """End an answer that has not ended yet, and write what was held back."""
        if not self.finish:
            self.finish = finish
            self._words.end()


class BatchStreamer:
    """The `streamer` of `generate` for several rows at once.

    Raises Abandoned inside `generate` as soon as `given_up()` is true.
    """

    def __init__(
        self, rows: Sequence[RowStream], given_up: Callable[[], bool] = lambda: False
    ) -> None:
        self.rows = rows
        self.given_up = given_up
        self._begun = False

    def put(self, tokens: Tensor) -> None:
        """Take the next token of every row, (B,); what comes first is the prompt."""
        if self.given_up():
            raise Abandoned
        if not self._begun:
            self._begun = True
            return
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.take(token)

    def end(self) -> None:
        """Close what is open: the model reads no more tokens."""
        for row in self.rows:
            row.close("length")


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """Return a streamer that writes the first line of what it is given, without blanks around it."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        begun = ended = False
        blank = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if self.ended:
                return
            text = text if self.begun else text.lstrip("\r ")
            line, newline, _ = (self.blank + text).partition("\n")
            words = line.rstrip()
            self.blank, self.ended = line[len(words) :], bool(newline)
            self.begun = self.begun or bool(words)
            if words:
                write(words)

    return Words(tokenizer, skip_special_tokens=True)
