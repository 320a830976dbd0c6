"""The campaigns of scripts/campaign: their short forms with -m slow, the whole ones with -m nightly."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT


def kill(*words: str) -> list[list[str]]:
    """Run the kill campaign and return its lines as words; it must find no difference."""
    script = ROOT / "scripts" / "campaign" / "kill.py"
    ended = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [line.split() for line in ended.stdout.splitlines()[1:]]


@pytest.mark.slow
def test_commands_that_are_killed_at_every_change_end_as_if_undisturbed():
    found = kill("--short")
    names, changes, kills, _, differences, _ = zip(*found, strict=True)
    assert names == ("unpack", "unpack-into-a-folder", "run", "all")
    assert kills == changes
    assert min(map(int, kills)) > 10
    assert set(differences) == {"0"}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_every_command_that_is_killed_at_every_change_ends_as_if_undisturbed():
    assert len(kill()) > 25


def test_a_command_that_cannot_be_repeated_is_found(tmp_path, monkeypatch):
    """The campaign itself: a command that writes in two steps and does not mend what a kill leaves."""
    script = tmp_path / "careless.py"
    script.write_text(CARELESS)
    ended = subprocess.run(
        [sys.executable, script, ROOT / "scripts" / "campaign", tmp_path],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    changes, kills, differences = map(int, ended.stdout.split())
    assert changes == kills > 5
    assert differences > 3


CARELESS = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from changes import Watch
from kills import Campaign, Scenario


def careless():
    if Path("done.txt").exists():
        return 2
    Path("folder").mkdir()
    Path("folder/half.txt").write_text("whole")
    Path("folder/half.txt").rename("done.txt")
    with Path("done.txt").open("ab", buffering=0) as file:
        file.write(b"more")
    Path("folder").rmdir()
    return 0


watch = Watch()
watch.install()
campaign = Campaign(Path(sys.argv[2]).resolve() / "root", watch, lambda words: 1)
found = campaign.run(Scenario("careless", careless, done=(2,)), lambda line: None)
print(found.changes, found.kills, len(found.differences))
"""
