"""How the evaluation and the training of an editor of knowledge look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedit_cli.knowledge.models.shared.generation import described
from mmedit_cli.output import Output, counted
from mmedit_cli.reports.scores import (
    column_name,
    half_interval,
    known_beside,
    print_networks,
    run_of,
)

_PROTOCOLS = {
    "ar": "free generation",
    "ar_em": "free generation, strict match",
    "ar_f1": "free generation, token F1",
    "tf_liveedit": "teacher-forced, answer tokens",
    "tf_easyedit": "teacher-forced, locality at all positions",
    "tf_em": "teacher-forced, all answer tokens right",
}
_ROUTES = ("right", "other", "none")
_EXAMPLE = ("case", "target", "before", "after")


def print_scores(out: Output, report: Mapping[str, Any]) -> None:
    """Print the scores of an editor, a column a milestone, answers before and after, and how fast it went."""

    def show() -> None:
        milestones, short = _whole_groups(report["milestones"])
        _print_head(out, report)
        _print_scores(out, milestones)
        if short:
            out.line(
                f"  the last {short} cases made a shorter group of their own: in --json"
            )
        _print_runs(out, report)
        protocols = milestones[0]["scores"]
        _print_retention(out, report["retention"], next(iter(protocols)))
        if "unmoved" in report:
            out.line(
                f"  the loss of {counted(report['unmoved'], 'edit')} did not move: they learned nothing"
            )
        if "routing" in milestones[-1]:
            out.line()
            out.table(*_routing_table(milestones[-1]["routing"]))
        _print_examples(out, report["examples"])
        if "ability" in report:
            out.line(_ability(report["ability"]))
        out.line(_cost(report["cost"]))

    out.result(report, show)


def print_training(out: Output, report: Mapping[str, Any]) -> None:
    """Print how a training went: the held-out scores at the best step, and where the networks are."""

    def show() -> None:
        best = report["best"]
        editor, model = report["editor"], report["model"]["name"]
        out.line(f"{editor} for {model}, trained on {report['data']['cases']} cases")
        out.table(*_held_out_table(best))
        minutes = report["cost"]["seconds"] / 60
        size = f"{report['trained_parameters']:,} parameters"
        held_out = f"{report['validation_cases']} held-out cases"
        out.line(
            f"{size}, {_steps(report)} in {minutes:.1f} min; "
            f"{held_out} among {report['validation_edits']:,} edits, "
            "all answer tokens right"
        )
        out.line(f"networks: {Path(report['run']) / 'editor.safetensors'}")
        out.line(f"mmedit eval {editor} --model {model} --checkpoint {run_of(report)}")

    out.result(report, show)


def _steps(report: Mapping[str, Any]) -> str:
    """Say how long a training was, and whether it ended because nothing rose any more."""
    said = f"{report['steps']:,} steps"
    if not report.get("ended_early"):
        return said
    training = report["hparams"]["training"]
    looks = training["patience"]
    ended = f"ended after {looks} looks without a rise"
    return f"{said} ({ended})"


def _held_out_table(best: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): the held-out scores at the best step, of all cases and by whether the answer was taught.

    Trainings of version 0.1 do not know the latter.
    """
    parts = best.get("answers", {})
    header = ["held out", f"step {best['step']}"]
    for kind, part in parts.items():
        header.append(f"{kind} answers n={part['cases']}")
    rows = []
    for name, value in best["scores"].items():
        row = [column_name(name), _percent(value)]
        for part in parts.values():
            score = part["scores"].get(name)
            row.append("-" if score is None else _percent(score))
        rows.append(row)
    means = [best["score"], *(part["score"] for part in parts.values())]
    return header, [*rows, ["mean", *map(_percent, means)]]


def _print_head(out: Output, report: Mapping[str, Any]) -> None:
    """Print what was evaluated: editor, model, data, networks, and settings that do not count."""
    head = f"{report['editor']} on {report['model']['name']}, {report['data']['name']}"
    out.line(f"{head}: mean in % ± {_what_is_shown(report)}")
    for line in _selection(report["data"]):
        out.line(line)
    print_networks(out, report)
    if "edited" in report:
        edited = report["edited"]
        out.line(f"edited elsewhere: {edited['name']} ({edited['fingerprint']})")
    if "ignored_settings" in report:
        ignored = described(report["ignored_settings"])
        out.line(f"answers are greedy; the model's own settings are ignored: {ignored}")


