"""`mmedit eval` for concept editors: on a tiny model, killed and continued, and what it says."""

from __future__ import annotations

import json

import pytest
from conftest import page_data

from mmedit_cli.drawing.data import opening_facts
from mmedit_cli.drawing.data.facts import DrawnFact, DrawnProbe, FactSet
from mmedit_cli.drawing.methods.shared.concept_editor import ConceptEditor
from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion
from mmedit_cli.drawing.workflow import fact_plan
from mmedit_cli.types import ConceptChange

FEW = (
    *("--model", "tiny-sd", "--device", "cpu"),
    *("--set", "eval.steps=1", "--set", "eval.seeds=2", "--set", "eval.batch_size=3"),
    *("--set", "eval.encoder=tiny-blip2"),
)


def fact(name, kind, source, *targets):
    probes = (
        DrawnProbe("efficacy", source, "What is this?", "cat", needs="a cat"),
        DrawnProbe("generality", f"a red {source[2:]}", "What is this?", "cat"),
        DrawnProbe("specificity", "a boot", "What is this?", "boot", instead="cat"),
        DrawnProbe("subject", source, "What is this?", "dog", gone=True),
    )
    return DrawnFact(name, kind, ConceptChange(source, targets, ("a boot",)), probes)


FACTS = FactSet(
    "few-facts",
    (
        fact("one", "drawn as", "a dog", "a cat"),
        fact("two", "erased", "a toy"),
        fact("three", "drawn as", "a teapot", "a cat"),
        fact("four", "drawn as", "a beach", "a cat"),
    ),
    guidance=2.0,
)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(
        fact_plan,
        "open_facts",
        lambda data, *, root, model, limit: FACTS.first(limit),
    )


@pytest.fixture
def evaluate(cli):
    return lambda editor, *more: cli("eval", editor, *FEW, *more)


def report_of(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_every_fact_is_edited_alone_and_with_its_kind(evaluate, cli, tmp_path):
    report = report_of(evaluate("uce", "--json"))
    assert report["kinds"] == {"drawn as": 3, "erased": 1}
    assert set(report["ways"]) == {"before", "alone", "together"}
    found = report["ways"]["alone"]["drawn as"]
    assert found["efficacy"]["n"] == found["specificity"]["n"] == 3 * 2
    assert found["specificity margin"]["n"] == 6
    assert "efficacy margin" not in found
    # of each fact a prompt of two probes is drawn once
    assert report["collapsed"]["alone"]["n"] == 4 * 3 * 2
    assert report["faint"]["before"]["erased"]["n"] == 3 * 2
    assert [line["undone"] for line in report["undo"]] == [2, 1]
    for undone in report["undo"]:
        assert undone["undo_exact"]
        assert undone["redo_exact"]
    assert set(report["cost"]["seconds_per_edit"]) == {"drawn as", "erased"}
    run = tmp_path / report["run"]
    assert len(list((run / "pictures" / "together").rglob("*.png"))) == 4 * 3 * 2
    before = (run / "pictures" / "before" / "all" / "000-0.png").read_bytes()
    alone = (run / "pictures" / "alone" / "one" / "000-0.png").read_bytes()
    assert alone != before
    code, out, err = evaluate("uce")
    assert (code, "already done" in err) == (0, True)
    assert "undo of drawn as 2 of 3: exact; redo: exact" in out
    assert "4 facts" in cli("report")[1]
    assert "undo of erased 1 of 1" in cli("report", run)[1]
    shown = page_data(run / "gallery" / "index.html")
    titles = [card["title"] for card in shown["cards"]]
    assert {"a dog: as a cat", "a toy: erased"} <= set(titles)
    assert [name for name, _ in shown["cards"][0]["groups"]] == list(fact_plan.WAYS)
    assert (run / "gallery" / "drawn-as.png").is_file()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_report(evaluate, tmp_path, monkeypatch):
    whole = report_of(evaluate("time", "--json"))
    drawn = StableDiffusion.generate
    calls = []

    def stops(self, *words, **more):
        calls.append(1)
        if len(calls) in (5, 14, 22):
            raise KeyboardInterrupt
        return drawn(self, *words, **more)

    monkeypatch.setattr(StableDiffusion, "generate", stops)
    again = ("--json", "--records", tmp_path / "again")
    assert [evaluate("time", *again)[0] for _ in range(3)] == [130] * 3
    continued = report_of(evaluate("time", *again))
    for report in (whole, continued):
        for key in ("cost", "run", "gallery", "environment"):
            report.pop(key)
    assert continued == whole


def test_an_undo_that_is_not_exact_is_reported(evaluate, monkeypatch):
    monkeypatch.setattr(ConceptEditor, "undo", lambda self, ids: None)
    monkeypatch.setattr(ConceptEditor, "redo", lambda self, ids: None)
    few = ("--limit", "1", "--set", "eval.seeds=1")
    report = report_of(evaluate("uce", "--json", *few))
    assert [line["undo_exact"] for line in report["undo"]] == [False]
    assert "NOT exact" in evaluate("uce", *few)[1]


def test_a_plan_costs_nothing(evaluate, tmp_path):
    plan = report_of(evaluate("speed", "--dry-run", "--json", "--limit", "2"))
    # 7 prompts of the untouched model, and of each of two facts 3, twice
    assert plan["pictures"] == 2 * (6 + 2 * 2 * 3)
    assert plan["data"]["cases"] == 2
    assert plan["settings"]["guidance"] == 2
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "eval.dino=some"), "unknown"),
        (("--set", "eval.seeds=0"), "eval.seeds=0: must be above 0"),
        (("--set", "lamb=3"), "did you mean lam"),
        (("--set", "eval.encoder=none"), "nothing looks at the pictures"),
        (("--sequential", "3"), "means nothing to a concept editor"),
        (("--model", "tiny-blip2"), "draws nothing"),
    ],
)
def test_wrong_input_is_one_line(evaluate, tmp_path, words, said):
    code, _, err = evaluate("uce", *words)
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "records").exists()


