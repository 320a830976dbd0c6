"""Answers that are read while they are generated are, row by row, what `generate` returns."""

from __future__ import annotations

import pytest
from conftest import asked

from mmedit_cli.knowledge.workflow.streaming import (
    Abandoned,
    BatchStreamer,
    RowStream,
)

LIMITS = (3, 9, 1, 12)


def streamed(backbone, given_up=lambda: False):
    """What `generate` returns, what was written, and the rows."""
    written = [[] for _ in LIMITS]
    rows = []
    for limit, parts in zip(LIMITS, written, strict=True):
        rows.append(RowStream(backbone, limit, parts.append))
    texts = backbone.generate(
        asked(backbone),
        max_new_tokens=LIMITS,
        streamer=BatchStreamer(rows, given_up),
    )
    return texts, ["".join(parts) for parts in written], rows


def test_rows_are_what_generate_returns(backbone):
    plain = backbone.generate(asked(backbone), max_new_tokens=LIMITS)
    texts, written, rows = streamed(backbone)
    assert written == texts == plain
    for row, limit in zip(rows, LIMITS, strict=True):
        assert row.tokens <= limit
        assert row.finish == "stop" or row.tokens == limit


def test_an_answer_ends_at_its_line_break_and_at_its_end_token(backbone, monkeypatch):
    first = backbone.batch(asked(backbone), with_answer=False, left_pad=True)
    said = backbone._continue(first, 12, None, "greedy")
    newline = int(said[1][2])
    monkeypatch.setitem(vars(backbone), "_newline", backbone._newline.clone())
    backbone._newline[newline] = True
    end = int(said[3][0])
    monkeypatch.setitem(vars(backbone), "_end_ids", sorted({*backbone._end_ids, end}))
    _, written, rows = streamed(backbone)
    assert rows[1].finish == rows[3].finish == "stop"
    assert rows[1].tokens <= 3
    assert (rows[3].tokens, written[3]) == (1, "")


def test_what_nobody_waits_for_is_given_up(backbone):
    looks = iter([False, False, True])
    before = backbone.generate(asked(backbone)[:1], max_new_tokens=4)
    with pytest.raises(Abandoned):
        streamed(backbone, lambda: next(looks))
    assert backbone.current_batch is None
    assert backbone.generate(asked(backbone)[:1], max_new_tokens=4) == before