def _what_is_shown(report: Mapping[str, Any]) -> str:
    """Say what stands behind a mean: the interval, and over several runs their standard deviation."""
    said = "95 % interval"
    if report.get("intervals", {}).get("by") == "concept":
        said += f" over {report['intervals']['concepts']:,} concepts"
    if "runs" in report:
        said += f", sd over {len(report['runs'])} runs"
    return said


def _print_runs(out: Output, report: Mapping[str, Any]) -> None:
    """Print how the last milestone differs between runs, and which runs these are; nothing for a single one."""
    if "runs" not in report:
        return
    milestones, _ = _whole_groups(report["milestones"])
    last = milestones[-1]
    rows, sections = _spread_rows(last["scores"])
    out.line()
    heads = ["mean of runs", "sd", "min", "max"]
    out.table(
        ["protocol", f"after {last['edits']}", *heads],
        rows,
        sections=sections,
    )
    runs = len(report["runs"])
    seeds = ", ".join(map(str, report["seeds"]))
    orders = report["orders"]
    out.line(f"  {runs} runs: seeds {seeds}; orders {orders}")


def _spread_rows(
    scores: Mapping[str, Mapping[str, Any]],
) -> tuple[list[list[str]], list[int]]:
    """Return (rows, indices after which a protocol ends): how each score differs between runs."""
    rows: list[list[str]] = []
    sections = []
    for protocol, columns in scores.items():
        title = protocol
        for column, score in columns.items():
            over = score["over_runs"]
            figures = [over[key] for key in ("mean", "sd", "min", "max")]
            cells = ["-" if value is None else _percent(value) for value in figures]
            rows.append([title, column_name(column), *cells])
            title = ""
        sections.append(len(rows) - 1)
    return rows, sections


def _print_scores(out: Output, milestones: Sequence[Mapping[str, Any]]) -> None:
    heads = []
    for milestone in milestones:
        heads.append(f"after {milestone['edits']}\nn={milestone['cases']}")
    rows, sections = _score_rows(milestones)
    out.table(["protocol", "score", "before", *heads], rows, sections=sections)
    for protocol in milestones[0]["scores"]:
        out.line(f"  {protocol}: {_PROTOCOLS[protocol]}")


def _print_retention(out: Output, retention: Mapping[str, Any], protocol: str) -> None:
    if len(retention.get("milestones", ())) > 1:
        out.line()
        out.table(*_retention_table(retention, protocol))


def _print_examples(out: Output, examples: Sequence[Mapping[str, Any]]) -> None:
    if not examples or examples[0]["after"] is None:
        return
    rows = []
    for example in examples:
        texts = [str(example[key]) for key in _EXAMPLE]
        rows.append([_short(text) for text in texts])
    out.line()
    out.table(["edit", "target", "answer before", "answer after"], rows)


def _whole_groups(
    milestones: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], int]:
    """Return the milestones of whole groups, if there are any, and how many cases a shorter last group had."""
    whole = [m for m in milestones if not m["short_group"]]
    if not whole:
        return list(milestones), 0
    short = [m["cases"] for m in milestones if m["short_group"]]
    return whole, max(short, default=0)


def _speed(cost: Mapping[str, Any]) -> str:
    """Say how fast edits were made."""
    seconds = cost.get("seconds_per_edit")
    if seconds is None:
        return "made elsewhere"
    rate = 1 / seconds["mean"]
    median = f"median {seconds['median']:.3g} s"
    slowest = f"p95 {seconds['p95']:.3g} s"
    return f"{rate:.3g} a second ({median}, {slowest})"


def _cost(cost: Mapping[str, Any]) -> str:
    """Say how fast it went."""
    text = f"{counted(cost['edits'], 'edit')}, {_speed(cost)}"
    asked = cost.get("asked", {"questions": 0})
    questions = asked["questions"]
    if questions:
        rate = questions / asked["seconds"]
        text += f"; {questions:,.0f} questions asked, {rate:,.0f} a second"
    return text


