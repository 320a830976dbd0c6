"""The one printer: nothing acts on the terminal, nothing is read as markup, and stdout may fail."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from mmedit_cli.errors import MmeditError
from mmedit_cli.output import (
    Output,
    OutputLost,
    cut,
    finish,
    report_error,
    report_failure,
    visible,
)

HOSTILE = "a\x1b[31mb\x07\x9b\x7f\r\u202e\ud800 [bold]x[/bold] :apple: C:\\"
SHOWN = "a\\x1b[31mb\\x07\\x9b\\x7f\\r\\u202e\\ud800 [bold]x[/bold] :apple: C:\\"


def test_control_characters_are_visible_and_markup_stays():
    assert visible(HOSTILE) == SHOWN
    assert visible("crème 🍎 नमस्ते 👩‍👧\n\t") == "crème 🍎 नमस्ते 👩‍👧\n\t"


@pytest.mark.parametrize("say", ["line", "write", "table", "header", "title"])
def test_results_are_printed_to_the_letter(capsys, say):
    out = Output()
    said = {
        "line": lambda: out.line(HOSTILE),
        "write": lambda: out.write(HOSTILE),
        "table": lambda: out.table(["x"], [[HOSTILE]]),
        "header": lambda: out.table([HOSTILE], [["y"]]),
        "title": lambda: out.table(["x" * 90], [["y"]], title=HOSTILE),
    }
    said[say]()
    assert SHOWN in capsys.readouterr().out


def test_talk_is_printed_to_the_letter(capsys):
    Output().note(HOSTILE)
    report_error(MmeditError(["one\n" + HOSTILE], HOSTILE))
    report_failure(RuntimeError(HOSTILE))
    said = capsys.readouterr().err
    assert said.count("[bold]x[/bold] :apple: C:\\\n") == 4
    assert "\x1b" not in said


def test_long_texts_are_cut_and_say_so(capsys):
    assert cut("x" * 50, 40) == "x" * 40 + " ... (10 more characters)"
    assert cut("x\n" * 20, 100) == "\n".join("x" * 8) + " ... (25 more characters)"
    out = Output()
    out.line("y" * 100_000)
    out.table(["z"], [["z" * 100_000]])
    report_error(MmeditError(["p" * 100_000] * 50, "h" * 100_000))
    said = capsys.readouterr()
    assert len(said.out) < 6000
    assert len(said.err) < 25_000
    assert "and 30 more problems" in said.err


def test_json_is_whole_and_safe(capsys):
    Output(as_json=True).result({"a": HOSTILE * 1000}, lambda: None)
    said = capsys.readouterr().out
    assert json.loads(said) == {"a": HOSTILE * 1000}
    assert not {"\x1b", "\x9b", "\x7f", "\u202e"} & set(said)


@pytest.mark.parametrize("as_json", [True, False])
def test_streams_that_are_not_utf8(monkeypatch, as_json):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    Output(as_json=as_json).result("é🍎", lambda: Output().table(["é🍎"], [["ü"]]))
    finish()
    said = stream.buffer.getvalue().decode("latin-1")
    if as_json:
        assert json.loads(said) == "é🍎"
    else:
        assert "é\\U0001f34e" in said
        assert "ü" in said


def test_a_closed_stdout_is_an_error_and_a_closed_stderr_is_not(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    for say in (
        lambda: Output().line("x"),
        lambda: Output().table(["x"], [["y"]]),
        lambda: Output().write("x"),
    ):
        with pytest.raises(OutputLost, match="standard output is closed"):
            say()
    monkeypatch.setattr(sys, "stderr", None)
    Output().note("nobody hears this")
    report_error(MmeditError("nor this", "nor that"))
    with Output().progress({"a": 2}) as tick, Output().transfers() as transfer:
        tick("a", 1)
        transfer("[bold", 1, None)


PROGRAM = "import sys; from mmedit_cli.app import main; sys.exit(main({arguments}))"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]], ids=" ".join)
@pytest.mark.parametrize("where", ["full", "closed", "pipe"])
def test_programs_end_well_without_stdout(arguments, where):
    if where == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-c", PROGRAM.format(arguments=arguments)]
    settings = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "timeout": 60}
    if where == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, check=False, **settings)
    elif where == "closed":
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *command], check=False, **settings
        )
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, stdout=writing, check=False, **settings)
        os.close(writing)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "please report" not in done.stderr
    if where == "full":
        assert done.stderr.startswith("error: ")
        assert "No space left" in done.stderr
    if where == "pipe":
        assert done.stderr == ""
    assert done.returncode == (
        0 if where == "closed" and arguments == ["--help"] else 1
    )
