"""What every set of subjects promises, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmedit_cli.drawing.data import opening
from mmedit_cli.drawing.data.base import SubjectSet
from mmedit_cli.drawing.data.opening import open_subjects
from mmedit_cli.errors import DataError

RELEASE = """Classes

subject_name,class
mug,cup
rex,dog

Object Prompts

'a {0} {1} in the snow'.format(unique_token, class_token)

Live Subject Prompts

'a {0} {1} in a chef outfit'.format(unique_token, class_token)
"""


def photos(folder: Path) -> None:
    for shade, name in enumerate(("mug", "rex")):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (200, shade, 0)).save(folder / name / "0.png")


def own_folder(folder: Path) -> tuple[str, dict]:
    photos(folder)
    (folder / "subjects.yaml").write_text("subjects:\n  mug: cup\n  rex: dog\n")
    return str(folder), {}


def release(folder: Path) -> tuple[str, dict]:
    photos(folder)
    (folder / "prompts_and_classes.txt").write_text(RELEASE)
    return "dreambooth", {"root": folder}


def concepts_of_emojikb(_folder: Path) -> tuple[str, dict]:
    return "emojikb-concepts", {}


SOURCES = (own_folder, release, concepts_of_emojikb)


@pytest.fixture(params=SOURCES, ids=lambda source: source.__name__)
def again(request, tmp_path) -> Callable[..., SubjectSet]:
    """Open the set, once more with every call."""
    data, options = request.param(tmp_path / "set")
    return lambda **more: open_subjects(data, **options, **more)


def test_every_name_has_a_source_here(tmp_path):
    names = {source(tmp_path / source.__name__)[0] for source in SOURCES}
    assert set(opening.NAMED) <= names


def test_names_and_tokens_are_there_once(again):
    subjects = again().subjects
    assert len(subjects) > 1
    for values in (
        {subject.name for subject in subjects},
        {subject.concept.token for subject in subjects},
    ):
        assert len(values) == len(subjects)
    for subject in subjects:
        token = subject.concept.token
        assert token.startswith("<")
        assert token.endswith(">")
        assert subject.concept.superclass.strip()


def test_prompts_have_one_place_for_the_noun_but_for_those_about_other_things(again):
    found = again()
    for subject in found.subjects:
        for prompt in (*found.reliability, *found.generality_of(subject)):
            assert prompt.count("{}") == 1, prompt
    assert found.reliability
    assert found.generality
    assert not any("{" in prompt for prompt in found.locality)
    assert found.pair.count("{}") == 2
    assert found.guidance > 0


def test_photos_are_pictures_and_a_drawing_can_be_compared_with_every_subject(again):
    found = again(limit=2)
    for subject in found.subjects:
        assert subject.concept.images
        for photo in subject.concept.images:
            with Image.open(photo) as picture:
                picture.verify()
    named = {name for name, _ in found.pictures()}
    if not found.gallery:
        assert named == {subject.name for subject in found.subjects}
    assert named


def test_it_is_the_same_whenever_it_is_opened_and_a_limit_takes_the_first(again):
    found, first = again(), again(limit=1)
    assert again() == found
    assert first.subjects == found.subjects[:1]
    assert first.fingerprint() == again(limit=1).fingerprint()
    assert first.fingerprint() != again(limit=2).fingerprint()


def test_a_name_that_is_nearly_right_is_suggested():
    for name in opening.NAMED:
        with pytest.raises(DataError, match=f"did you mean {name}"):
            open_subjects(f"{name}x")
