"""The short form of scripts/campaign/fuzz.py: hostile files for the readers that need no model."""

from __future__ import annotations

import os
import sys

from conftest import ROOT

sys.path.append(str(ROOT / "scripts" / "campaign"))
from fuzz import fuzz
from readers_to_fuzz import Reader, readers

LIGHT = (
    "cases.jsonl",
    "facts.json",
    "facts.csv",
    "facts.jsonl.gz",
    "vlkeb",
    "subset",
    "subjects.yaml",
    "pairs.jsonl",
    "image-edit batch",
    "catalogue",
    "receipt",
    "report.json",
    "concepts",
    "tensors",
    "picture",
)


def test_hostile_files_are_refused(tmp_path):
    chosen = [reader for reader in readers() if reader.name in LIGHT]
    counts = fuzz(3, 17, tmp_path, chosen)
    assert counts.failures == []
    assert counts.inputs.total() == 3 * len(LIGHT)
    assert counts.is_clean
    assert counts.refused > 20


def test_the_campaign_counts_what_goes_wrong(tmp_path):
    def make(folder):
        (folder / "a.json").write_text('{"a": 1}')

    def fail(folder):
        if (folder / "a.json").read_bytes() != b'{"a": 1}':
            raise KeyError("a")
        return 0

    def touch(folder):
        victim = tmp_path / "canary" / "victim.txt"
        if victim.exists() and os.listdir(folder) and folder.name == "inside":
            victim.unlink()
        return 0

    counts = fuzz(
        4, 0, tmp_path, [Reader("fails", make, fail), Reader("affects", make, touch)]
    )
    assert counts.uncaught + counts.refused > 0
    assert counts.outside == 1
    assert not counts.is_clean
