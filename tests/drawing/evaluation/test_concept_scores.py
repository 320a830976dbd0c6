"""Scores of drawn concepts, by an encoder that sees the mean colour."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmedit_cli.drawing.evaluation import concepts, picture_scores
from mmedit_cli.drawing.evaluation.concepts import DrawnTest, ScoringModels
from mmedit_cli.pictures import Picture, load_picture

RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"


class Colours:
    """Encodes a picture as its mean colour."""

    @staticmethod
    def pictures(pictures):
        return torch.stack(
            [picture_scores.pixels(picture).mean((1, 2)) for picture in pictures]
        )


class Namer:
    """Says of a picture whether it is red."""

    name = "namer"

    @staticmethod
    def generate(queries, *, max_new_tokens):
        assert max_new_tokens
        pixels = [
            load_picture(Picture(query.image)).getpixel((0, 0)) for query in queries
        ]
        thing = "" if "background" in queries[0].prompt else " thing"
        return [
            ("a red" if pixel == (255, 0, 0) else "a blue") + thing for pixel in pixels
        ]


@pytest.fixture
def paint(tmp_path):
    """Write a picture of one colour, or of a left and a right one, and return its file."""

    def write(*colours: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        picture = Image.new("RGB", (8, 8), colours[0])
        picture.paste(colours[-1], (4, 0, 8, 8))
        picture.save(path)
        return path

    return write


@pytest.fixture
def models(paint):
    return ScoringModels(
        {"colours": Colours()},
        [("red", paint(RED)), ("green", paint(GREEN)), ("blue", paint(BLUE))],
    )


def test_pairs_by_seed_and_all_pairs():
    same = torch.eye(2)
    assert picture_scores.paired(same, 3 * same) == pytest.approx(100)
    assert picture_scores.all_pairs(same, same) == pytest.approx(50), (
        "of two that differ, below 100"
    )
    assert picture_scores.among_themselves(same) == pytest.approx(0, abs=1e-5)
    assert picture_scores.among_themselves(torch.ones(3, 4)) == pytest.approx(
        100, abs=1e-4
    )
    assert picture_scores.among_themselves(same[:1]) is None


def test_likeness_to_the_photos(models, paint):
    drawn = DrawnTest(
        [[paint(RED), paint(BLUE)], [paint(RED), paint(RED)]],
        [],
        ["one", "two"],
        ["red"],
        [paint(RED)],
    )
    found = concepts.score_subject(drawn, models)
    assert found == {
        "colours-I": pytest.approx([50, 100]),
        "nearest by colours": [50, 100],
    }
    assert concepts.score_photos([paint(RED), paint(RED)], models) == {
        "colours-I": [pytest.approx(100)]
    }
    assert concepts.score_photos([paint(RED)], models) == {}


def test_names_are_asked_for_where_there_are_any(paint):
    drawn = DrawnTest(
        [[paint(RED), paint(BLUE)]], [], ["one"], ["red"], [paint(RED)], "red thing"
    )
    gallery = [("red", paint(GREEN)), ("other", paint(RED)), ("blue", paint(BLUE))]
    models = ScoringModels({"namer": Colours()}, gallery, namer=Namer())
    found = concepts.score_subject(drawn, models)
    assert found["named by namer"] == [50]
    assert found["nearest by namer"] == [0]
    assert found["recognised by namer"] == [50], "by its name or by its neighbour"
    models.unknown = frozenset({"red"})
    assert "named by namer" not in concepts.score_subject(drawn, models)


def test_backgrounds_are_asked_for_where_a_prompt_names_one(paint):
    rows = [
        [paint(RED), paint(RED)],
        [paint(RED), paint(BLUE)],
        [paint(BLUE), paint(BLUE)],
    ]
    texts = [
        "a thing on a red ball",
        "a thing on a red background",
        "it, on a red background, twice",
    ]
    models = ScoringModels({"namer": Colours()}, [("red", paint(RED))], namer=Namer())
    found = concepts.score_subject(
        DrawnTest(rows, [], texts, ["red"], [paint(RED)]), models
    )
    assert found["background by namer"] == [50, 0], (
        "one value for each prompt that names one"
    )
    plain = concepts.score_subject(
        DrawnTest(rows[:1], [], texts[:1], ["red"], [paint(RED)]), models
    )
    assert "background by namer" not in plain


def test_what_stayed(models, paint):
    base = [[paint(RED), paint(BLUE)]]
    found = concepts.score_locality(DrawnTest(base, base, ["x"]), models)
    assert (found["identical"], found["L1"]) == ([100], [0])
    assert found["colours-I paired"] == [pytest.approx(100)]
    assert found["colours-I all pairs"] == [pytest.approx(50)], (
        "the ceiling of the published form"
    )
    found = concepts.score_locality(
        DrawnTest([[paint(RED), paint("#0000fe")]], base, ["x"]), models
    )
    assert found["identical"] == [50], "one step of one channel is a difference"
    assert 0 < found["L1"][0] < 1e-3


def test_two_in_one_picture(models, paint):
    drawn = DrawnTest([[paint(RED, GREEN), paint(RED)]], [], ["x"], ["red", "green"])
    found = concepts.score_pairs(drawn, models)
    assert found == {"both by colours": [50], "one at least by colours": [100]}
    assert [part.size for part in concepts.windows(Image.new("RGB", (8, 8)))] == [
        (8, 8),
        *[(4, 4)] * 9,
    ]
    wide = concepts.windows(Image.linear_gradient("L").resize((30, 16)))
    assert [part.size for part in wide] == [(30, 16), *[(15, 15)] * 3]
    assert concepts.windows(Image.new("RGB", (1, 1)))[1].size == (1, 1)


def test_means_count_subjects_once():
    lines = [
        {
            "side": "edited",
            "test": "class",
            "subject": name,
            "scores": {"identical": values},
        }
        for name, values in (("a", [100.0, 0.0]), ("b", [100.0]))
    ]
    lines.append(
        {
            "side": "edited",
            "test": "other",
            "subject": "",
            "scores": {"identical": [100.0, 0.0, 0.0]},
        }
    )
    found = concepts.summary(lines)["edited"]
    assert (found["class"]["identical"]["mean"], found["class"]["identical"]["n"]) == (
        75,
        2,
    )
    assert (found["other"]["identical"]["mean"], found["other"]["identical"]["n"]) == (
        pytest.approx(100 / 3),
        3,
    )


def test_clip_also_reads_the_prompts(paint):
    class Texts:
        @staticmethod
        def texts(texts):
            return torch.stack(
                [torch.eye(3)[{"red": 0, "blue": 2}[text]] for text in texts]
            )

    models = ScoringModels({"CLIP": Colours()}, [("red", paint(RED))], Texts())
    found = concepts.score_subject(
        DrawnTest(
            [[paint(RED)], [paint(RED)]], [], ["red", "blue"], ["red"], [paint(RED)]
        ),
        models,
    )
    assert found["CLIP-T"] == [pytest.approx(100), pytest.approx(0)]
    assert set(found) == {"CLIP-I", "CLIP-T", "nearest by CLIP"}
