"""Print a paper's table beside what the reports of ours say, and which of its claims hold here.

    python scripts/papers/table.py liveedit records/papers             # the tables and verdicts
    python scripts/papers/table.py liveedit --editors                  # which editors stand for its rows, in one line
    python scripts/papers/table.py liveedit --edits                    # after how many edits it asks

The scripts beside this one make the reports: `scripts/papers/liveedit_table.sh`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import (
    ALL,
    MEAN,
    PAPERS,
    Figure,
    Table,
    measured,
    published,
    read_paper,
    rows_of,
)
from verdicts import judge, rivals_of, together

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare_editors import table as markdown


def shown(figure: Figure | None) -> str:
    """Return a figure as it stands in a table."""
    if figure is None:
        return ""
    digits = 1 if abs(figure.value) >= 1 or figure.value == 0 else 3
    return f"{figure.value:.{digits}f}"


def beside(
    paper: Mapping[str, Any], ours: Table, theirs: Sequence[Table]
) -> list[Table]:
    """Return the published tables to show beside one of ours."""
    counterpart = paper.get("beside", {}).get(ours.model)
    return [table for table in theirs if counterpart in (None, table.model)]


def _counts(paper: Mapping[str, Any], ours: Table) -> list[str]:
    """Return after how many edits something was asked, here or there, in order."""
    known = {*paper["edits"], *(edits for _, edits in ours.rows())} - {ALL}
    return [*sorted(known, key=int), ALL]


def lines_of(
    paper: Mapping[str, Any], ours: Table, theirs: Sequence[Table]
) -> list[dict[str, str]]:
    """Return a line a row, number of edits and table: ours first, then what was published of the same."""
    names = [*paper["scores"], MEAN]
    reads = [name for name in paper.get("reads", ()) if name not in names]
    lines = []
    for row in rows_of(paper):
        for edits in _counts(paper, ours):
            for table in (ours, *theirs):
                if table is ours and edits == ALL != paper["edits"][-1]:
                    continue  # it is one of the counts
                cells = {
                    name: shown(table.figures.get((row, edits, name)))
                    for name in (*names, *reads)
                }
                if any(cells.values()):
                    of = "here" if table is ours else table.name
                    lines.append(
                        {"row": row, "edits": edits, "figures of": of, **cells}
                    )
    filled = (
        [name for name in lines[0] if any(line[name] for line in lines)]
        if lines
        else []
    )
    return [{name: line[name] for name in filled} for line in lines]


def print_table(name: str, records: Path) -> bool:
    """Print the tables and verdicts of a paper; return whether there was anything measured."""
    paper = read_paper(name)
    theirs = published(paper)
    tables = measured(paper, records)
    print(f"# {paper['title']}\n\nPublished figures: {paper['source']}.")
    for ours in tables:
        lines = lines_of(paper, ours, beside(paper, ours, theirs))
        print(f"\n## {ours.name}\n\n{markdown(lines)}")
    print("\n## Claims\n")
    rows = list(paper["rows"])
    lines = []
    for claim in paper["claims"]:
        rivals = rivals_of(claim, rows, theirs)
        found = [judge(claim, table, rivals) for table in tables]
        reasons = [
            f"{table.name}: {verdict.word}"
            + (f" ({verdict.why})" if verdict.why else "")
            for table, verdict in zip(tables, found, strict=True)
        ]
        lines.append(
            {
                "claim": claim["says"],
                "held here": together(found),
                "why": "; ".join(reasons) or "not measured",
            }
        )
    print(markdown(lines))
    return bool(tables)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("records", type=Path, nargs="?", default=Path("records/papers"))
    parser.add_argument("--editors", action="store_true", help="print its editors")
    parser.add_argument("--edits", action="store_true", help="print its counts")
    args = parser.parse_args(argv)
    paper = read_paper(args.paper)
    if args.editors:
        print(*[editor for editor in rows_of(paper).values() if editor])
    elif args.edits:
        print(*paper["edits"])
    elif not print_table(args.paper, args.records):
        print(
            f"{args.records}: no reports; {paper['script']} makes them", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
