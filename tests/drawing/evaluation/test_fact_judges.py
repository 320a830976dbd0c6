"""Judges of drawn facts, and what becomes of their judgements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmedit_cli.drawing.data.emojikb_facts import WHO
from mmedit_cli.drawing.data.facts import BACKGROUND_QUESTION, NAMING, DrawnProbe
from mmedit_cli.drawing.evaluation.facts import (
    AnsweringJudge,
    ComparingJudge,
    Judgement,
    collapsed,
    collapses,
    contrast,
    faint,
    summary,
)
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.registry import emojikb_dir

NAMED = {"red": (1.0, 0, 0), "blue": (0, 0, 1.0)}


class FakeClip:
    """Encodes a picture by its mean colour, and texts by the colour that they name."""

    name = "colours"

    def pictures(self, pictures):
        means = [np.asarray(picture).mean((0, 1)) for picture in pictures]
        return torch.tensor(np.stack(means)).float()

    def texts(self, texts):
        return torch.tensor([NAMED[text] for text in texts])


@pytest.mark.parametrize("gone", [False, True])
def test_the_text_that_fits_better_is_shown(tmp_path, gone):
    files = []
    for name, colour in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
        files.append(tmp_path / f"{name}.png")
        Image.new("RGB", (8, 8), colour).save(files[-1])
    probe = DrawnProbe("efficacy", "a wall", gone=gone, texts=("red", "blue"))
    found = ComparingJudge(FakeClip()).judge(files, [probe, probe])
    assert [one.right(probe) for one in found] == [True, False]
    assert [one.shows for one in found] == [not gone, gone]
    assert found[0].margin == pytest.approx(-found[1].margin)
    assert found[0].margin > 0


@pytest.mark.slow
def test_a_model_is_asked_about_things_colours_and_artists(tmp_path):
    lion = tmp_path / "lion.png"
    drawn = Picture(emojikb_dir() / "noto" / "1f981.png", "#b3d1ff")
    load_picture(drawn).resize((64, 64)).save(lion)
    probes = [
        DrawnProbe("efficacy", "", NAMING, "lion", instead="rose"),
        DrawnProbe("efficacy", "", NAMING, "rose", instead="lion"),
        DrawnProbe("efficacy", "", NAMING, "lion", gone=True),
        DrawnProbe("efficacy", "", WHO, "Noto"),
        DrawnProbe("efficacy", "", BACKGROUND_QUESTION, "blue"),
    ]
    judge = AnsweringJudge(load_backbone("mini-blip2", device="cpu"))
    found = judge.judge([lion] * len(probes), probes)
    assert [one.shows for one in found] == [True, False, True, True, True]
    right = [one.right(probe) for one, probe in zip(found, probes, strict=True)]
    assert right == [True, False, False, True, True]
    assert found[0].margin > 1
    assert found[1].margin == pytest.approx(-found[0].margin, abs=1e-4)
    assert [one.margin for one in found[2:]] == [None] * 3


def picture(kind):
    values = np.full((64, 64, 3), (180, 210, 255), np.uint8)
    if kind == "a drawing":
        values[20:44, 20:44] = (220, 40, 40)
    if kind == "faint":
        values[20:44, 20:44] = (176, 206, 251)
    if kind == "a speck":
        values[:6, :6] = 0
    if kind == "grey noise":
        values = np.random.default_rng(0).integers(120, 132, values.shape, np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("a drawing", False),
        ("one colour", True),
        ("faint", True),
        ("a speck", True),
        ("grey noise", True),
    ],
)
def test_pictures_that_collapsed(kind, wanted):
    assert collapsed(picture(kind)) is wanted


def line(fact, *probes, way="alone"):
    keys = ("column", "right", "known", "margin", "picture", "seed", "collapsed")
    made = [dict(zip(keys, values, strict=True)) for values in probes]
    return {"way": way, "fact": fact, "kind": "erased", "probes": made}


def test_columns_stand_for_all_pictures_and_for_the_known_ones():
    lines = [
        line("one", ("efficacy", True, True, 0.5, "a", 0, False)),
        line("two", ("efficacy", False, True, -0.1, "b", 0, True)),
        line("three", ("efficacy", True, False, None, "c", 0, False)),
    ]
    found = summary(lines)["alone"]["erased"]
    assert found["efficacy"]["mean"] == pytest.approx(2 / 3)
    assert found["efficacy known"]["mean"] == 0.5
    assert found["efficacy known"]["n"] == 2
    assert found["efficacy margin"]["mean"] == pytest.approx(0.2)
    low, high = found["efficacy"]["ci95"]
    assert low < 2 / 3 < high
    assert collapses(lines)["alone"]["mean"] == pytest.approx(1 / 3)


def test_a_picture_that_two_probes_look_at_is_one_picture():
    twice = ("efficacy", True, True, None, "a", 0, True)
    again = ("subject", True, True, None, "a", 0, True)
    other = ("generality", True, True, None, "b", 0, False)
    assert collapses([line("one", twice, again, other)])["alone"]["n"] == 2


def test_scraps_are_fainter_than_what_the_untouched_model_draws():
    names = [f"{i}" for i in range(100)]
    plain = [("efficacy", True, True, None, name, 0, False) for name in names]
    gone = [
        ("efficacy", True, True, None, name, 0, False) for name in ("scraps", "faint")
    ]
    lines = [line("one", *plain, way="before"), line("one", *gone)]
    contrasts = {name: 40.0 + i for i, name in enumerate(names)}
    contrasts |= {"scraps": 25.0, "faint": 41.0}
    found = faint(lines, contrasts, "before")
    assert found["before"]["erased"]["mean"] == pytest.approx(0.01)
    assert found["alone"]["erased"]["mean"] == pytest.approx(0.5)


def test_the_contrast_of_a_picture():
    values = np.zeros((4, 4, 3), np.uint8)
    values[:2] = 200
    assert contrast(Image.fromarray(values)) == pytest.approx(100)


def test_what_is_to_be_gone_is_right_where_it_is_not_shown():
    probe = DrawnProbe("efficacy", "a lion", gone=True)
    assert Judgement(False).right(probe)
    assert not Judgement(True).right(probe)
