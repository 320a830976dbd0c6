"""How a comparison of evaluations looks: in the terminal, as Markdown, LaTeX or CSV, and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmedit_cli.output import Output, counted
from mmedit_cli.reports.every_eval_ever import EVERY_EVAL_EVER, print_records, record
from mmedit_cli.reports.scores import column_name

if TYPE_CHECKING:
    from mmedit_cli.knowledge.workflow.comparison import Comparison, Row

_HEADER = ("better", "difference", "95 % interval", "p", "p, Holm", "n", "found from")
_LEVEL = "at p, Holm < 0.05"
_MARKS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_ESCAPED = "&%$#_{}"


def print_comparison(out: Output, found: Comparison, form: str) -> None:
    """Print a comparison: a table with what it means, one of FORMATS, or its runs as records of every-eval-ever."""
    if form == EVERY_EVAL_EVER:
        print_records(
            record(run.folder, run.report, run.edits, run.with_intervals())
            for run in found.runs
        )
        return
    if form in FORMATS:
        header, rows = table_of(found)
        write = FORMATS[form]
        text = write(header, rows)
        for line in text.splitlines():
            out.line(line)
        return
    values = found.describe()
    out.result(values, lambda: _show(out, found))


def _show(out: Output, found: Comparison) -> None:
    first = found.runs[0]
    data = first.report["data"]["name"]
    out.line(f"{data}, after {counted(first.edits, 'edit')}; in %")
    header, rows = table_of(found)
    out.table(header, rows)
    out.line("  better: which run scores more, = where the test cannot tell, " + _LEVEL)
    out.line(
        "  p: sign-flip test over concepts; Holm: raised for all rows of the table"
    )
    out.line("  found from: a difference of this size is found in 4 of 5 comparisons")
    for text in claims(found):
        out.line(text)


def table_of(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of a comparison: a row a score and pair of runs."""
    names = [run.name for run in found.runs]
    pair = len(names) == 2
    protocols = {row.protocol for row in found.rows}
    header = ["score", *(names if pair else ("first", "second")), *_HEADER]
    rows = []
    for row in found.rows:
        name = column_name(row.column)
        if len(protocols) > 1:
            name = f"{row.protocol} {name}"
        means = [_percent(row.found.first), _percent(row.found.second)]
        if not pair:
            means = [f"{row.first} {means[0]}", f"{row.second} {means[1]}"]
        rows.append([name, *means, *_cells(row)])
    return header, rows


def _cells(row: Row) -> list[str]:
    found = row.found
    interval = "-"
    if found.ci95 is not None:
        low, high = found.ci95
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
    smallest = "-" if found.smallest is None else f"{100 * found.smallest:.1f}"
    count = f"{found.n} of {found.clusters}"
    if found.n == found.clusters:
        count = str(found.n)
    return [
        row.better or "=",
        f"{100 * found.mean:+.1f}",
        interval,
        _p(found.p),
        _p(row.p_holm),
        count,
        smallest,
    ]


def claims(found: Comparison) -> list[str]:
    """Say in a sentence for each run what it is better at, and than which."""
    better: dict[tuple[str, str], list[str]] = {}
    for row in found.rows:
        winner = row.better
        if winner is None:
            continue
        pair = {row.first, row.second}
        (other,) = pair - {winner}
        columns = better.setdefault((winner, other), [])
        columns.append(column_name(row.column))
    texts = []
    for (winner, other), columns in better.items():
        names = ", ".join(columns)
        texts.append(f"{winner} is better than {other} at {names}")
    return texts or ["no score tells these runs apart"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _p(p: float | None) -> str:
    if p is None:
        return "-"
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


# -- forms ----------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = []
    for cells in (header, rule, *rows):
        escaped = [cell.replace("|", r"\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in LaTeX, for the package booktabs."""
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
    lines.append(_latex_row(header))
    lines.append(r"\midrule")
    lines += [_latex_row(row) for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex_text, cells)) + r" \\"


def _latex_text(text: str) -> str:
    letters = []
    for letter in text:
        if letter in _ESCAPED:
            letters.append("\\")
        mark = _MARKS.get(letter, letter)
        letters.append(mark)
    return "".join(letters)


def as_csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as comma-separated values."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


FORMATS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], str]] = {
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
}
