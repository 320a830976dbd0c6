"""The tab that draws: its model is loaded once, and what a visitor has taught it is theirs alone."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from conftest import SHAPES
from PIL import Image, ImageChops

from mmedit_cli.errors import DataError, UserError
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.ui import making
from mmedit_cli.ui.learning import Learning, concept_of, methods, tokens_in
from mmedit_cli.ui.visitors import Visitors

STARS = [str(SHAPES / "solid" / "red-star.png"), str(SHAPES / "solid" / "red-star.png")]
CPU = LoadOptions(device="cpu")


def same(one: Image.Image, two: Image.Image) -> bool:
    return ImageChops.difference(one, two).getbbox() is None


@pytest.fixture
def drawing(tmp_path) -> making.Drawing:
    return making.Drawing("tiny-sd", None, tmp_path, CPU)


@pytest.fixture
def learning() -> Learning:
    return Learning("tiny-sd", CPU)


def test_the_model_is_loaded_once_and_draws_what_the_command_draws(
    cli, drawing, tmp_path, monkeypatch
):
    load = making.load_stable_diffusion
    loaded = []

    def counted(*words, **options):
        loaded.append(words)
        return load(*words, **options)

    monkeypatch.setattr(making, "load_stable_diffusion", counted)
    first = drawing.draw("a star", 3, 2)
    assert not same(first, drawing.draw("a moon", 3, 2))
    assert same(first, drawing.draw("a star", 3, 2))
    assert loaded == [("tiny-sd",)]
    file = tmp_path / "star.png"
    words = ("a star", "--model", "tiny-sd", "--seeds", 3, "--steps", 2, "-o", file)
    assert cli("generate", *words)[0] == 0
    assert same(first, Image.open(file))


def test_a_thing_is_learned_and_drawn_beside_what_the_model_draws(
    drawing, learning, tmp_path
):
    told: list[tuple[float, str]] = []
    concept = concept_of(STARS, " my-star ", "star")
    entry = learning.learn(
        concept,
        "multi-melo-diffusion",
        2,
        tmp_path / "own",
        lambda share, what: told.append((share, what)),
    )
    assert (entry["token"], entry["superclass"]) == ("<my-star>", "star")
    assert told == [(0.5, "steps"), (1.0, "steps")]
    assert tokens_in(str(tmp_path / "own")) == ["<my-star>"]
    alone = drawing.draw("a star", 0, 2)
    both = drawing.draw("a <my-star>", 0, 2, tmp_path / "own")
    assert both.height > 2 * alone.height
    assert same(drawing.draw("a star", 0, 2), alone), "the model is as it was"
    with pytest.raises(DataError, match="no concept <my-star>"):
        drawing.draw("a <my-star>", 0, 2)


def test_what_cannot_be_learned_is_said(learning, tmp_path):
    for pictures, token, word in (([], "x", "y"), (STARS, " ", "y"), (STARS, "x", "")):
        with pytest.raises(UserError, match=r"choose three to six|say how it is"):
            concept_of(pictures, token, word)
    concept = concept_of(STARS, "<star>", "star")
    with pytest.raises(UserError, match="steps: 0 is not from 1 to 2,000"):
        learning.learn(concept, methods()[0], 0, tmp_path / "own", print)
    many = concept_of(STARS * 7, "<star>", "star")
    with pytest.raises(UserError, match="more than 12 pictures"):
        learning.learn(many, methods()[0], 1, tmp_path / "own", print)
    assert not (tmp_path / "own").exists()


def test_the_end_of_the_server_ends_what_is_learned(learning, tmp_path):
    concept = concept_of(STARS, "<star>", "star")
    learning.stop()
    with pytest.raises(UserError, match="the server has ended"):
        learning.learn(concept, methods()[0], 5, tmp_path / "own", print)
    assert tokens_in(str(tmp_path / "own")) == []


@pytest.mark.skipif(find_spec("gradio") is None, reason="pip install 'mmedit-cli[ui]'")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_visitors_have_things_of_their_own(drawing, learning, tmp_path):
    from mmedit_cli.ui.draw_tab import DrawTab

    tab = DrawTab(drawing, learning, Visitors(tmp_path, None))
    given = (STARS, "<star>", "star", methods()[0], 1.0)
    said, prompt, own = tab.learn(*given, "")
    assert said.startswith("learned <star> from 2 pictures in ")
    assert prompt == "a drawing of a <star>"
    assert tab.draw(prompt, 0, 2, own).height > tab.draw("a star", 0, 2, own).height
    with pytest.raises(DataError, match="no concept <star>"):
        tab.draw(prompt, 0, 2, "")
    assert tab.forget(own) == ("forgotten: <star>", "")
    assert not list(tmp_path.glob("*/*.safetensors"))
