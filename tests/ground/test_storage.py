"""Temporary files: those of killed runs are removed by the next, those of running ones and of others are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmedit_cli import storage
from mmedit_cli.errors import RunError, StateError


def left_by_a_killed_run(target: Path) -> Path:
    """Return a temporary file as a process leaves it that has ended."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    mine = storage.temporary_beside(target)
    path = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    path.write_text("half")
    return path


def test_the_next_write_into_a_folder_removes_what_killed_runs_left(tmp_path):
    left = left_by_a_killed_run(tmp_path / "a.png")
    staged = left.with_name(f"folder{left.name.removeprefix('a.png')}")
    staged.mkdir()
    (staged / "half.safetensors").write_text("half")
    running = storage.temporary_beside(tmp_path / "b.png")
    running = running.with_name(
        running.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-")
    )
    running.write_text("being written")
    others = {"notes.tmp", "draft.0123abcd.tmp", "a.png.tmp"}
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    storage.write_atomic(tmp_path / "c.png", b"new")
    assert {path.name for path in tmp_path.iterdir()} == {
        *others,
        running.name,
        "c.png",
    }


def test_a_link_is_neither_removed_nor_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "own.txt").write_text("own")
    (tmp_path / "x").mkdir()
    left = left_by_a_killed_run(tmp_path / "x" / "a.png")
    left.unlink()
    left.symlink_to(tmp_path / "outside")
    assert storage.remove_temporaries(tmp_path / "x") == []
    assert (left.is_symlink(), (tmp_path / "outside" / "own.txt").read_text()) == (
        True,
        "own",
    )


def test_a_temporary_folder_vanishes_and_that_of_a_killed_run_too(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = left_by_a_killed_run(tmp_path / "mmedit")
    with storage.temporary_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
        (folder / "picture.png").touch()
    assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_equal_tensors_and_texts_make_equal_bytes(tmp_path):
    texts = {name: f'{name} "\u00e4" \\ \u65e5\n' for name in "gfedcba"}
    for i in range(4):
        storage.write_tensors(
            tmp_path / str(i), {"b": torch.ones(3), "a": torch.zeros(2, 2)}, texts
        )
    assert len({(tmp_path / str(i)).read_bytes() for i in range(4)}) == 1
    tensors, found = storage.read_tensors(tmp_path / "0")
    assert found == texts
    assert (tensors["a"].tolist(), tensors["b"].tolist()) == (
        [[0, 0], [0, 0]],
        [1, 1, 1],
    )
    storage.write_tensors(tmp_path / "none", {}, {})
    assert storage.read_tensors(tmp_path / "none") == ({}, {})


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with storage.sole_writer(folder, "index.json"):
        second = storage.sole_writer(folder, "index.json")
        with pytest.raises(StateError, match="another process is writing"):
            second.__enter__()
    with storage.sole_writer(folder, "index.json"):
        assert folder.is_dir()


def test_a_writer_follows_no_link(tmp_path):
    (tmp_path / "index.json").symlink_to(tmp_path / "elsewhere")
    writer = storage.sole_writer(tmp_path, "index.json")
    with pytest.raises(RunError, match="a link"):
        writer.__enter__()
    assert not (tmp_path / "elsewhere").exists()
