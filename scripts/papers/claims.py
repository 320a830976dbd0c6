"""Write docs/claims.md: each headline claim of the papers, what was published, what was measured here, and how.

    python scripts/papers/claims.py records/papers                      # from the reports in this folder
    python scripts/papers/claims.py records/papers --out claims.md

Figures are those of reports; a claim of which there is none says "not measured".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import PAPERS, Table, measured, published, read_paper
from table import shown
from verdicts import judge, rivals_of, together

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare_editors import table as markdown

from mmedit_cli.storage import write_atomic

PAGE = Path(__file__).resolve().parents[2] / "docs" / "claims.md"
_HEAD = """# Claims of the papers

What the papers behind mmedit's methods claim, the figures they published, what was measured here, and whether the
claim held: on small models and drawn pictures unless a row names others. `scripts/papers/` makes the tables again, and
`python scripts/papers/claims.py records/papers` this page. Do not edit it by hand.

- **reproduced**: the rule of the claim holds in every table of ours, by more than the 95 % intervals of its figures.
- **not reproduced**: in one table at least it fails by more than the intervals.
- **cannot be told**: a figure is missing, or the intervals are too wide.

The rule of each claim, and the published figures with their source, are in the paper's file in `scripts/papers/`
(`scripts/papers/verdicts.py` says what rules there are). *Best other* is the best among the rows that the claim is
compared with, *was* the same row after fewer edits.
"""


def figure_text(
    claim: Mapping[str, Any],
    tables: Sequence[Table],
    rivals: Sequence[str],
    *,
    named: bool,
) -> str:
    """Return the figures that a claim is about: of each table its own, and the best it is compared with."""
    rule = claim.get("rule")
    if rule is None:
        return ""
    against = rule.get("above", rule.get("below", ()))
    rows = rivals if against == "others" else against
    parts = []
    for table in tables:
        own = table.figures.get((rule["of"], rule["after"], rule["score"]))
        if own is None:
            parts += [] if named else ["-"]
            continue
        text = shown(own)
        keys = [(row, rule["after"], rule["score"]) for row in rows]
        others = [table.figures[key] for key in keys if key in table.figures]
        if others:
            ends = [figure.value for figure in others]
            best = min(ends) if "below" in rule else max(ends)
            of = next(figure for figure in others if figure.value == best)
            text += f" (best other {shown(of)})"
        before = table.figures.get((rule["of"], rule.get("since", ""), rule["score"]))
        if before is not None:
            text += f" (was {shown(before)})"
        parts.append(f"{table.name}: {text}" if named else text)
    return "" if set(parts) <= {"-"} else "; ".join(parts)


def section(name: str, records: Path) -> str:
    """Return what the page says of one paper."""
    paper = read_paper(name)
    theirs = published(paper)
    ours = measured(paper, records) if records.is_dir() else []
    lines = []
    for claim in paper["claims"]:
        rivals = rivals_of(claim, list(paper["rows"]), theirs)
        found = [judge(claim, table, rivals) for table in ours]
        lines.append(
            {
                "claim": claim["says"],
                "published": figure_text(claim, theirs, rivals, named=False)
                or claim.get("published", ""),
                "here": figure_text(claim, ours, rivals, named=True) or "not measured",
                "held here": together(found),
                "why": "; ".join(dict.fromkeys(v.why for v in found if v.why)),
            }
        )
    order = "; ".join(f"*{table.name}*" for table in theirs)
    published_of = (
        f" Published figures are of, in this order: {order}." if order else ""
    )
    return (
        f"\n## {paper['title']}\n\nSource: {paper['source']}. Made by `{paper['script']}`.{published_of}\n\n"
        f"{markdown(lines)}\n"
    )


def page(records: Path, note: str = "") -> str:
    """Return the whole page; `note` says how our figures were measured."""
    how = f"\n{note}\n" if note else ""
    return _HEAD + how + "".join(section(name, records) for name in PAPERS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="?", default=Path("records/papers"))
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--note", default="", help="how our figures were measured")
    args = parser.parse_args(argv)
    write_atomic(args.out, page(args.records, args.note))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
