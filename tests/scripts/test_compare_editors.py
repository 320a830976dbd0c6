"""The chart of the comparison shows what the tables say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from compare_editors import FIGURES, draw_chart, row

ROWS = {
    "mini-blip2": [
        {"editor": "ft", "edits": "1", "mean": "80.0"},
        {"editor": "ft", "edits": "1000", "mean": "20.0"},
        {"editor": "liveedit", "edits": "1000", "mean": "97.9"},
    ],
    "mini-llava": [{"editor": "ft", "edits": "1", "mean": "50.0"}],
}


@pytest.mark.parametrize(
    "name", ["chart.svg", pytest.param("chart.png", marks=pytest.mark.slow)]
)
def test_the_same_figures_give_the_same_file(tmp_path, name):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        draw_chart(ROWS, tmp_path / folder / name)
    first, second = (tmp_path / f / name for f in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    fewer = {"mini-llava": ROWS["mini-llava"]}
    draw_chart(fewer, second)
    assert first.read_bytes() != second.read_bytes()


def test_how_long_an_edit_took_is_not_known_of_what_was_edited_elsewhere():
    scores = {name: {"mean": 0.5} for names in FIGURES.values() for name in names}
    report = {
        "editor": "edited elsewhere",
        "hparams": {},
        "protocol": {"sequential": 3},
        "milestones": [
            {
                "edits": 3,
                "cases": 3,
                "short_group": False,
                "scores": {"tf_liveedit": scores, "ar": scores},
            }
        ],
        "cost": {"edits": 3},
    }
    cells = row(report)
    assert (cells["mean"], cells["s an edit"]) == ("50.0", "-")
    report["cost"]["seconds_per_edit"] = {"mean": 0.25}
    assert row(report)["s an edit"] == "0.250"


def test_matplotlib_is_imported_where_a_chart_is_drawn():
    code = (
        "import sys\nsys.path.insert(0, 'scripts')\nimport compare_editors\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
