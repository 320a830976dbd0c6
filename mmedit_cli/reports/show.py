"""How results look to people: the tables of `eval`, `report` and `list`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedit_cli.errors import RunError
from mmedit_cli.knowledge.models.shared.generation import described
from mmedit_cli.output import Output
from mmedit_cli.records import Run

_PROTOCOLS = {
    "ar": "free generation",
    "ar_em": "free generation, strict match",
    "ar_f1": "free generation, token F1",
    "tf_liveedit": "teacher-forced, answer tokens",
    "tf_easyedit": "teacher-forced, locality at all positions",
    "tf_em": "teacher-forced, all answer tokens right",
}
_AGAIN = "run the command again with --force"
_TESTS = (
    "reliability",
    "generality",
    "class",
    "other",
    "pair",
)  # of concepts, as they are printed
_NAMES = {
    "reliability": "Rel",
    "generality.text": "T-Gen",
    "generality.image": "M-Gen",
    "generality.both": "TM-Gen",
    "locality.text": "T-Loc",
    "locality.image": "M-Loc",
    "scope": "Scope",
}


def plan(out: Output, described: Mapping[str, Any]) -> None:
    """Print what a command would do."""
    out.result(described, lambda: out.yaml(described))


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a run folder; raise RunError if the run has none."""
    report = Run.finished(folder)
    if report is None:
        raise RunError(
            f"{folder}: no finished run here", "`mmedit report` lists the finished ones"
        )
    return report


def report(out: Output, report: Mapping[str, Any]) -> None:
    """Print the report of an evaluation (scores, answers before and after, cost), or of a training.

    Raises RunError if it has not the form of one.
    """
    with _form(str(report.get("run", "report.json"))):
        _report(out, report)


@contextmanager
def _form(place: str) -> Iterator[None]:
    """Turn what misses a key or has another type into a RunError: reports come from disk."""
    try:
        yield
    except KeyError as error:
        raise RunError(
            f"{place}: not a report of this program: {error} is missing", _AGAIN
        ) from error
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        IndexError,
        AttributeError,
        StopIteration,
    ) as error:
        raise RunError(
            f"{place}: not a report of this program: {error}", _AGAIN
        ) from error


def _report(out: Output, report: Mapping[str, Any]) -> None:
    if "milestones" not in report:
        kinds = {"best": training, "scores": image_scores, "sides": concept_scores}
        next((shown for key, shown in kinds.items() if key in report), image_training)(
            out, report
        )
        return

    def show() -> None:
        milestones, short = _whole_groups(report["milestones"])
        heads = [f"after {m['edits']}\nn={m['cases']}" for m in milestones]
        rows, sections = _score_rows(milestones)
        out.line(
            f"{report['editor']} on {report['model']['name']}, {report['data']['name']}: mean in % ± 95 % interval"
        )
        for line in _selection(report["data"]):
            out.line(line)
        _networks(out, report)
        if "ignored_settings" in report:
            out.line(
                f"answers are greedy; the model's own settings are ignored: {described(report['ignored_settings'])}"
            )
        out.table(["protocol", "score", "before", *heads], rows, sections=sections)
        for protocol in milestones[0]["scores"]:
            out.line(f"  {protocol}: {_PROTOCOLS[protocol]}")
        if short:
            out.line(
                f"  the last {short} cases made a shorter group of their own: in --json"
            )
        if len(report["retention"].get("milestones", ())) > 1:
            out.line()
            out.table(
                *_retention_table(
                    report["retention"], next(iter(milestones[0]["scores"]))
                )
            )
        if "unmoved" in report:
            out.line(
                f"  the loss of {report['unmoved']} edits did not move: they learned nothing"
            )
        if "routing" in milestones[-1]:
            out.line()
            out.table(*_routing_table(milestones[-1]["routing"]))
        said = [
            [_short(str(e[k])) for k in ("case", "target", "before", "after")]
            for e in report["examples"]
        ]
        if report["examples"] and report["examples"][0]["after"] is not None:
            out.line()
            out.table(["edit", "target", "answer before", "answer after"], said)
        out.line(_cost(report["cost"]))

    out.result(report, show)


