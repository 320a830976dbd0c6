"""`mmedit eval` for image editors: scores against the goal, beside the floor, and a run that was killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import page_data
from PIL import Image

from mmedit_cli.picture_editing.data.base import EditPair
from mmedit_cli.picture_editing.workflow.evaluation import (
    PictureScorers,
    read_settings,
    score,
)

WORDS = (
    "eval",
    "instruct_pix2pix",
    "--model",
    "tiny-ip2p",
    "--limit",
    "5",
    "--set",
    "steps=1",
    "--device",
    "cpu",
)


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def pair() -> EditPair:
    return EditPair(
        "a", "make it white", lambda: plain("black"), lambda: plain("white"), ""
    )


def test_the_goal_scores_best_and_the_source_is_the_floor():
    best = score(
        plain("white"), plain("black"), plain("white"), pair(), PictureScorers()
    )
    floor = score(
        plain("black"), plain("black"), plain("white"), pair(), PictureScorers()
    )
    assert (best["L1"], best["L2"], best["SSIM"]) == (0, 0, pytest.approx(1))
    assert (floor["L1"], floor["L2"]) == (1, 1)
    assert "kept" not in best  # nothing should stay
    assert score(plain("white"), plain("red"), plain("red"), pair(), PictureScorers())[
        "kept"
    ] == pytest.approx(2 / 3)


def test_a_report(cli, tmp_path):
    code, out, err = cli(*WORDS, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["scores"]["L1"]["n"] == 5
    assert (
        report["scores"]["L1"]["mean"] > report["scores"]["L1"]["unchanged"]
    )  # random weights do harm
    assert sum(scores["L1"]["n"] for scores in report["by_kind"].values()) == 5
    folder = tmp_path / "records"
    pictures = list(folder.rglob("pictures/*.png"))
    assert len(pictures) == 5
    assert report["encoders"]["judge"] == "mini-blip2"
    assert (
        report["scores"]["reached"]["unchanged"] == 0
    )  # who gives the picture back has not done what was asked
    page = Path(report["gallery"])
    shown = page_data(page)
    assert len(shown["pictures"]) == 15
    assert all((page.parent / link).is_file() for link in shown["pictures"])
    assert (page.parent / "sheet.png").is_file()
    code, out, err = cli(*WORDS)
    assert "already done" in err
    assert "picture as it is" in out
    assert "instruct-pix2pix" in cli("report")[1]
    assert "picture as it is" in cli("report", report["run"])[1]
    code, out, err = cli("report", "view", report["run"])
    assert code == 0, err
    viewed = page_data(Path(out.strip()))
    assert len(viewed["pictures"]) == 15
    assert all(link.startswith("data:image/webp") for link in viewed["pictures"])
    words = " ".join(note for card in viewed["cards"] for note in card["notes"])
    assert "L1" in words
    assert "reached" in words


def test_a_killed_run_ends_with_the_same_scores(cli, tmp_path, monkeypatch):
    first = json.loads(cli(*WORDS, "--json")[1])
    (run,) = {path.parent for path in (tmp_path / "records").rglob("report.json")}
    (run / "report.json").unlink()
    lines = (run / "cases.jsonl").read_text().splitlines(keepends=True)
    (run / "cases.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    again = json.loads(cli(*WORDS, "--batch-size", "1", "--json")[1])
    for name, found in first["scores"].items():
        assert again["scores"][name]["mean"] == pytest.approx(found["mean"], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "stepz=3"), "did you mean steps"),
        (("--set", "steps=some"), "expected a whole number"),
        (("--set", "clip=nowhere/none"), "cannot be loaded"),
        (("--set", "lpips=nowhere.safetensors"), "no such file"),
        (("--set", "judge=nobody"), "neither a known name, nor a folder, nor a hub id"),
        (("--sequential", "3"), "means nothing to an image editor"),
        (("--data", "emojikb-edits:evil"), "no such split"),
    ],
)
def test_wrong_input_is_one_line(cli, words, said):
    code, _, err = cli(*WORDS, *words)
    assert code == 2
    assert said in err


def test_settings():
    settings, names = read_settings(["steps=3", "image_guidance=1.2", "clip=x/y"])
    assert (settings.steps, settings.image_guidance, settings.text_guidance) == (
        3,
        1.2,
        None,
    )
    assert names == {"clip": "x/y", "dino": "", "lpips": "", "judge": ""}