def _ability(ability: Mapping[str, Any]) -> str:
    """Say what became of what no edit is about."""
    text = ability["perplexity"]
    world = ability["world"]
    perplexities = f"perplexity {text['before']:.2f} before, {text['after']:.2f} after"
    kept = f"{world['kept']} of {world['n']} facts about the world kept"
    return f"ability: {perplexities}; {kept}"


def _selection(data: Mapping[str, Any]) -> Iterator[str]:
    """Say how the cases were chosen, where not all were taken as they are."""
    chosen = [f"{key} {data[key]}" for key in ("template", "subset") if key in data]
    if chosen:
        yield f"{data['cases']} cases, {', '.join(chosen)}"
    if "line_breaks" in data:
        yield f"{data['line_breaks']} cases had line breaks in their targets: blanks now, as an answer is one line"
    too_long = data.get("too_long", {})
    if too_long.get("queries"):
        yield (
            f"skipped: {too_long['queries']} queries are too long for the model, and with them "
            f"{too_long['cases']} cases"
        )
    if "skipped" in data:
        yield _skipped(data["skipped"])


def _skipped(gone: Mapping[str, Any]) -> str:
    """Say which pictures are missing, and which cases and probes went with them."""
    counts = []
    for column, count in gone["queries"].items():
        counts.append(f"{column_name(column)} {count}")
    names = ", ".join(counts)
    probes = f" and the probes {names}" if names else ""
    missing = gone["missing_images"]
    images = f"{missing} of {gone['images']} images are missing"
    return f"skipped: {images}, and with them {gone['cases']} cases{probes}"


def _score_rows(
    milestones: Sequence[Mapping[str, Any]],
) -> tuple[list[list[str]], list[int]]:
    """Return (rows, indices after which a protocol ends): a row a protocol and column, a cell a milestone."""
    rows: list[list[str]] = []
    sections = []
    for protocol in milestones[0]["scores"]:
        columns: dict[str, None] = {}
        for milestone in milestones:
            columns |= dict.fromkeys(milestone["scores"].get(protocol, {}))
        title = protocol
        for column in known_beside(columns):
            scores = [m["scores"].get(protocol, {}).get(column) for m in milestones]
            pairs = zip(scores, milestones, strict=True)
            cells = [_cell(score, milestone["cases"]) for score, milestone in pairs]
            rows.append([title, column_name(column), _before(scores), *cells])
            title = ""
        sections.append(len(rows) - 1)
    return rows, sections


def _before(scores: Sequence[Mapping[str, Any] | None]) -> str:
    """Return the score of the untouched model, which the last milestone knows best; empty where none has one."""
    before = None
    for score in scores:
        if score is not None and "before" in score:
            before = score["before"]
    return "" if before is None else _percent(before)


def _retention_table(
    retention: Mapping[str, Any], protocol: str
) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): the reliability of the edits made in each stretch, asked at each later milestone."""
    asked = [f"after {milestone}" for milestone in retention["milestones"]]
    header = [f"Rel retained ({protocol})", *asked]
    cohorts = retention["cohorts"]
    matrix = retention[protocol]["matrix"]
    rows = []
    for cohort, values in zip(cohorts, matrix, strict=True):
        row = [f"edits {cohort}"]
        for value in values:
            row.append("" if value is None else _percent(value))
        rows.append(row)
    return header, rows


def _routing_table(
    routing: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): which share of the queries of each column was answered by which edit, in %."""
    rows = []
    for column, shares in routing.items():
        cells = [_percent(shares[route]) for route in _ROUTES]
        rows.append([column_name(column), *cells])
    return ["answered by", "its own edit", "another", "none"], rows


def _cell(score: Mapping[str, Any] | None, cases: int) -> str:
    if score is None or score["mean"] is None:
        return "-"
    mean = _percent(score["mean"])
    spread = half_interval(score, 1, scale=100)
    between = score.get("over_runs", {}).get("sd")
    if between is not None:
        spread += f" sd {_percent(between)}"
    count = "" if score["n"] == cases else f" n={score['n']}"
    return f"{mean}{spread}{count}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _short(text: str, most: int = 36) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