def training(out: Output, report: Mapping[str, Any]) -> None:
    """Print how a training went: the held-out scores at the best step, and where the networks are."""

    def show() -> None:
        best, seconds = report["best"], report["cost"]["seconds"]
        out.line(
            f"{report['editor']} for {report['model']['name']}, trained on {report['data']['cases']} cases"
        )
        rows = [
            [column_name(name), f"{100 * value:.1f}"]
            for name, value in best["scores"].items()
        ]
        out.table(
            ["held out", f"step {best['step']}"],
            [*rows, ["mean", f"{100 * best['score']:.1f}"]],
        )
        out.line(
            f"{report['trained_parameters']:,} parameters, {report['steps']:,} steps in {seconds / 60:.1f} min; "
            f"{report['validation_cases']} held-out cases among {report['validation_edits']:,} edits, "
            "all answer tokens right"
        )
        out.line(f"networks: {Path(report['run']) / 'editor.safetensors'}")
        out.line(
            f"mmedit eval {report['editor']} --model {report['model']['name']} --checkpoint {_run_of(report)}"
        )

    out.result(report, show)


def image_training(out: Output, report: Mapping[str, Any]) -> None:
    """Print how the training of an image editor went: losses on held-out pairs, and where it is."""

    def show() -> None:
        out.line(
            f"{report['editor']} on {report['model']['name']}, trained on {report['data']['cases']} pairs"
        )
        names = list(report["curve"][-1]["held_out"]) if report["curve"] else []
        rows = [
            [str(line["step"]), *(f"{line['held_out'][n]:.4f}" for n in names)]
            for line in report["curve"][-5:]
        ]
        out.table(["step", *(f"held-out loss, {name}" for name in names)], rows)
        minutes = report["cost"]["seconds"] / 60
        out.line(
            f"{report['trained_parameters']:,} parameters, {report['steps']:,} steps in {minutes:.1f} min"
        )
        out.line(
            f"mmedit image-edit {report['editor']} --checkpoint {_run_of(report)} --image ..."
        )

    out.result(report, show)


def image_scores(out: Output, report: Mapping[str, Any]) -> None:
    """Print the scores of an image editor, beside those of giving every picture back as it is."""

    def show() -> None:
        out.line(
            f"{report['editor']} ({report['model']['name']}) on {report['data']['name']}: mean ± 95 % interval"
        )
        _networks(out, report)
        rows = [
            _score_row("all", name, score) for name, score in report["scores"].items()
        ]
        rows += [
            _score_row(kind, name, scores[name])
            for kind, scores in report["by_kind"].items()
            for name in ("L1", "kept", "reached")
            if name in scores
        ]
        out.table(
            ["pairs", "score", "better is", "edited", "picture as it is", "n"], rows
        )
        for key, name in report["encoders"].items():
            if name not in ("", "none"):
                out.line(f"{key}: {name}")
        out.line(
            f"{report['cost']['seconds_per_edit']:.3g} s an edit; pictures: {report['gallery']}"
        )

    out.result(report, show)


def concept_scores(out: Output, report: Mapping[str, Any]) -> None:
    """Print the scores of a personalizer, side by side with those of the base model and of the photos."""

    def show() -> None:
        data = report["data"]
        out.line(
            f"{report['editor']} on {report['model']['name']}, {data['name']}: mean ± 95 % interval over subjects"
        )
        sides = [side for side in ("photos", "base") if side in report["sides"]]
        sides += [side for side in report["sides"] if side not in sides]
        tests = sorted(
            {test for side in sides for test in report["sides"][side]}, key=_TESTS.index
        )
        rows, sections = [], []
        for test in tests:
            names = dict.fromkeys(
                n for side in sides[::-1] for n in report["sides"][side].get(test, {})
            )
            for i, name in enumerate(names):
                cells = [
                    _concept_cell(
                        report["sides"][side].get(test, {}).get(name),
                        4 if name == "L1" else 1,
                    )
                    for side in sides
                ]
                rows.append(["" if i else test, name, *cells])
            sections.append(len(rows) - 1)
        out.table(["test", "score", *sides], rows, sections=sections)
        if report["routing"]:
            said = ("right", "other", "none")
            sent = [
                [test, *(f"{100 * found.get(s, 0):.1f}" for s in said)]
                for test, found in report["routing"].items()
            ]
            out.table(["the router sends to, in %", *said], sent)
        for key in ("clip", "dino", "encoder"):
            if (name := report["settings"][key]) != "none":
                out.line(
                    f"{'own encoder' if key == 'encoder' else key.upper()}: {name}"
                )
        if report["nameless"]:
            out.line(
                f"not asked for by name, {report['settings']['encoder']} has none: {', '.join(report['nameless'])}"
            )
        seconds = report["cost"]["seconds_per_subject"]
        out.line(
            f"{data['cases']} subjects, {seconds:.3g} s to learn one; gallery: {report['gallery']}"
        )

    out.result(report, show)


