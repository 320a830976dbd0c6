"""`mmedit report leaderboard`: only what may be compared is ranked together, and no rank is a matter of luck."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml

PROTOCOL = {"sequential": 10, "protocols": ["ar"], "batch_size": 32, "shard": 32}


def score(mean: float, half: float) -> dict:
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": 10}


@pytest.fixture
def write(tmp_path):
    """Write a finished run: write(editor, scope, half the interval)."""

    def run(editor, scope, half, *, data="0123", model="mini-blip2", **protocol):
        folder = tmp_path / "records" / f"{editor}-{data}-{model}-{len(protocol)}"
        folder.mkdir(parents=True)
        scores = {"reliability": score(0.5, 0.1), "scope": score(scope, half)}
        milestone = {"edits": 10, "short_group": False, "scores": {"ar": scores}}
        report = {
            "editor": editor,
            "model": {"name": model, "fingerprint": model},
            "data": {"name": "emojikb", "cases": 10, "fingerprint": data},
            "protocol": {**PROTOCOL, **protocol},
            "hparams": {"steps": 3},
            "versions": {"mmedit": "0.2.0"},
            "milestones": [milestone],
            "cost": {"seconds_per_edit": {"mean": 0.5}},
        }
        (folder / "report.json").write_text(json.dumps(report))
        said = {"config": {"scoring": 2}, "environment": {}}
        (folder / "run.yaml").write_text(yaml.safe_dump(said))

    return run


@pytest.fixture
def board(cli, tmp_path):
    """Print the leaderboard of what was written."""
    return lambda *words: cli("report", "leaderboard", tmp_path / "records", *words)


def test_runs_that_cannot_be_told_apart_share_a_rank(write, board):
    for editor, scope, half in (("a", 0.5, 0.1), ("b", 0.9, 0.1), ("c", 0.75, 0.1)):
        write(editor, scope, half)
    write("d", 0.2, 0.05)
    code, text, _ = board("--json")
    (found,) = json.loads(text)
    ranks = [(run["rank"], run["editor"]) for run in found["runs"]]
    assert (code, ranks) == (0, [(1, "b"), (1, "c"), (3, "a"), (4, "d")])
    assert "90.0 ±10.0" in board()[1]


def test_other_models_data_and_protocols_have_tables_of_their_own(write, board):
    write("a", 0.5, 0.1)
    write("a", 0.5, 0.1, data="4567")
    write("a", 0.5, 0.1, model="mini-llava")
    write("a", 0.5, 0.1, edit_batch=2)
    write("b", 0.5, 0.1, batch_size=1)
    boards = json.loads(board("--json")[1])
    assert sorted(len(found["runs"]) for found in boards) == [1, 1, 1, 2]


def test_forms(write, board):
    write("a", 0.5, 0.1)
    write("b", 0.9, 0.1, data="4567")
    rows = list(csv.DictReader(io.StringIO(board("--format", "csv")[1])))
    assert [row["Scope"] for row in rows] == ["50.0 ±10.0", "90.0 ±10.0"]
    assert "10 cases of emojikb (0123)" in rows[0]["board"]
    assert board("--format", "markdown")[1].startswith("| board | rank |")
    records = json.loads(board("--format", "every-eval-ever")[1])
    results = records[0]["evaluation_results"]
    assert [found["evaluation_name"] for found in results] == [
        "ar reliability",
        "ar scope",
    ]
    assert results[1]["score_details"]["score"] == 0.5
    uncertainty = results[1]["score_details"]["uncertainty"]
    assert uncertainty["confidence_interval"]["lower"] == 0.4
    required = {
        "schema_version",
        "evaluation_id",
        "retrieved_timestamp",
        "source_metadata",
        "model_info",
        "eval_library",
        "evaluation_results",
    }
    assert set(records[0]) == required


def test_nothing_to_rank_is_said(write, board, tmp_path):
    (tmp_path / "records").mkdir()
    assert board()[0] == 2
    write("a", 0.5, 0.1)
    code, _, err = board("--by", "locality.image")
    assert (code, "no finished evaluation with a score locality.image" in err) == (
        2,
        True,
    )
