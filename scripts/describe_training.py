"""Write down how an editor was trained, as a section of data/models/README.md.

python scripts/describe_training.py records/train-editor/liveedit/mini-blip2/emojikb/0123456789ab
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmedit_cli.records import Run
from mmedit_cli.reports.scores import column_name


def section(report: dict[str, Any]) -> str:
    """Return the section: command, machine, time, and the curve on held-out cases."""
    model, editor, best = report["model"]["name"], report["editor"], report["best"]
    about, names = report["environment"], list(best["scores"])
    rows = [
        f"| {line['step']:,} | {losses_at(report, line['step']):.3f} | "
        + " | ".join(f"{100 * line['scores'][name]:.1f}" for name in names)
        + f" | {100 * line['score']:.1f} |"
        for line in report["curve"]
    ]
    return "\n".join(
        (
            f"### `{editor}` for `{model}`",
            "",
            f"    mmedit train-editor {editor} --model {model} --data {report['data']['name']}",
            "",
            f"{report['data']['cases']:,} cases, {report['steps']:,} steps in {report['cost']['seconds'] / 60:.1f} "
            f"minutes on {about['platform']}, {about['device']}, {about['threads']} threads (other work included), "
            f"torch {report['versions']['torch']}; {report['trained_parameters']:,} parameters. The checkpoint of "
            f"step {best['step']:,} is the best on {report['validation_cases']} held-out cases among "
            f"{report['validation_edits']:,} edits. "
            "In %, all tokens of the answer right"
            + "".join(
                f"; {key} {value} was then chosen on the same cases"
                for key, value in report["calibrated"].items()
            )
            + ":",
            "",
            "| step | loss | "
            + " | ".join(column_name(name) for name in names)
            + " | mean |",
            "|---:|---:|" + "---:|" * (len(names) + 1),
            *rows,
        )
    )


def losses_at(report: dict[str, Any], step: int) -> float:
    """Return the mean training loss up to a step, since the line of the log before it."""
    return next(
        float(line["losses"]["total"])
        for line in report["losses"]
        if line["step"] == step
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    print(section(Run.read_report(parser.parse_args().run)))


if __name__ == "__main__":
    main()
