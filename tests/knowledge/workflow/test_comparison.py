"""`mmedit report compare`: what it says follows from its tests, and runs of other questions are refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

import mmedit_cli
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.workflow.comparison import compare
from mmedit_cli.records import Run

PROTOCOL = {
    "sequential": 10,
    "report_at": [1],
    "edit_batch": 1,
    "protocols": ["ar", "tf_liveedit"],
    "max_new_tokens": 16,
    "batch_size": 32,
}
DATA = {"name": "emojikb", "cases": 10, "fingerprint": "0123"}
NUMBER = 10  # cases
BETTER = [1.0] * NUMBER
WORSE = [1.0, *[0.0] * (NUMBER - 1)]


def line(case: int, scores: dict[str, float], edits: int = NUMBER) -> dict:
    table = {"ar": scores, "tf_liveedit": dict.fromkeys(scores, 0.5)}
    return {
        "group": 0,
        "edits": edits,
        "case": f"case-{case}",
        "concept": f"concept-{case}",
        "scores": table,
    }


def write_run(
    folder: Path,
    editor: str,
    reliability: list[float],
    *,
    data: dict = DATA,
    protocol: dict = PROTOCOL,
    **head,
) -> Path:
    """A finished run in which every case scores as given, and 1 at locality."""
    report = {
        "editor": editor,
        "model": {"name": "mini-blip2"},
        "data": data,
        "protocol": protocol,
        "milestones": [],
        "hparams": {},
        "versions": {"mmedit": "0"},
        **head,
    }
    lines = [
        line(
            case, {"reliability": score, "locality.text": 1.0, "generality.text": None}
        )
        for case, score in enumerate(reliability)
    ]
    with Run.open(folder, {}, {}) as run:
        run.append("cases", [line(0, {"reliability": 1.0}, edits=1), *lines])
        run.finish(report)
    return folder


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    better = write_run(tmp_path / "records" / "aaaa11", "liveedit", BETTER)
    worse = write_run(tmp_path / "records" / "bbbb22", "unike", WORSE)
    return better, worse


def test_a_difference_is_claimed_where_the_test_shows_it(runs):
    found = compare(runs).describe()
    reliability, locality = found["comparisons"]
    assert reliability["column"] == "reliability"
    assert reliability["difference"] == pytest.approx(-0.9)
    assert reliability["p"] == 2 / 2**9
    # the other score differs nowhere, so there is one test
    assert reliability["p_holm"] == reliability["p"]
    assert reliability["better"] == "liveedit"
    assert (locality["p"], locality["better"]) == (None, None)


def test_an_earlier_milestone_and_another_protocol_can_be_compared(runs):
    early = compare(runs, edits=1, protocols=["tf_liveedit"]).describe()
    (row,) = early["comparisons"]
    assert (row["protocol"], row["n"], row["mean_first"]) == ("tf_liveedit", 1, 0.5)
    with pytest.raises(UserError, match=r"--edits 5: .* was not asked then"):
        compare(runs, edits=5)
    with pytest.raises(UserError, match="protocol tf_em"):
        compare(runs, protocols=["tf_em"])


def test_orders_of_one_evaluation_are_averaged_by_case(tmp_path, runs):
    orders = []
    for name, scores in (("o0", WORSE), ("o1", BETTER)):
        orders.append(write_run(tmp_path / name, "unike", scores))
    head = {"runs": [{"run": str(folder)} for folder in orders], "orders": 2}
    spread = write_run(tmp_path / "spread", "unike", WORSE, **head)
    other = write_run(tmp_path / "other", "liveedit", BETTER, **head)
    found = compare([spread, other]).describe()["comparisons"][0]
    assert found["mean_first"] == found["mean_second"] == pytest.approx(0.55)
    with pytest.raises(UserError, match="orders 1, not 2"):
        compare([spread, runs[0]])


def test_a_table_over_orders_is_that_of_a_computation_by_hand(cli, tmp_path):
    # 8 concepts of two cases. T-Gen: the first run never has it, the second in one of two orders, so each concept's
    # total is 1 and p = 2 / 2^8. Rel: totals 2, 1, 1, -1, else 0; of the 16 signs 8 lead as far as 3 from 0. The
    # means: Rel 3 / 16 apart, T-Gen 8 / 16. Holm: 2 * 2 / 2^8 and 0.5.
    better = {(0, 0), (0, 1), (1, 0), (2, 0)}
    worse = {(3, 0)}

    def write(name: str, editor: str, order: int) -> Path:
        second = editor == "unike"
        lines = []
        for concept in range(8):
            for case in range(2):
                at = (concept, case)
                right = at in better if second else at in worse
                scores = {
                    "reliability": float(right),
                    "generality.text": float(second and order == 0),
                }
                one = line(2 * concept + case, scores)
                lines.append({**one, "concept": f"concept-{concept}"})
        folder = write_run(tmp_path / "records" / "eval" / name, editor, [])
        with Run.open(folder, {}, {}) as run:
            run.append("cases", lines)
        return folder

    for editor in ("liveedit", "unike"):
        runs = [write(f"{editor}{order}", editor, order) for order in range(2)]
        parts = [{"run": str(folder)} for folder in runs]
        head = {"runs": parts, "orders": 2}
        write_run(tmp_path / "records" / "spread" / editor, editor, [], **head)
    where = ("--where", "editor=liveedit,editor=unike")
    words = ("report", "compare", *where, "--records", str(tmp_path / "records"))
    code, out, err = cli(*words, "--json")
    assert code == 0, err
    rows = {row["column"]: row for row in json.loads(out)["comparisons"]}
    assert rows["reliability"]["difference"] == pytest.approx(3 / 16)
    assert rows["reliability"]["p"] == rows["reliability"]["p_holm"] == 0.5
    assert rows["generality.text"]["difference"] == pytest.approx(8 / 16)
    assert rows["generality.text"]["p"] == 2 / 2**8
    assert rows["generality.text"]["p_holm"] == 4 / 2**8
    assert [rows["generality.text"][key] for key in ("n", "concepts")] == [16, 8]
    said = cli(*words)[1]
    assert "unike is better than liveedit at T-Gen\n" in said
    assert said.count("is better than") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {**DATA, "fingerprint": "4567"}}, "fingerprint of the data 4567"),
        ({"data": {**DATA, "name": "vlkeb"}}, "data vlkeb, not emojikb"),
        ({"protocol": {**PROTOCOL, "sequential": 5}}, "sequential 5, not 10"),
    ],
)
def test_runs_of_other_questions_are_refused(tmp_path, runs, change, said):
    other = write_run(tmp_path / "other", "ft", BETTER, **change)
    with pytest.raises(UserError, match=said):
        compare([runs[0], other])


def test_a_protocol_that_only_asks_faster_is_the_same(tmp_path, runs):
    faster = {**PROTOCOL, "batch_size": 1}
    other = write_run(tmp_path / "other", "ft", BETTER, protocol=faster)
    assert compare([runs[0], other]).rows


def test_a_run_whose_cases_are_gone_is_refused(runs):
    (runs[1] / "cases.jsonl").unlink()
    with pytest.raises(UserError, match=r"cases\.jsonl is not there"):
        compare(runs)


def test_all_scores_can_be_had_as_flat_records(tmp_path):
    score = {"mean": 0.9, "n": 10, "ci95": [0.6, 1.0], "before": 0.1}
    unsure = {"mean": 0.5, "n": 1, "ci95": None}
    columns = {"reliability": score, "locality.text": unsure}
    milestone = {"edits": 10, "short_group": False, "scores": {"ar": columns}}
    head = {"milestones": [milestone], "seed": 3}
    write_run(tmp_path / "run", "liveedit", BETTER, **head)
    first, second = mmedit_cli.load_runs(tmp_path, "editor=liveedit")
    assert first == {
        "run": str(tmp_path / "run"),
        "editor": "liveedit",
        "model": "mini-blip2",
        "data": "emojikb",
        "seed": 3,
        "edits": 10,
        "short_group": False,
        "protocol": "ar",
        "column": "reliability",
        "mean": 0.9,
        "low": 0.6,
        "high": 1.0,
        "n": 10,
        "before": 0.1,
    }
    assert (second["low"], second["before"]) == (None, None)
    with pytest.raises(UserError, match="no finished run"):
        mmedit_cli.load_runs(tmp_path, "editor=ft")


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_table_says_who_is_better_at_what(cli, runs):
    code, out, _ = cli("report", "compare", *map(str, runs))
    assert code == 0
    assert "liveedit is better than unike at Rel" in out
    assert "-90.0" in out


def test_runs_are_found_by_what_they_are(cli, runs, tmp_path):
    records = ("--records", str(tmp_path / "records"))
    where = "editor=liveedit,editor=unike,model=mini-blip2"
    code, out, _ = cli("report", "compare", "--where", where, *records, "--json")
    assert code == 0
    named = {run["name"] for run in json.loads(out)["runs"]}
    assert named == {"liveedit", "unike"}
    by_id = cli("report", "compare", "aaaa", "bbbb", *records, "--json")
    by_pattern = cli("report", "compare", f"{tmp_path}/records/*", *records, "--json")
    assert (
        json.loads(by_id[1])["comparisons"] == json.loads(by_pattern[1])["comparisons"]
    )


def test_its_runs_are_records_of_every_eval_ever(cli, runs):
    arguments = ("report", "compare", *map(str, runs))
    code, out, _ = cli(*arguments, "--format", "every-eval-ever")
    assert code == 0
    records = json.loads(out)
    rows = json.loads(cli(*arguments, "--json")[1])["comparisons"]
    for record, side in zip(records, ("mean_first", "mean_second"), strict=True):
        results = record["evaluation_results"]
        details = [result["score_details"] for result in results]
        assert [found["score"] for found in details] == [row[side] for row in rows]
        for found in details:
            interval = found["uncertainty"]["confidence_interval"]
            assert interval["lower"] <= found["score"] <= interval["upper"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["aaaa"], "one run alone: nothing to compare"),
        ([], "no runs: nothing to compare"),
        (["aaaa", "cccc"], "cccc: no finished run"),
        (["--where", "editor=ft"], "no finished run"),
        (["--where", "editors=ft"], "not key=value"),
        (["aaaa", "bbbb", "--plot", "x.pdf"], "must end in"),
        (["aaaa", "bbbb", "--json", "--format", "csv"], "give one of them"),
    ],
)
def test_what_cannot_be_compared_is_one_line(cli, runs, tmp_path, arguments, said):
    code, out, err = cli(
        "report", "compare", *arguments, "--records", str(tmp_path / "records")
    )
    assert (code, out) == (2, "")
    assert said in err


def test_one_run_is_shown_and_not_the_first_of_several(cli, runs, tmp_path):
    code, out, err = cli("report", f"{tmp_path}/records/*")
    assert (code, out) == (2, "")
    assert "2 runs match" in err


def test_every_format_has_every_row(cli, runs):
    def text(form: str) -> str:
        code, out, _ = cli("report", "compare", *map(str, runs), "--format", form)
        assert code == 0
        return out

    rows = list(csv.reader(io.StringIO(text("csv"))))
    assert [row[0] for row in rows] == ["score", "Rel", "T-Loc"]
    assert text("markdown").count("\n") == 4
    latex = text("latex")
    assert latex.count(r"\\") == 3
    assert r"95 \% interval" in latex


def test_the_differences_are_drawn(cli, runs, tmp_path):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        code, _, _ = cli("report", "compare", *map(str, runs), "--plot", str(file))
        assert code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"liveedit better" in files[0].read_bytes()


@pytest.fixture
def milestones() -> list[dict]:
    """Two milestones of one score."""
    found = []
    for edits, mean in ((1, 1.0), (10, 0.5)):
        score = {"mean": mean, "n": 10, "ci95": [mean / 2, mean]}
        columns = {"reliability": score, "locality.text": {**score, "ci95": None}}
        found.append({"edits": edits, "short_group": False, "scores": {"ar": columns}})
    return found


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("edits", [b"Rel, %", b"T-Loc, %", b"edits in a row"]),
        ("retention", [b"unike: Rel retained", b"2-10"]),
        ("cost", [b"seconds an edit", b"liveedit"]),
    ],
)
def test_other_charts_are_drawn_where_there_is_something_to_draw(
    cli, tmp_path, monkeypatch, milestones, what, words
):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    retention = {
        "milestones": [1, 10],
        "cohorts": ["1-1", "2-10"],
        "ar": {"matrix": [[1.0, 0.5], [None, 1.0]]},
    }
    whole = {
        "milestones": milestones,
        "retention": retention,
        "cost": {"seconds_per_edit": {"mean": 0.1}},
    }
    bare: dict[str, dict] = {"retention": {}, "cost": {}}
    for head in (whole, bare):
        runs = []
        for editor, scores in (("liveedit", BETTER), ("unike", WORSE)):
            folder = tmp_path / str(len(head)) / editor
            runs.append(str(write_run(folder, editor, scores, **head)))
        file = tmp_path / "chart.svg"
        file.unlink(missing_ok=True)
        done = cli("report", "compare", *runs, "--plot", file, "--plot-of", what)
        if head is bare:
            assert (done[0], file.exists()) == (2, False)
            continue
        assert done[0] == 0, done[2]
        drawn = file.read_bytes()
        assert all(word in drawn for word in words), drawn[:400]
