"""How the edits, the evaluation and the training of an image editor look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmedit_cli.output import Output
from mmedit_cli.reports.scores import half_interval, print_networks, run_of

_OF_A_KIND = ("L1", "kept", "reached")  # scores that are printed for each kind of pair


def print_edits(
    out: Output, report: Mapping[str, Any], *, with_instruction: bool
) -> None:
    """Print the files that were made and, if asked for, the instruction that was derived for each."""

    def show() -> None:
        for edit in report["edits"]:
            for warning in edit["warnings"]:
                out.note(f"{edit['image']}: {warning}")
            out.line(edit["output"])
            if with_instruction:
                instruction = edit["expressive"] or edit["instruction"]
                source = edit["expressive_source"] or "as given"
                out.line(f"  {instruction} ({source})")

    out.result(report, show)


def print_scores(out: Output, report: Mapping[str, Any]) -> None:
    """Print the scores of an image editor, beside those of giving every picture back as it is."""

    def show() -> None:
        head = f"{report['editor']} ({report['model']['name']})"
        out.line(f"{head} on {report['data']['name']}: mean ± 95 % interval")
        print_networks(out, report)
        out.table(
            ["pairs", "score", "better is", "edited", "picture as it is", "n"],
            _score_rows(report),
        )
        for key, name in report["encoders"].items():
            if name not in ("", "none"):
                out.line(f"{key}: {name}")
        seconds = report["cost"]["seconds_per_edit"]
        out.line(f"{seconds:.3g} s an edit; pictures: {report['gallery']}")

    out.result(report, show)


def print_training(out: Output, report: Mapping[str, Any]) -> None:
    """Print how the training of an image editor went: losses on held-out pairs, and where it is."""

    def show() -> None:
        editor = report["editor"]
        out.line(
            f"{editor} on {report['model']['name']}, trained on {report['data']['cases']} pairs"
        )
        curve = report["curve"]
        names = list(curve[-1]["held_out"]) if curve else []
        rows = []
        for line in curve[-5:]:
            losses = [line["held_out"][name] for name in names]
            rows.append([str(line["step"]), *(f"{loss:.4f}" for loss in losses)])
        out.table(["step", *(f"held-out loss, {name}" for name in names)], rows)
        minutes = report["cost"]["seconds"] / 60
        out.line(
            f"{report['trained_parameters']:,} parameters, {report['steps']:,} steps in {minutes:.1f} min"
        )
        out.line(
            f"mmedit image-edit {editor} --checkpoint {run_of(report)} --image ..."
        )

    out.result(report, show)


def _score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a row a score: of all pairs, then of each kind of pair."""
    rows = []
    for name, score in report["scores"].items():
        rows.append(_score_row("all", name, score))
    for kind, scores in report["by_kind"].items():
        for name in _OF_A_KIND:
            if name in scores:
                rows.append(_score_row(kind, name, scores[name]))
    return rows


def _score_row(pairs: str, name: str, score: Mapping[str, Any]) -> list[str]:
    from mmedit_cli.picture_editing.workflow.evaluation import SCORES

    spread = half_interval(score, 4)
    edited = f"{score['mean']:.4f}{spread}"
    floor = score["unchanged"]
    unchanged = "-" if floor is None else f"{floor:.4f}"
    better = SCORES[name]
    count = str(score["n"])
    return [pairs, name, better, edited, unchanged, count]
