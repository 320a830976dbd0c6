"""Where to edit: which layers are tried, what is chosen, and the file that comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SHAPES

from mmedit_cli import registry
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.workflow import locating
from mmedit_cli.layers import LayerField, layer_field
from mmedit_cli.reports.locating import draw_candidates

SWEEP = ("locate", "grace", "--model", "tiny-blip2", "--data", SHAPES, "--limit", 2)
SWEEP += ("--set", "steps=2", "--layers", "1,3")


@pytest.mark.parametrize(
    ("field", "present", "values"),
    [
        (LayerField("layer"), 2, [0, 1, 2, 3]),
        (LayerField("layers", counts=True), 2, [1, 2, 3, 4]),
        (LayerField("layers", several=True), (3,), [(0,), (1,), (2,), (3,)]),
        (LayerField("layers", several=True), (1, 2), [(0, 1), (1, 2), (2, 3)]),
        (LayerField("layers", several=True), (1, 3), [(0, 1), (1, 2), (2, 3), (1, 3)]),
    ],
)
def test_every_layer_is_a_choice_and_so_is_the_present_one(field, present, values):
    assert field.choices(present, 4) == values


def test_layers_from_the_end_are_counted_from_zero():
    assert LayerField("layer").from_zero(-1, 6) == 5
    assert LayerField("layers", several=True).from_zero((-1, 2), 6) == (2, 5)
    assert LayerField("layers", counts=True).from_zero(3, 6) == 3


@pytest.mark.parametrize("name", registry.editors.names())
def test_each_editor_is_swept_or_refused_in_a_line(cli, name):
    editor = registry.editors.get(name)
    if not editor.trains and layer_field(editor.Hparams):
        return
    code, _, err = cli("locate", name, "--model", "tiny-blip2", "--data", SHAPES)
    assert code == 2
    assert err.count("error: ") == 1
    assert f"{name}" in err
    assert "editors whose layers can be swept: alphaedit, ft, grace" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "x"), "--layers x: not whole numbers or ranges"),
        (("--layers", "9"), "--layers 9: grace on tiny-blip2 has none of these"),
        (("--limit", "0"), "--limit 0: must be at least 1"),
        (("--plot", "curve.txt"), "curve.txt: a chart must end in .png or .svg"),
        (("--protocol", "tf"), "tf: unknown"),
        (("-o", SHAPES / "cases.jsonl"), "there already"),
    ],
)
def test_wrong_input_is_refused(cli, tmp_path, words, message):
    code, _, err = cli(*SWEEP, *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "records").exists()


def test_fine_tuning_of_the_connector_names_no_layer(cli):
    words = ("locate", "ft", "--model", "tiny-blip2", "--data", SHAPES)
    code, _, err = cli(*words, "--set", "target=connector")
    assert code == 2
    assert "target=connector: this edits no decoder layer" in err


def test_a_sweep_writes_a_file_to_edit_with_and_goes_on_where_it_stopped(cli, tmp_path):
    file = tmp_path / "grace.yaml"
    code, out, err = cli(*SWEEP, "-o", file, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [row["value"] for row in report["candidates"]] == [1, 3]
    best = max(report["candidates"], key=lambda row: (row["score"], row["value"]))
    assert report["chosen"] == best["value"]
    hparams = load_hparams(file, registry.editors.get("grace").Hparams)
    assert (hparams.layer, hparams.steps) == (report["chosen"], 2)
    runs = [Path(row["run"]) / "report.json" for row in report["candidates"]]
    before = [run.stat().st_mtime_ns for run in runs]
    runs[1].unlink()
    (Path(report["run"]) / "report.json").unlink()
    code, out, err = cli(*SWEEP, "--json")
    assert code == 0, err
    again = json.loads(out)
    for row in (*report["candidates"], *again["candidates"]):
        row.pop("seconds_per_edit")
    assert again["candidates"] == report["candidates"]
    assert runs[0].stat().st_mtime_ns == before[0]
    assert runs[1].stat().st_mtime_ns > before[1]
    code, out, _ = cli("report", report["run"])
    assert code == 0
    assert "the harmonic mean of Rel, Gen and Loc" in out


def report_of(**means: float) -> dict:
    columns = {name.replace("_", ".", 1): {"mean": m} for name, m in means.items()}
    columns["generality.text known"] = {"mean": 0.0}
    columns["portability.1-hop"] = {"mean": 0.0}
    cost = {"seconds_per_edit": {"mean": 0.5}}
    return {"milestones": [{"scores": {"tf_em": columns}}], "cost": cost}


def test_the_score_is_the_harmonic_mean_of_three_parts():
    means = {"reliability": 1.0, "generality_text": 0.4, "generality_image": 0.6}
    found = locating._scores(report_of(**means, locality_near=0.25), "tf_em")
    assert found["generality"] == pytest.approx(0.5)
    assert found["score"] == pytest.approx(3 / (1 + 2 + 4))
    assert locating._scores(report_of(**means), "tf_em")["score"] == pytest.approx(
        2 / 3
    )


def best(present: int, *scores: float | None) -> int:
    candidates = [SimpleNamespace(value=value) for value in range(len(scores))]
    rows = [{} if score is None else {"score": score} for score in scores]
    plan = SimpleNamespace(
        candidates=candidates, present=present, swept=LayerField("layer")
    )
    return locating._best(plan, rows)


def test_of_equal_layers_the_present_one_is_chosen_else_the_highest():
    assert best(0, 0.5, 0.9, 0.9, 0.7) == 2
    assert best(1, 0.5, 0.9, 0.9, 0.7) == 1
    assert best(3, 0.5, None, 0.4, None) == 0


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"value": [0, 1], "score": 0.5, "reliability": 0.6}, {"value": [1, 2]}]
    report = {"candidates": rows, "chosen": [0, 1], "swept": "layers"}
    report |= {"editor": "ft", "model": {"name": "a model"}}
    draw_candidates(report, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert drawn.count("<svg") == 1
