"""Sums: how many there are, and that no probe contradicts its request."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmedit_cli.knowledge.data.base import load_cases


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEDIT_PLUGINS", str(Path(__file__).with_name("sums.py")))


def test_every_pair_of_digits_is_a_case():
    cases = load_cases("sums")
    assert len({case.uid for case in cases}) == 100
    for case in cases:
        (reworded,) = case.generality["text"]
        assert reworded.target == case.request.target
