"""Compare two editors after 1,000 edits in a row in three orders of the cases, and write what follows from the tests.

    python scripts/compare_over_orders.py                      # about an hour on two cores; again: goes on
    python scripts/compare_over_orders.py --editors liveedit multi-melo --page other.md

The section of docs/comparison.md between its two marks is written anew: each claim is a row of the table that the
test tells apart (`mmedit report compare`), none is written by hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mmedit_cli.knowledge.workflow.comparison import Comparison, compare
from mmedit_cli.reports.comparison import claims, markdown, table_of
from mmedit_cli.reports.finding import runs_where
from mmedit_cli.storage import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "comparison.md"
PROTOCOLS = ("ar", "tf_liveedit")
_BEGIN = "<!-- written by scripts/compare_over_orders.py -->"
_END = "<!-- end of what scripts/compare_over_orders.py writes -->"


def evaluate(editor: str, model: str, edits: int, orders: int, records: Path) -> None:
    """Make the edits of an editor in each order; what is finished is only read."""
    words = ["eval", editor, "--model", model, "--orders", str(orders)]
    for option in ("--sequential", "--limit", "--report-at"):
        words += [option, str(edits)]
    words += ["--protocols", ",".join(PROTOCOLS), "--records", str(records)]
    command = [sys.executable, "-m", "mmedit_cli", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def section(found: Comparison, protocol: str) -> str:
    """Return what the tests of a protocol say, and their table."""
    said = "\n".join(f"- **{text}.**" for text in claims(found))
    header, rows = table_of(found)
    return f"`{protocol}`:\n\n{said}\n\n{markdown(header, rows)}"


def text_of(compared: Sequence[Comparison], command: str) -> str:
    """Return the section of the page: a part for each protocol."""
    first = compared[0].runs[0]
    report = first.report
    versions = report["versions"]
    day = datetime.now(UTC).date()
    model = report["model"]
    used = f"torch {versions['torch']}, transformers {versions['transformers']}"
    weights = f"`{model['name']}` with the fingerprint `{model['fingerprint'][:12]}`"
    edits = f"{first.edits:,} edits of EmojiKB in {report['orders']} orders"
    head = (
        f"`{command}`, written {day} ({used}):\n{weights}, {edits}.\n"
        "The score of a case is its mean over the orders. In %; the columns are explained in\n"
        "[reports](reports.md#is-one-editor-better-than-another), and a claim is a row whose p, raised for all rows\n"
        "of its table, is below 0.05.\n"
    )
    parts = [
        section(found, protocol)
        for found, protocol in zip(compared, PROTOCOLS, strict=True)
    ]
    return "\n".join([head, *parts])


def put(page: Path, text: str) -> None:
    """Write the section between its marks."""
    old = page.read_text(encoding="utf-8")
    before, begin, rest = old.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{page}: the marks {_BEGIN} and {_END} are not there")
    write_atomic(page, f"{before}{begin}\n{text}\n{end}{after}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--editors", nargs=2, default=["liveedit", "unike"])
    parser.add_argument("--model", default="mini-blip2")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--records", type=Path, default=Path("records/orders"))
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    for editor in args.editors:
        evaluate(editor, args.model, args.edits, args.orders, args.records)
    wanted = [f"editor={editor}" for editor in args.editors]
    runs = runs_where(",".join([*wanted, f"model={args.model}"]), args.records)
    compared = [compare(runs, protocols=[protocol]) for protocol in PROTOCOLS]
    put(args.page, text_of(compared, "python scripts/compare_over_orders.py"))
    print(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
