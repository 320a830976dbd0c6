"""The section that compares two editors over orders says what its tables show; the rest of the page stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mmedit_cli.knowledge.evaluation.paired import Difference
from mmedit_cli.knowledge.workflow.comparison import Comparison, Row, ScoredRun

sys.path.insert(0, str(ROOT / "scripts"))
from compare_over_orders import PAGE, PROTOCOLS, put, text_of

REPORT = {
    "versions": {"torch": "2", "transformers": "5"},
    "model": {"name": "mini-blip2", "fingerprint": "0123456789abcdef"},
    "orders": 3,
}


def compared(protocol: str) -> Comparison:
    """Two scores of two runs: one that the test tells apart, one that it does not."""
    runs = [ScoredRun(n, Path(n), REPORT, 1000, {}, {}) for n in ("one", "two")]
    rows = []
    for column, p in (("generality.image", 0.01), ("locality.text", 0.2)):
        found = Difference(0.5, 0.75, 8, 8, (0.1, 0.4), p, 0.2)
        rows.append(Row(protocol, column, "one", "two", found, p))
    return Comparison(runs, rows)


def test_a_claim_is_a_row_that_the_test_tells_apart(tmp_path):
    text = text_of([compared(protocol) for protocol in PROTOCOLS], "the command")
    assert text.count("- **two is better than one at M-Gen.**\n") == 2
    assert text.count("is better than") == 2
    assert "| M-Gen | 50.0 | 75.0 | two | +25.0 | +10.0 to +40.0 | 0.0100" in text
    assert "| T-Loc | 50.0 | 75.0 | = |" in text
    assert "1,000 edits of EmojiKB in 3 orders" in text
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    put(page, text)
    put(page, text)
    before, _, rest = PAGE.read_text().partition("<!-- written by")
    after = rest.partition("<!-- end of what")[2]
    assert page.read_text().startswith(before)
    assert page.read_text().endswith(after)
    assert page.read_text().count(text) == 1
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="the marks"):
        put(page, text)
