"""The one printer: results on stdout (a table, or JSON), talk and progress on stderr.

What is shown may come from anybody's file: control characters are made visible, markup such as `[bold]` and `:apple:`
stays as it is, and what is longer than a few lines is cut (JSON never is). A stdout that is closed, full or not UTF-8
never becomes a traceback.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from mmedit_cli.errors import MmeditError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_PIPE_WIDTH = 120
_MOST_LINE = 4000  # characters of a line of a result
_MOST_TALK = 1000  # of a note, a problem or a hint
_MOST_CELL = 400
_MOST_LINES = 8
_MOST_PROBLEMS = 20
# C0 but line break and tab, DEL, C1, halves of characters, other line breaks, marks that turn the direction
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
_RAW_IN_JSON = re.compile(
    "[\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # JSON itself escapes only C0
Tick = Callable[[str, int], None]
TransferTick = Callable[[str, int, int | None], None]


class OutputLost(MmeditError):
    """What was to be printed on stdout did not get there."""


def visible(text: str) -> str:
    """Return a text in which nothing can act on a terminal: control characters are written as Python escapes them."""
    return _INVISIBLE.sub(lambda found: repr(found[0])[1:-1], text)


def counted(count: int, one: str) -> str:
    """Return a number of things in words: "1 edit", "2 edits"."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def cut(text: str, most: int) -> str:
    """Return a text of about `most` characters and at most 8 lines that says how much was left out."""
    lines = text[:most].split("\n", _MOST_LINES)
    kept = "\n".join(lines[:_MOST_LINES])
    left_out = len(text) - len(kept)
    if not left_out:
        return text
    return f"{kept} ... ({left_out:,} more characters)"


class Output:
    """Prints for people or, with `as_json`, for programs; with `quiet` results only, with `silent` not even these."""

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, silent: bool = False
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet or silent
        self.silent = silent

    def result(self, data: Any, show: Callable[[], None]) -> None:
        """Print the result of a command: `data` as JSON, or what `show` prints."""
        if self.silent:
            return
        if self.as_json:
            _put(_json(data) + "\n")
        else:
            show()

    def line(self, text: str = "") -> None:
        """Print one line of a result."""
        _put(visible(cut(text, _MOST_LINE)) + "\n")

    def write(self, text: str) -> None:
        """Print a part of a line at once."""
        _put(visible(text), flush=True)

    def yaml(self, data: Mapping[str, Any]) -> None:
        """Print nested values as YAML."""
        import yaml

        _put(visible(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)))

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str = "",
        sections: Sequence[int] = (),
    ) -> None:
        """Print a table; a rule is drawn after each row whose index is in `sections`."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        def cell(
            text: str,
        ) -> Text:  # a Text is printed to the letter, a str would be read as markup
            return Text(visible(cut(text, _MOST_CELL)))

        table = Table(
            title=Text(visible(title), "table.title") if title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i, name in enumerate(header):
            table.add_column(
                cell(name), overflow="fold", justify="left" if i == 0 else "default"
            )
        for i, row in enumerate(rows):
            table.add_row(*map(cell, row), end_section=i in sections)
        console = _console(_stdout())
        with console.capture() as captured:
            console.print(table)
        _put(captured.get())

    def note(self, text: str) -> None:
        """Say something on stderr."""
        if not self.quiet:
            _tell(text)

    @contextmanager
    def progress(self, totals: Mapping[str, int]) -> Iterator[Tick]:
        """Show bars on stderr while the block runs; yield `tick(what, n)`.

        Without a terminal there are lines instead, one now and then.
        """
        console = _console(sys.stderr or io.StringIO())
        if self.quiet or not console.is_terminal:
            yield _ProgressLines(totals, self.note)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            tasks = {
                what: bars.add_task(visible(cut(what, _MOST_CELL)), total=total)
                for what, total in totals.items()
            }
            yield lambda what, n: bars.advance(tasks[what], n)

    @contextmanager
    def transfers(self) -> Iterator[TransferTick]:
        """Show a bar in bytes for each thing on its way; yield `tick(what, n, total)`, total None if not known."""
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )

        console = _console(sys.stderr or io.StringIO())
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        tasks: dict[str, TaskID] = {}
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bars:

            def tick(what: str, count: int, total: int | None) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(
                        visible(cut(what, _MOST_CELL)), total=total
                    )
                bars.update(tasks[what], advance=count, total=total)

            yield tick


class _ProgressLines:
    """Says how far things are where no bars can be drawn: after a few seconds for the first time, then twice a minute.

    It is a `Tick`. The time that is left is estimated from what was done since the first word of a thing.
    """

    FIRST, EVERY = 10.0, 30.0  # seconds

    def __init__(self, totals: Mapping[str, int], say: Callable[[str], None]) -> None:
        self.totals = totals
        self.say = say
        self.done = dict.fromkeys(totals, 0)
        # when a thing was first heard of, and how much was done then
        self.began: dict[str, tuple[float, int]] = {}
        self.next = time.monotonic() + self.FIRST

    def __call__(self, what: str, n: int) -> None:
        now = time.monotonic()
        self.done[what] += n
        done = self.done[what]
        began, before = self.began.setdefault(what, (now, done))
        if now < self.next:
            return
        self.next = now + self.EVERY
        total = self.totals[what]
        left = ""
        if before < done < total:
            seconds_each = (now - began) / (done - before)
            seconds_left = seconds_each * (total - done)
            left = f", about {_duration(seconds_left)} left"
        self.say(f"{what}: {done:,} of {total:,}{left}")


def _duration(seconds: float) -> str:
    """Return a time to wait in its largest sensible unit."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def report_error(error: MmeditError) -> None:
    """Print an error for people: one `error:` line a problem, then one `hint:` line."""
    for problem in error.problems[:_MOST_PROBLEMS]:
        _tell(f"error: {' '.join(problem.split())}")
    more = len(error.problems) - _MOST_PROBLEMS
    if more > 0:
        _tell(f"error: and {more:,} more problems")
    if error.hint:
        _tell(f"hint: {' '.join(error.hint.split())}")


