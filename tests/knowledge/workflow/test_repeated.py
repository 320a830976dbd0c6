"""`mmedit eval --seeds --orders`: every run is a plain run, and a kill at any moment changes nothing."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SHAPES

from mmedit_cli.errors import DataError, RunError, UserError
from mmedit_cli.knowledge import loading
from mmedit_cli.knowledge.data.vlkeb import DATASET as VLKEB
from mmedit_cli.knowledge.evaluation.protocol import Protocol
from mmedit_cli.knowledge.workflow import evaluation, repeated
from mmedit_cli.knowledge.workflow.repeated import Repetitions
from mmedit_cli.output import Output

TWICE = Repetitions((0, 1), orders=2)
IN_TWO_ORDERS = Repetitions(orders=2)


def options(records, editor="ft", **more) -> evaluation.EvalOptions:
    return evaluation.EvalOptions(
        editor,
        loading.ModelOptions("tiny-blip2", device="cpu"),
        str(SHAPES),
        Protocol(3, (1,), protocols=("ar",), max_new_tokens=3),
        overrides=("steps=2",),
        limit=4,
        records=records,
        **more,
    )


def quiet() -> Output:
    return Output(as_json=True)


def comparable(report: dict, folder) -> str:
    plain = {key: value for key, value in report.items() if key != "cost"}
    return json.dumps(plain).replace(str(folder), "")


def test_each_run_is_what_a_plain_command_makes(tmp_path):
    """One model serves all runs: nothing of one is left in the next."""
    request = options(tmp_path / "all", "lora")
    report = repeated.evaluate_repeatedly(request, TWICE, quiet())
    assert [(run["seed"], run["order"]) for run in report["runs"]] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
    ]
    for seed in (0, 1):
        alone = options(tmp_path / "alone", "lora", seed=seed)
        evaluation.evaluate(alone, quiet())
        ours, theirs = (
            evaluation.plan_evaluation(replace(plan, seed=seed)).folder
            for plan in (request, alone)
        )
        assert str(ours) in [run["run"] for run in report["runs"]]
        name = "cases.jsonl"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_one_report_has_the_mean_and_the_spread_of_all_runs(tmp_path):
    report = repeated.evaluate_repeatedly(options(tmp_path), TWICE, quiet())
    runs = []
    for run in report["runs"]:
        done = json.loads(Path(run["run"], "report.json").read_text())
        runs.append({**done, **run})
    assert [run["data"].get("order", 0) for run in runs] == [0, 0, 1, 1]
    for place, milestone in enumerate(report["milestones"]):
        in_runs = [run["milestones"][place] for run in runs]
        assert milestone["cases"] == sum(run["cases"] for run in in_runs)
        for protocol, columns in milestone["scores"].items():
            for column, score in columns.items():
                means = [run["scores"][protocol][column]["mean"] for run in in_runs]
                assert score["over_runs"]["means"] == means
                assert score["over_runs"]["sd"] == statistics.stdev(means)
                assert score["mean"] == pytest.approx(statistics.fmean(means))
    seconds = sum(run["cost"]["asked"]["questions"] for run in runs)
    assert report["cost"]["asked"]["questions"] == seconds
    assert report["cost"]["edits"] == 4 * 4
    asked = []
    for run in (runs[0], runs[2]):
        lines = Path(run["run"], "cases.jsonl").read_text().splitlines()
        asked.append([json.loads(line)["case"] for line in lines])
    assert sorted(set(asked[0])) == sorted(set(asked[1]))
    assert asked[0] != asked[1]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "edits",
    [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))],
)
def test_killed_and_continued_equals_uninterrupted(tmp_path, monkeypatch, edits):
    whole = repeated.evaluate_repeatedly(
        options(tmp_path / "whole"), IN_TWO_ORDERS, quiet()
    )
    request, made = options(tmp_path / "killed"), []
    real = evaluation.runtime.synchronize

    def killed(device):
        made.append(device)
        if len(made) == 2 * edits:
            raise Killed
        real(device)

    with monkeypatch.context() as patch:
        patch.setattr("mmedit_cli.runtime.synchronize", killed)
        with pytest.raises(Killed):
            repeated.evaluate_repeatedly(request, IN_TWO_ORDERS, quiet())
    plan = repeated.plan_repeated(request, IN_TWO_ORDERS)
    finished = [
        run.folder for run in plan.runs if (run.folder / "report.json").exists()
    ]
    assert len(finished) == (edits - 1) // 4
    assert not plan.folder.exists()
    resumed = repeated.evaluate_repeatedly(request, IN_TWO_ORDERS, quiet())
    assert comparable(resumed, tmp_path / "killed") == comparable(
        whole, tmp_path / "whole"
    )
    assert repeated.evaluate_repeatedly(request, IN_TWO_ORDERS, quiet()) == resumed


def test_a_run_that_was_made_before_is_only_read(tmp_path, monkeypatch):
    request = options(tmp_path)
    evaluation.evaluate(request, quiet())
    loaded = []
    real = evaluation.load_model
    monkeypatch.setattr(
        evaluation, "load_model", lambda *a: loaded.append(a) or real(*a)
    )
    path = evaluation.plan_evaluation(request).folder / "report.json"
    time = path.stat().st_mtime_ns
    repeated.evaluate_repeatedly(request, TWICE, quiet())
    assert len(loaded) == 1, "three runs were left, on one model"
    assert path.stat().st_mtime_ns == time
    repeated.evaluate_repeatedly(request, Repetitions((1, 0), orders=2), quiet())
    assert len(loaded) == 1, "the same runs in another report"


def test_lines_that_are_gone_are_not_left_out_in_silence(tmp_path):
    request = options(tmp_path)
    plan = repeated.plan_repeated(request, IN_TWO_ORDERS)
    repeated.evaluate_repeatedly(request, IN_TWO_ORDERS, quiet())
    (plan.folder / "report.json").unlink()
    path = plan.runs[1].folder / "cases.jsonl"
    path.write_bytes(path.read_bytes().partition(b"\n")[2])
    with pytest.raises(RunError, match="4 of 5 lines"):
        repeated.evaluate_repeatedly(request, IN_TWO_ORDERS, quiet())


@pytest.mark.parametrize(
    ("seeds", "orders", "message"),
    [
        ((0, 0), 1, "--seeds 0,0: 0 stands there twice"),
        ((0, -1), 1, "-1 is below 0"),
        ((), 1, "no seed"),
        ((0,), 0, "--orders 0: must be at least 1"),
    ],
)
def test_repetitions_that_make_no_sense(seeds, orders, message):
    with pytest.raises(UserError, match=message):
        Repetitions(seeds, orders)


def test_cases_that_build_on_each_other_have_one_order(tmp_path, monkeypatch):
    chained = replace(options(tmp_path), data="vlkeb:onehop-edits")
    with pytest.raises(UserError, match="build on the ones before"):
        repeated.plan_repeated(chained, TWICE)
    pooled = replace(options(tmp_path), data="vlkeb+vlkeb:onehop-edits")
    with pytest.raises(UserError, match="build on the ones before"):
        repeated.plan_repeated(pooled, TWICE)
    assert VLKEB.chained == ("onehop-edits",)


# -- what intervals are over ------------------------------------------------------------------------------------


def with_concepts(folder, *names: str):
    """Copy the small data set with a concept in each of its first cases."""
    copy = shutil.copytree(SHAPES, folder / "data")
    path = copy / "cases.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    for record, name in zip(records, names, strict=False):
        record["concept"] = name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(copy)


def test_intervals_are_over_concepts_where_the_data_name_them(tmp_path):
    data = with_concepts(tmp_path, "a", "a", "b", "c")
    request = replace(options(tmp_path), data=data)
    report = evaluation.evaluate(request, quiet())
    assert report["intervals"]["by"] == "concept"
    assert report["intervals"]["concepts"] == 3
    assert [m["concepts"] for m in report["milestones"]] == [1, 1, 2]
    by_case = evaluation.evaluate(replace(request, intervals_by="case"), quiet())
    assert "intervals" not in by_case
    ours, theirs = (
        r["milestones"][-1]["scores"]["ar"]["locality.text"] for r in (report, by_case)
    )
    assert (ours["mean"], ours["n"]) == (theirs["mean"], theirs["n"])
    assert ours["ci95"] != theirs["ci95"]
    # other concepts are another run
    (tmp_path / "other").mkdir()
    data = with_concepts(tmp_path / "other", "a", "b", "b", "c")
    folders = {
        evaluation.plan_evaluation(replace(request, data=d)).folder.name
        for d in (data, request.data)
    }
    assert len(folders) == 2


def test_data_without_concepts(tmp_path):
    request = options(tmp_path)
    assert "intervals" not in evaluation.plan_evaluation(request).config
    asked = replace(request, intervals_by="concept")
    with pytest.raises(DataError, match="4 of 4 cases name none"):
        evaluation.plan_evaluation(asked)
    some = replace(asked, data=with_concepts(tmp_path, "a", "a"))
    with pytest.raises(DataError, match="2 of 4 cases name none"):
        evaluation.plan_evaluation(some)
    with pytest.raises(UserError, match="must be concept or case"):
        evaluation.plan_evaluation(replace(request, intervals_by="picture"))