def test_published_tables_need_a_model_that_compares(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(fact_plan, "open_facts", opening_facts.open_facts)
    row = {"old": "a dog", "new": "a red dog"}
    for i in range(1, 6):
        row |= dict.fromkeys((f"positive{i}", f"negative{i}"), "a cat")
        row |= dict.fromkeys((f"gt{i}", f"gn{i}"), "a red cat")
    table = tmp_path / "timed.csv"
    table.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    words = ("eval", "uce", "--model", "tiny-sd", "--data", "timed", "--root", table)
    code, _, err = cli(*words)
    assert (code, "nothing looks at the pictures" in err) == (2, True), err
    code, _, err = cli(*words, "--set", "eval.clip=nowhere/none", "--device", "cpu")
    assert (code, "cannot be loaded" in err) == (2, True), err


def test_the_doctor_counts_facts(cli):
    code, text, _ = cli("doctor", "emojikb-facts", "--json")
    found = {line["check"]: line["found"] for line in json.loads(text)}
    assert code == 0
    assert (found["facts drawn as"], found["facts style"]) == ("50", "2")


@pytest.mark.slow
def test_the_data_that_come_along(cli, monkeypatch):
    monkeypatch.setattr(fact_plan, "open_facts", opening_facts.open_facts)
    words = ("--limit", "3", "--set", "eval.steps=4", "--device", "cpu", "--json")
    report = report_of(cli("eval", "uce", "--model", "mini-sd", *words))
    assert report["judge"] == "mini-blip2"
    assert report["kinds"] == {"drawn as": 1, "background": 1, "erased": 1}
    assert report["settings"]["guidance"] == 2
    assert report["ways"]["alone"]["drawn as"]["efficacy margin"]["n"] == 1
    found = report["ways"]["alone"]["drawn as"]["efficacy margin"]["mean"]
    assert found > report["ways"]["before"]["drawn as"]["efficacy margin"]["mean"]