def _networks(out: Output, report: Mapping[str, Any]) -> None:
    """Say which trained networks answered, where there are any; reports of 0.1.0 do not know."""
    from mmedit_cli.knowledge.trained_networks import networks_line

    if report.get("networks"):
        out.line(networks_line(report["networks"]))


def _run_of(report: Mapping[str, Any]) -> str:
    """Return the id of a run."""
    return Path(report["run"]).name


def _concept_cell(score: Mapping[str, Any] | None, digits: int) -> str:
    if score is None:
        return ""
    return f"{score['mean']:.{digits}f}{_half_interval(score, digits)}"


def _score_row(pairs: str, name: str, score: Mapping[str, Any]) -> list[str]:
    from mmedit_cli.picture_editing.workflow.evaluation import SCORES

    mean = f"{score['mean']:.4f}{_half_interval(score, 4)}"
    unchanged = "-" if score["unchanged"] is None else f"{score['unchanged']:.4f}"
    return [pairs, name, SCORES[name], mean, unchanged, str(score["n"])]


def _whole_groups(
    milestones: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], int]:
    """Return the milestones of whole groups, if there are any, and how many cases a shorter last group had."""
    whole = [m for m in milestones if not m["short_group"]]
    if not whole:
        return list(milestones), 0
    return whole, max((m["cases"] for m in milestones if m["short_group"]), default=0)


def _cost(cost: Mapping[str, Any]) -> str:
    """Say how fast it went."""
    seconds, asked = cost["seconds_per_edit"], cost.get("asked", {"questions": 0})
    spread = f"median {seconds['median']:.3g} s, p95 {seconds['p95']:.3g} s"
    text = f"{cost['edits']:,} edits, {1 / seconds['mean']:.3g} a second ({spread})"
    if asked["questions"]:
        text += f"; {asked['questions']:,.0f} questions asked, {asked['questions'] / asked['seconds']:,.0f} a second"
    return text


def _selection(data: Mapping[str, Any]) -> Iterator[str]:
    """Say how the cases were chosen, where not all were taken as they are."""
    chosen = ", ".join(
        f"{key} {data[key]}" for key in ("template", "subset") if key in data
    )
    if chosen:
        yield f"{data['cases']} cases, {chosen}"
    if "line_breaks" in data:
        yield f"{data['line_breaks']} cases had line breaks in their targets: blanks now, as an answer is one line"
    gone = data.get("too_long", {})
    if gone.get("queries"):
        yield f"skipped: {gone['queries']} queries are too long for the model, and with them {gone['cases']} cases"
    if "skipped" in data:
        gone = data["skipped"]
        probes = ", ".join(
            f"{column_name(column)} {count}"
            for column, count in gone["queries"].items()
        )
        yield (
            f"skipped: {gone['missing_images']} of {gone['images']} images are missing, and with them {gone['cases']} "
            f"cases{' and the probes ' + probes if probes else ''}"
        )


def _score_rows(
    milestones: Sequence[Mapping[str, Any]],
) -> tuple[list[list[str]], list[int]]:
    """Return (rows, indices after which a protocol ends): a row a protocol and column, a cell a milestone."""
    rows: list[list[str]] = []
    sections = []
    for protocol in milestones[0]["scores"]:
        columns = dict.fromkeys(
            c for m in milestones for c in m["scores"].get(protocol, {})
        )
        first = protocol
        for column in columns:
            scores = [m["scores"].get(protocol, {}).get(column) for m in milestones]
            before = next(
                (
                    s["before"]
                    for s in reversed(scores)
                    if s is not None and "before" in s
                ),
                None,
            )
            cells = [
                _cell(score, m["cases"])
                for score, m in zip(scores, milestones, strict=True)
            ]
            rows.append(
                [
                    first,
                    column_name(column),
                    "" if before is None else f"{100 * before:.1f}",
                    *cells,
                ]
            )
            first = ""
        sections.append(len(rows) - 1)
    return rows, sections


