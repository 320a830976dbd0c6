"""Inputs that used to end in an uncaught exception, or in none at all: one line, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import struct
import zlib

import pytest
from conftest import SHAPES

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.workflow import asking
from mmedit_cli.knowledge.workflow.asking import read_questions
from mmedit_cli.picture_editing.data.opening import open_pairs
from mmedit_cli.pictures import check_picture

FT = (
    "edit",
    "ft",
    "--model",
    "tiny-blip2",
    "--prompt",
    "What is this?",
    "--target",
    "a star",
)
STAR = SHAPES / "solid/red-star.png"


@pytest.fixture
def refused(cli):
    """Run a command that must be refused: return its one line on stderr that is an error, without a traceback."""

    def run(*words: object, code: int = 2) -> str:
        found, _, err = cli(*words)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (found, len(errors)) == (code, 1), err
        assert "please report it" not in err
        assert "Traceback" not in err
        return errors[0]

    return run


@pytest.fixture
def ledger(cli, tmp_path):
    """A ledger with one edit by ft on tiny-blip2."""
    code, _, err = cli(
        *FT, "--image", STAR, "--set", "steps=1", "--into", tmp_path / "edits"
    )
    assert code in (0, 1), err  # one step need not be enough for the edit to hold
    return tmp_path / "edits"


def chunk(kind: bytes, data: bytes) -> bytes:
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )


def test_a_picture_that_passes_its_header_but_does_not_decode_leaves_no_ledger(
    refused, tmp_path
):
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    chunks = (
        chunk(b"IHDR", header)
        + chunk(b"IDAT", b"no deflate stream")
        + chunk(b"IEND", b"")
    )
    path = tmp_path / "bad.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    check_picture(path)  # the header is right
    assert "bad.png: not a readable image" in refused(
        *FT, "--image", path, "--into", tmp_path / "edits"
    )
    assert not (tmp_path / "edits").exists()


def test_an_operation_without_edits_is_refused(refused, ledger):
    lines = ledger / "edits.jsonl"
    first = json.loads(lines.read_text().splitlines()[0])
    lines.write_text(json.dumps({**first, "edits": []}) + "\n")
    (ledger / "seal.json").unlink()
    for command, *more in (("list",), ("undo", "1"), ("verify",)):
        assert "edits.jsonl:1: " in refused("edits", command, ledger, *more)


def test_a_number_of_processes_that_is_none_is_refused(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    said = refused(
        "train-editor",
        "liveedit",
        "--model",
        "tiny-blip2",
        "--data",
        "emojikb:val",
        "--limit",
        20,
    )
    assert "WORLD_SIZE=abc: not a number of processes" in said


@pytest.mark.parametrize("size", ["inf", "1e300"])
@pytest.mark.parametrize(
    "command", [("train-editor", "liveedit"), ("eval", "ft")], ids=" ".join
)
def test_a_cache_without_a_size_is_refused(refused, command, size):
    said = refused(
        *command, "--model", "tiny-blip2", "--data", "emojikb:val", "--cache-gib", size
    )
    assert "--cache-gib" in said


def test_a_fifo_in_a_model_folder_is_refused(refused, tmp_path):
    backbone = load_backbone("tiny-blip2", device="cpu")
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "added_tokens.json")
    said = refused("ask", "--model", tmp_path / "model", "Who?", code=2)
    assert "added_tokens.json: is a pipe (FIFO), not a file" in said


def test_an_export_to_a_full_disk_leaves_nothing(
    refused, ledger, tmp_path, monkeypatch
):
    def full(*words, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        "mmedit_cli.knowledge.workflow.exporting.save_processors", full
    )  # the weights are written by then
    before = sorted(tmp_path.iterdir())
    assert "out: cannot write: No space left on device" in refused(
        "edits", "export", ledger, "--to", tmp_path / "out"
    )
    assert sorted(tmp_path.iterdir()) == before


class Endless(io.TextIOBase):
    """A stdin without an end and without a line."""

    given = 0

    def readline(self, size: int = -1) -> str:
        assert size > 0, "a line without a bound fills the memory"
        self.given += size
        return "x" * size

    def isatty(self) -> bool:
        return False


def test_an_endless_stdin_is_given_up(refused, monkeypatch):
    stdin = Endless()
    monkeypatch.setattr("sys.stdin", stdin)
    assert "stdin: a line longer than 100,000 characters" in refused(
        "ask", "--model", "tiny-blip2"
    )
    assert stdin.given < 1_000_000


def test_more_questions_than_anyone_asks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "_MOST_QUESTIONS", 3)
    path = tmp_path / "q.txt"
    path.write_text("Who?\n\n" * 3)
    assert len(read_questions(path, None)) == 3
    path.write_text("Who?\n" * 4)
    with pytest.raises(DataError, match=re.escape("q.txt: more than 3 questions")):
        read_questions(path, None)


def test_a_fifo_in_the_place_of_a_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    os.mkfifo(tmp_path / "a.parquet")  # pyarrow would wait for ever
    with pytest.raises(DataError, match=r"a\.parquet: is a pipe \(FIFO\), not a file"):
        open_pairs(tmp_path)
