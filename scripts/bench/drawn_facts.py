"""Tables and a sheet of evaluations of concept editors on drawn facts, for docs/concept-editing.md.

    for m in uce time; do mmedit eval $m --data emojikb-facts --limit 62 --set eval.steps=10; done
    python scripts/bench/drawn_facts.py records/eval-facts/*/mini-sd/emojikb-facts/* --sheet docs/drawn-facts.webp

Printed is a Markdown table a way: the shares of what the untouched model draws right when asked for it, and seconds.
The sheet shows the first facts of each kind, drawn by the untouched model and after each edit alone.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmedit_cli.records import Run
from mmedit_cli.storage import write_atomic

COLUMNS = ("efficacy", "generality", "specificity", "subject")
SIDE, GAP, TEXT = 64, 4, 14  # pixels: a picture, between things, a line
SHOWN = 3  # facts of a kind on the sheet


def cell(score: dict[str, Any] | None) -> str:
    """Return a share in percent with half its interval, and how many pictures it is of."""
    if score is None:
        return ""
    low, high = score["ci95"]
    return f"{100 * score['mean']:.0f} ±{50 * (high - low):.0f} ({score['n']})"


def rows_of(reports: list[dict[str, Any]], way: str) -> list[list[str]]:
    """Return a row a method and kind."""
    rows = []
    for kind in reports[0]["kinds"]:
        for report in reports:
            found = report["ways"][way][kind]
            cells = [cell(found.get(f"{column} known")) for column in COLUMNS]
            key = "seconds_together" if way == "together" else "seconds_per_edit"
            seconds = report["cost"][key][kind]
            rows.append([kind, f"`{report['editor']}`", *cells, f"{seconds:.2f}"])
    return rows


def sheet(reports: list[dict[str, Any]], runs: list[Path]) -> Image.Image:
    """Draw the first facts of each kind: before, and after the edit alone by each method."""
    chosen: list[dict[str, Any]] = []
    cases = [Run.view(run).read("cases") for run in runs]
    for kind in reports[0]["kinds"]:
        of_kind = [c for c in cases[0] if c["kind"] == kind and c["way"] == "before"]
        chosen += of_kind[:SHOWN]
    names = ["before", *(report["editor"] for report in reports)]
    width = GAP + len(names) * (SIDE + GAP)
    height = SIDE + TEXT + GAP
    drawn = Image.new("RGB", (2 * width, TEXT + -(-len(chosen) // 2) * height), "white")
    pen = ImageDraw.Draw(drawn)
    for half in (0, 1):
        for i, name in enumerate(names):
            pen.text((half * width + GAP + i * (SIDE + GAP), 0), name, "#707070")
    for number, case in enumerate(chosen):
        left = number % 2 * width + GAP
        top = TEXT + number // 2 * height
        target = " | ".join(case["targets"]) or "nothing"
        words = f"{case['source']}: {target.removeprefix(case['source']).strip()}"
        pen.text((left, top), words[: width // 6], "#202020")
        files = [runs[0] / "pictures" / case["probes"][0]["picture"]]
        for run, lines in zip(runs, cases, strict=True):
            alone = next(
                c for c in lines if c["fact"] == case["fact"] and c["way"] == "alone"
            )
            files.append(run / "pictures" / alone["probes"][0]["picture"])
        for i, file in enumerate(files):
            with Image.open(file) as picture:
                drawn.paste(picture, (left + i * (SIDE + GAP), top + TEXT))
    return drawn


def main() -> None:
    """Print the tables and write the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    reports = [Run.read_report(run) for run in args.runs]
    for way in ("alone", "together"):
        print(f"\n{way}\n")
        print("| edits | method | " + " | ".join(COLUMNS) + " | seconds |")
        print("|---|---|" + "---:|" * (len(COLUMNS) + 1))
        for row in rows_of(reports, way):
            print(f"| {' | '.join(row)} |")
    for report in reports:
        shares = {way: share["mean"] for way, share in report["collapsed"].items()}
        print(report["editor"], "collapsed", shares, "undo", report["undo"])
    if args.sheet is not None:
        file = io.BytesIO()
        sheet(reports, args.runs).save(file, "WEBP", quality=70, method=6)
        write_atomic(args.sheet, file.getvalue())


if __name__ == "__main__":
    main()