def _retention_table(
    retention: Mapping[str, Any], protocol: str
) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): the reliability of the edits made in each stretch, asked at each later milestone."""
    header = [
        f"Rel retained ({protocol})",
        *(f"after {m}" for m in retention["milestones"]),
    ]
    rows = [
        [
            f"edits {cohort}",
            *("" if value is None else f"{100 * value:.1f}" for value in row),
        ]
        for cohort, row in zip(
            retention["cohorts"], retention[protocol]["matrix"], strict=True
        )
    ]
    return header, rows


def _routing_table(
    routing: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows): which share of the queries of each column was answered by which edit, in %."""
    sent = ("right", "other", "none")
    rows = [
        [column_name(column), *(f"{100 * shares[s]:.1f}" for s in sent)]
        for column, shares in routing.items()
    ]
    return ["answered by", "its own edit", "another", "none"], rows


def _cell(score: Mapping[str, Any] | None, cases: int) -> str:
    if score is None or score["mean"] is None:
        return "-"
    count = "" if score["n"] == cases else f" n={score['n']}"
    return f"{100 * score['mean']:.1f}{_half_interval(score, 1, scale=100)}{count}"


def _half_interval(score: Mapping[str, Any], digits: int, scale: float = 1) -> str:
    """Return ` ±` and half the width of the interval, ` -` where the scores say nothing of their spread."""
    if score["ci95"] is None:
        return " -"
    low, high = score["ci95"]
    return f" ±{scale * (high - low) / 2:.{digits}f}"


def _short(text: str, most: int = 36) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def column_name(column: str) -> str:
    """Return the short name of a column as the papers print it."""
    family, _, name = column.partition(".")
    prefix = {"locality": "Loc", "generality": "Gen", "portability": "Port"}.get(
        family, family
    )
    return _NAMES.get(column, f"{prefix} {name}")


def image_edits(
    out: Output, report: Mapping[str, Any], *, with_instruction: bool
) -> None:
    """Print the files that were made and, if asked for, the instruction that was derived for each."""

    def show() -> None:
        for edit in report["edits"]:
            for warning in edit["warnings"]:
                out.note(f"{edit['image']}: {warning}")
            out.line(edit["output"])
            if with_instruction:
                out.line(
                    f"  {edit['expressive'] or edit['instruction']} ({edit['expressive_source'] or 'as given'})"
                )

    out.result(report, show)


def runs(out: Output, records: Path) -> None:
    """List the finished runs of a records folder, the newest first."""
    found = sorted(
        records.rglob("report.json"),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    rows = []
    for path in found:
        with _form(str(path)):
            rows.append(_run_row(read_report(path.parent), path.parent))
    header = ["editor", "model", "data", "edits", "reliability", "run"]
    out.result(
        [dict(zip(header, row, strict=True)) for row in rows],
        lambda: (
            out.table(header, rows)
            if rows
            else out.line(f"no finished runs in {records}")
        ),
    )


def _run_row(done: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the row of a finished run: editor, model, data, edits or what was made, score, folder."""
    if "milestones" in done:
        last = done["milestones"][-1]
        protocol, scores = next(iter(last["scores"].items()))
        what, score = (
            str(last["edits"]),
            f"{protocol} {100 * scores['reliability']['mean']:.1f}",
        )
    else:  # a training, or another kind of evaluation
        score = f"held out {100 * done['best']['score']:.1f}" if "best" in done else ""
        what = (
            f"L1 {done['scores']['L1']['mean']:.4f}" if "scores" in done else "trained"
        )
        if "sides" in done:
            what = f"{done['data']['cases']} subjects"
    names = [done["editor"], done["model"]["name"], done["data"]["name"]]
    return [*map(str, names), what, score, str(folder)]
