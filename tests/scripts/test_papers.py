"""The tables of the papers: rules decide what they say they decide, and the page of claims says what the files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "scripts" / "papers"))
import claims as claims_page
from figures import ALL, MEAN, Figure, Table, measured, published, read_paper, rows_of
from figures import PAPERS as NAMES
from verdicts import NOT_REPRODUCED, OPEN, REPRODUCED, judge, rivals_of, together

from mmedit_cli.registry import editors, image_editors, personalizers

SHIPPED = [read_paper(name) for name in NAMES]


def _table(**values):
    """A table after 10 edits: name=(value, half of its interval), or after another number with a tuple as key."""
    table = Table("mini, data", "mini")
    for row, (value, half) in values.items():
        row, _, edits = row.partition("_")
        figure = Figure(value, value - half, value + half)
        table.figures[row, edits or "10", "Rel"] = figure
    return table


def _judge(table, rivals=("B", "C"), **rule):
    claim = {"rule": {"of": "A", "score": "Rel", "after": "10", **rule}}
    return judge(claim, table, rivals).word


@pytest.mark.parametrize(
    ("own", "other", "by", "word"),
    [
        ((90, 1), (80, 1), 0, REPRODUCED),
        ((90, 1), (80, 1), 8, OPEN),  # 8 to 12 above
        ((90, 1), (80, 1), 7.9, REPRODUCED),
        ((90, 1), (80, 1), 12, NOT_REPRODUCED),
        ((90, 6), (80, 6), 0, OPEN),
        ((80, 1), (90, 1), 0, NOT_REPRODUCED),
        ((80, 1), (90, 1), -13, REPRODUCED),
        ((100, 0), (100, 0), 0, NOT_REPRODUCED),  # as good is not above
    ],
)
def test_above(own, other, by, word):
    table = _table(A=own, B=other)
    assert _judge(table, above=["B"], by=by) == word
    assert _judge(table, rivals=["B"], above="others", by=by) == word


def test_below_is_above_the_other_way_round():
    assert _judge(_table(A=(1, 0.1), B=(2, 0.1)), below=["B"]) == REPRODUCED
    assert _judge(_table(A=(2, 0.1), B=(1, 0.1)), below=["B"]) == NOT_REPRODUCED
    assert _judge(_table(A=(2, 1), B=(1, 1)), below=["B"]) == OPEN


def test_one_that_fails_decides_and_one_that_is_missing_leaves_it_open():
    ours = _table(A=(90, 1), B=(80, 1))
    assert _judge(ours, above="others") == OPEN
    ours = _table(A=(90, 1), B=(95, 1))
    assert _judge(ours, above="others") == NOT_REPRODUCED
    ours = _table(A=(90, 1), B=(80, 1), C=(89, 1))
    assert _judge(ours, above="others") == OPEN
    assert _judge(_table(B=(80, 1)), above=["B"]) == OPEN
    assert _judge(ours, rivals=(), above="others") == OPEN


@pytest.mark.parametrize(
    ("own", "word"),
    [((50, 0), REPRODUCED), ((49, 0.5), NOT_REPRODUCED), ((50, 1), OPEN)],
)
def test_thresholds(own, word):
    assert _judge(_table(A=own), at_least=50) == word
    mirrored = (100 - own[0], own[1])
    assert _judge(_table(A=mirrored), at_most=50) == word


def test_what_is_lost_since_fewer_edits():
    ours = _table(A_1=(90, 1), A_10=(80, 1))
    for limit, at_most, at_least in (
        (12, REPRODUCED, OPEN),
        (8, OPEN, REPRODUCED),
        (10, OPEN, OPEN),
        (13, REPRODUCED, NOT_REPRODUCED),
        (7, NOT_REPRODUCED, REPRODUCED),
    ):
        assert _judge(ours, loses_at_most=limit, since="1") == at_most
        assert _judge(ours, loses_at_least=limit, since="1") == at_least
    assert _judge(_table(A_10=(80, 1)), loses_at_most=5, since="1") == OPEN


def test_a_claim_about_another_model_and_one_without_a_rule_are_open():
    rule = {"of": "A", "score": "Rel", "after": "10", "at_least": 0}
    claim = {"rule": rule, "on_models": ["large"]}
    assert judge(claim, _table(A=(1, 0)), ()).word == OPEN
    assert judge({"why": "a curve"}, _table(A=(1, 0)), ()).word == OPEN
    with pytest.raises(ValueError, match="a rule has one of"):
        _judge(_table(A=(1, 0)), at_least=1, at_most=2)


def test_tables_have_to_agree():
    yes, no, unknown = (
        judge(
            {"rule": {"of": "A", "score": "Rel", "after": "10", "at_least": limit}},
            _table(A=(50, 5)),
            (),
        )
        for limit in (10, 90, 50)
    )
    assert together([yes, yes]) == REPRODUCED
    assert together([yes, unknown]) == OPEN
    assert together([yes, unknown, no]) == NOT_REPRODUCED
    assert together([]) == OPEN


# -- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", SHIPPED, ids=NAMES)
def test_every_claim_holds_in_what_was_published(paper):
    tables = published(paper)
    for claim in paper["claims"]:
        rivals = rivals_of(claim, list(paper["rows"]), tables)
        words = {judge(claim, table, rivals).word for table in tables}
        assert NOT_REPRODUCED not in words, claim["says"]
        if not claim.get("published"):
            assert REPRODUCED in words, claim["says"]


@pytest.mark.parametrize("paper", SHIPPED, ids=NAMES)
def test_files_name_rows_editors_and_scores_that_there_are(paper):
    registry = {
        "knowledge": editors,
        "drawing": personalizers,
        "pictures": image_editors,
    }[paper["kind"]]
    rows = rows_of(paper)
    for editor in rows.values():
        assert editor is None or editor.partition("+")[0] in registry.names()
    scores = {*paper["scores"], *paper.get("reads", ()), MEAN}
    for table in published(paper):
        for row, edits, score in table.figures:
            assert row in rows
            assert edits in {*paper["edits"], ALL}
            assert score in scores
    for claim in paper["claims"]:
        assert ("rule" in claim) != ("why" in claim)
        rule = claim.get("rule", {"of": next(iter(rows)), "score": MEAN})
        named = rule.get("above", rule.get("below", []))
        assert {rule["of"], *([] if named == "others" else named)} <= set(rows)
        assert rule["score"] in scores
    assert (ROOT / paper["script"]).stat().st_mode & 0o100


def test_published_averages_are_means_of_the_columns():
    tables = {table.name: table for table in published(read_paper("liveedit"))}
    llava = tables["LLaVA-1.5-7B, E-VQA"].figures
    # as printed in the column "Average"
    assert llava["LiveEdit", "1000", MEAN].value == pytest.approx(92.76, abs=0.01)
    assert llava["MEND", "10", MEAN].value == pytest.approx(2.80, abs=0.01)
    blip2 = tables["BLIP2-OPT-2.7B, VLKEB"].figures
    assert blip2["SERAC", "1000", MEAN].value == pytest.approx(45.10, abs=0.01)


def test_the_page_has_every_claim():
    page = (ROOT / "docs" / "claims.md").read_text("utf-8")
    assert page.startswith(claims_page._HEAD)
    for paper in SHIPPED:
        assert f"## {paper['title']}" in page
        for claim in paper["claims"]:
            assert claim["says"] in page


# -- reports --------------------------------------------------------------------------------------------------------


def _report(folder, editor, edits, value, cases=10, **hparams):
    score = {"mean": value, "ci95": [value - 0.01, value + 0.01]}
    columns = ("reliability", "generality.text", "generality.image")
    columns += ("locality.text", "locality.near", "locality.far")
    report = {
        "editor": editor,
        "hparams": hparams,
        "model": {"name": "mini-blip2"},
        "data": {"name": "emojikb", "cases": cases},
        "protocol": {"sequential": edits},
        "milestones": [
            {
                "edits": edits,
                "short_group": False,
                "scores": {"tf_liveedit": dict.fromkeys(columns, score)},
            }
        ],
    }
    home = folder / "eval" / editor / f"{edits}-{cases}-{len(hparams)}"
    home.mkdir(parents=True)
    (home / "report.json").write_text(json.dumps(report))


def test_figures_come_from_the_report_with_most_cases(tmp_path):
    _report(tmp_path, "liveedit", 10, 0.9, cases=100)
    _report(tmp_path, "liveedit", 10, 0.2, cases=5)
    _report(tmp_path, "liveedit", 1000, 0.8)
    _report(tmp_path, "ft", 10, 0.5, target="connector")
    _report(tmp_path, "wise", 10, 0.5)  # no row of the paper
    (table,) = measured(read_paper("liveedit"), tmp_path)
    assert table.name == "mini-blip2, emojikb"
    found = table.figures
    assert {row for row, _, _ in found} == {"LiveEdit", "FT-M"}
    assert found["LiveEdit", "10", "M-Loc"].value == pytest.approx(90)
    assert found["LiveEdit", "10", MEAN].low == pytest.approx(89)
    assert found["LiveEdit", ALL, "Rel"].value == pytest.approx(80)
    assert found["FT-M", ALL, "Rel"].value == pytest.approx(50)


def test_the_page_tells_what_reports_say(tmp_path):
    _report(tmp_path, "liveedit", 1000, 0.999)
    _report(tmp_path, "t-patcher", 1000, 0.6)
    text = claims_page.section("liveedit", tmp_path)
    (line,) = [line for line in text.splitlines() if "T-Patcher is of no use" in line]
    assert "mini-blip2, emojikb: 60.0 | not reproduced" in line
    (line,) = [line for line in text.splitlines() if "M-Loc at least 95" in line]
    assert "mini-blip2, emojikb: 99.9 | reproduced" in line
    (line,) = [line for line in text.splitlines() if "MEND loses 25" in line]
    assert "not measured | cannot be told" in line


@pytest.mark.slow
def test_a_script_makes_its_table(tmp_path):
    options = {
        "PYTHON": sys.executable,
        "MODELS": "tiny-blip2",
        "DATA": str(ROOT / "tests" / "data" / "shapes"),
        "EDITORS": "ft serac ft+target=connector",
        "COUNTS": "2",
        "CASES": "2",
        "TRAIN": "0",
        "RECORDS": str(tmp_path),
    }
    script = str(ROOT / "scripts" / "papers" / "liveedit_table.sh")
    done = subprocess.run(
        ["bash", script],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "serac: left out" in done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()]
    ours = [row[:2] for row in rows if row[2:3] == ["here"]]
    assert ours == [["| FT-L", "2"], ["| FT-M", "2"]]
    assert any(row[:2] == ["| LTE", "1000"] for row in rows)
    assert "| cannot be told |" in done.stdout
