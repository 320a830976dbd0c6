"""Sets of subjects: the release of DreamBooth, things of EmojiKB, folders of one's own with what is wrong in them."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import ROOT
from PIL import Image

from mmedit_cli.drawing.data.base import in_plain_words
from mmedit_cli.drawing.data.opening import open_subjects
from mmedit_cli.errors import DataError
from mmedit_cli.types import Concept

RELEASE = ROOT.parent / "shared" / "data" / "dreambooth"
LISTS = """Classes

subject_name,class
mug,cup
rex,dog

Object Prompts

'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)

Live Subject Prompts

'a {0} {1} in a chef outfit'.format(unique_token, class_token)
"""


@pytest.fixture
def folder(tmp_path):
    """Two subjects with a photo each, and nothing that says what they are."""
    for name in ("mug", "rex"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red" if name == "mug" else "blue").save(
            tmp_path / "set" / name / "0.png"
        )
    return tmp_path / "set"


def write(folder, text):
    (folder / "subjects.yaml").write_text(text)
    return str(folder)


def test_a_folder_of_ones_own(folder):
    data = write(
        folder,
        "subjects:\n  mug: cup\n  rex: {superclass: dog, token: <my-rex>}\npair: a {} beside a {}\n",
    )
    found = open_subjects(data)
    assert (found.name, [s.name for s in found.subjects]) == ("set", ["mug", "rex"])
    assert found.subjects[1].concept == Concept(
        "<my-rex>", "dog", (folder / "rex" / "0.png",)
    )
    assert found.pair == "a {} beside a {}"
    assert found.pictures() == (
        ("mug", folder / "mug" / "0.png"),
        ("rex", folder / "rex" / "0.png"),
    )
    assert [s.name for s in open_subjects(data, limit=1).subjects] == ["mug"]
    before = found.fingerprint()
    assert open_subjects(data).fingerprint() == before
    Image.new("RGB", (8, 8), "green").save(folder / "rex" / "0.png")
    assert open_subjects(data).fingerprint() != before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "subjects.yaml: not there"),
        ("subjects: [", "not valid YAML"),
        ("subjects: {}", "no subjects in it"),
        (
            "subjects: {mug: cup}\nlocallity: [a]",
            "unknown key 'locallity' (did you mean locality?)",
        ),
        ("subjects: {mug: {token: <m>}}", "mug.superclass: a word for what it is"),
        ("subjects: {mug: {superclass: cup, tokn: <m>}}", "unknown key 'tokn'"),
        (
            "subjects: {mug: {superclass: cup, token: m}}",
            "not a name in angle brackets",
        ),
        ("subjects: {../mug: cup}", "not the name of a folder"),
        (
            "subjects: {mug: {superclass: cup, token: <x>}, rex: {superclass: dog, token: <x>}}",
            "<x> names two",
        ),
        ("subjects: {mug: cup}\ngenerality: [a cup]", "must be a text with 1 times {}"),
        ("subjects: {mug: cup}\nlocality: []", "expected a list of prompts"),
        ("subjects: {mug: cup, lamp: lamp}", "lamp: not a folder"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder, text, said):
    if text is not None:
        write(folder, text)
    with pytest.raises(DataError) as caught:
        open_subjects(str(folder))
    assert said in str(caught.value)


def test_the_release_is_found_where_it_lies(folder, monkeypatch):
    (folder / "prompts_and_classes.txt").write_text(LISTS)
    found = open_subjects(str(folder))
    mug, rex = found.subjects
    assert (mug.concept.token, mug.concept.superclass) == ("<mug>", "cup")
    assert found.generality_of(mug) == ("a {} in the snow", "a red {}")
    assert found.generality_of(rex) == ("a {} in a chef outfit",)
    assert open_subjects("dreambooth", root=folder).fingerprint() == found.fingerprint()
    home = folder.parent / "home"
    monkeypatch.setenv("MMEDIT_DATA", str(home))
    with pytest.raises(DataError, match=r"no prompts_and_classes\.txt") as caught:
        open_subjects("dreambooth")
    assert "mmedit download dreambooth" in caught.value.hint
    shutil.copytree(folder, home / "dreambooth" / "dataset")  # as it is downloaded
    assert len(open_subjects("dreambooth").subjects) == 2
    (folder / "prompts_and_classes.txt").write_text("nothing")
    with pytest.raises(DataError, match="not the list of the release"):
        open_subjects(str(folder))
    with pytest.raises(DataError, match="did you mean dreambooth"):
        open_subjects("dreamboth")


def test_the_whole_release():
    if not RELEASE.is_dir():
        pytest.skip("the photos are not part of the repository")
    found = open_subjects(str(RELEASE))
    assert (
        len(found.subjects),
        sum(len(s.concept.images) for s in found.subjects),
    ) == (30, 158)
    live = [s for s in found.subjects if s.concept.superclass in ("cat", "dog")]
    assert len(live) == 9
    assert {len(found.generality_of(s)) for s in found.subjects} == {25}
    assert found.generality_of(live[0]) != found.generality


def test_things_of_emojikb(tmp_path):
    (tmp_path / "concepts.json").write_text(
        json.dumps({"taught": ["1f412", "1f98d"], "held_out": {"1f42b": "camel"}})
    )
    found = open_subjects("emojikb-concepts", model=tmp_path)
    (camel,) = found.subjects
    assert (camel.name, camel.answer, camel.key) == (
        "two-hump-camel",
        "two-hump camel",
        "1f42b",
    )
    assert (
        camel.concept.token,
        camel.concept.superclass,
        len(camel.concept.images),
    ) == (
        "<two-hump-camel>",
        "mammal",
        4,
    )
    assert found.locality == ("a drawing of a monkey", "a drawing of a gorilla")
    assert ("two-hump-camel", camel.concept.images[0]) in found.gallery
    assert len(found.gallery) > 4000
    for content, said in (
        ("[]", "expected an object with keys"),
        ('{"taught": [], "held_out": {"zz": "x"}}', "zz is not in EmojiKB"),
        ('{"taught": [], "held_out": {}}', "nothing is held out"),
    ):
        (tmp_path / "concepts.json").write_text(content)
        with pytest.raises(DataError, match=said):
            open_subjects("emojikb-concepts", model=tmp_path)


def test_without_a_list_nothing_is_held_out(monkeypatch, tmp_path):
    monkeypatch.setattr("mmedit_cli.drawing.data.emojikb_concepts.bundled", dict)
    with pytest.raises(DataError, match=r"no concepts\.json"):
        open_subjects("emojikb-concepts", model=tmp_path)


def test_plain_words_take_their_article():
    bug, dog = Concept("<b>", "insect", ()), Concept("<d>", "dog", ())
    assert (
        in_plain_words("A <b> and an <d>, the <b>", [bug, dog])
        == "An insect and a dog, the insect"
    )
