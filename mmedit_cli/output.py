"""Everything the program says: results on stdout (a table, or JSON), talk and progress on stderr. The only print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from mmedit_cli.errors import MmeditError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_PIPE_WIDTH = 120
Tick = Callable[[str, int], None]
TransferTick = Callable[[str, int, int | None], None]


class Output:
    """Speaks to people or, with `as_json`, to programs; `quiet` says nothing beside results."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    def result(self, data: Any, show: Callable[[], None]) -> None:
        """Print the result of a command: `data` as JSON, or what `show` prints."""
        if self.as_json:
            print(json.dumps(data, indent=2, ensure_ascii=False))
        else:
            show()

    def line(self, text: str = "") -> None:
        """Print one line of a result."""
        print(text)

    def write(self, text: str) -> None:
        """Print a part of a line at once."""
        print(text, end="", flush=True)

    def yaml(self, data: Mapping[str, Any]) -> None:
        """Print nested values as YAML."""
        import yaml

        print(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True), end="")

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
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(header):
            table.add_column(escape(name), overflow="fold", justify="left" if i == 0 else "default")
        for i, row in enumerate(rows):
            table.add_row(*map(escape, row), end_section=i in sections)
        _console(sys.stdout).print(table)

    def note(self, text: str) -> None:
        """Say something on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    @contextmanager
    def progress(self, totals: Mapping[str, int]) -> Iterator[Tick]:
        """Show bars on stderr while the block runs; yield `tick(what, n)`. Without a terminal nothing is drawn."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = _console(sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=console, transient=True, disable=self.quiet or not console.is_terminal
        ) as bars:
            tasks = {what: bars.add_task(what, total=total) for what, total in totals.items()}
            yield lambda what, n: bars.advance(tasks[what], n)

    @contextmanager
    def transfers(self) -> Iterator[TransferTick]:
        """Show a bar in bytes for each thing on its way; yield `tick(what, n, total)`, total None if not known."""
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        console = _console(sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

            def tick(what: str, count: int, total: int | None) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], advance=count, total=total)

            yield tick


def report_error(error: MmeditError) -> None:
    """Print an error for people: one `error:` line a problem, then one `hint:` line."""
    for problem in error.problems:
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def report_failure(error: BaseException) -> None:
    """Print an unexpected failure as one line."""
    text = " ".join(str(error).split()) or "no message"
    print(f"error: {type(error).__name__}: {text[:300]}", file=sys.stderr)
    print("hint: run the same command with --debug to see where; please report it", file=sys.stderr)


def _console(stream: TextIO) -> Console:
    """Return a console for a stream; what goes into a pipe or a file is not cut to 80 columns."""
    from rich.console import Console

    wide = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=wide, highlight=False)
