"""A run is found by its folder, a pattern, its id or the beginning of it, or as the latest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmedit_cli.errors import UserError
from mmedit_cli.reports.finding import find_runs

IDS = ("0123456789ab", "0123ffffffff", "fedcba987654")


@pytest.fixture
def records(tmp_path) -> Path:
    """A records folder with three finished runs, the first one the newest, and one that is not finished."""
    for age, name in enumerate(IDS):
        folder = tmp_path / "eval" / "ft" / name
        folder.mkdir(parents=True)
        report = folder / "report.json"
        report.write_text("{}")
        os.utime(report, (1000 - age, 1000 - age))
    (tmp_path / "eval" / "ft" / "aaaa00000000").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (IDS[1], IDS[1]),
        ("01234", IDS[0]),
        ("f", IDS[2]),
        ("latest", IDS[0]),
    ],
)
def test_one_run_is_found(records, name, found):
    assert [run.name for run in find_runs([name], records)] == [found]


def test_folders_and_patterns_are_found(records):
    folder = records / "eval" / "ft" / IDS[2]
    assert find_runs([str(folder)], records / "elsewhere") == [folder]
    pattern = str(records / "eval" / "*" / "0123*")
    names = [run.name for run in find_runs([pattern, IDS[2]], records)]
    assert names == list(IDS)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("0123", "0123: the beginning of 2 runs"),
        ("aaaa", "aaaa: no finished run"),
        ("nothing/*", "no finished run matches"),
    ],
)
def test_what_names_no_run_is_an_error(records, name, problem):
    with pytest.raises(UserError) as caught:
        find_runs([name], records)
    assert problem in str(caught.value)


def test_there_may_be_no_run_at_all(tmp_path):
    with pytest.raises(UserError, match="latest: no finished run"):
        find_runs(["latest"], tmp_path)