def report_failure(error: BaseException) -> None:
    """Print an unexpected failure as one line."""
    text = " ".join(str(error).split()) or "no message"
    kind = type(error).__name__
    shortened = cut(text, 300)
    _tell(f"error: {kind}: {shortened}")
    _tell("hint: run the same command with --debug to see where; please report it")


def finish() -> None:
    """Send everything printed so far on its way; raise OutputLost if it does not arrive.

    Python itself would do so at exit, with a traceback. Nothing was printed yet where stdout is closed.
    """
    if sys.stdout is not None:
        _put("", flush=True)


def _stdout() -> TextIO:
    if sys.stdout is None:
        raise OutputLost("standard output is closed: the result cannot be printed")
    return sys.stdout


def _put(text: str, *, flush: bool = False) -> None:
    """Write to stdout; raise OutputLost if that fails."""
    stream = _stdout()
    try:
        stream.write(_encodable(text, stream))
        if flush:
            stream.flush()
    except (OSError, ValueError) as error:  # ValueError: closed by somebody
        _give_up_stdout()
        if isinstance(
            error, BrokenPipeError
        ):  # `| head` has read enough: nothing to say
            raise OutputLost(()) from error
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise OutputLost(
            f"standard output: {reason}: the result is not printed whole"
        ) from error


def _give_up_stdout() -> None:
    """Discard the buffer of stdout: Python would try to write it again at exit, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _tell(text: str) -> None:
    """Write a line to stderr, if there is one; a lost message is no failure."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write(
                _encodable(visible(cut(text, _MOST_TALK)) + "\n", sys.stderr)
            )
            sys.stderr.flush()


def _json(data: Any) -> str:
    """Return data as JSON that any terminal shows and any program reads."""
    plain = _is_utf8(_stdout())
    text = json.dumps(data, indent=2, ensure_ascii=not plain)
    if not text.isascii():
        with_escapes = _RAW_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
        text = with_escapes.encode(
            "utf-8", "backslashreplace"
        ).decode()  # half a character becomes its JSON escape
    return text


def _is_utf8(stream: TextIO) -> bool:
    return (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf8")


def _encodable(text: str, stream: TextIO) -> str:
    """Return a text that the stream can encode; other characters become Python's escapes."""
    encoding = stream.encoding or "utf-8"
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return text


def _console(stream: TextIO) -> Console:
    """Return a console for a stream; what goes into a pipe or a file is not cut to 80 columns."""
    from rich.console import Console

    wide = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=wide, highlight=False)
