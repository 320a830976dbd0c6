"""The open world of EmojiKB: what is for evaluation is used by nothing else, and columns ask what they say."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image, ImageChops

from mmedit_cli.knowledge import loading
from mmedit_cli.knowledge.data import emojikb_open
from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.data.emojikb_open import (
    CHANGED_PICTURE,
    EVALUATION,
    FURTHER_ARTIST,
    FURTHER_WORDS,
    UNSEEN_ARTIST,
    UNSEEN_WORDS,
    all_wordings,
    artist_uses,
    content_words,
    findings,
)
from mmedit_cli.knowledge.evaluation.protocol import Protocol
from mmedit_cli.knowledge.workflow import evaluation
from mmedit_cli.output import Output
from mmedit_cli.picture_changes import CHANGES, GROUNDS, changed, choose
from mmedit_cli.pictures import Picture
from mmedit_cli.reading import read_text
from mmedit_cli.records import Run
from mmedit_cli.registry import emojikb_dir
from mmedit_cli.types import EditCase

DATA = ROOT / "data" / "emojikb"
COLUMNS = {UNSEEN_ARTIST, UNSEEN_WORDS, CHANGED_PICTURE}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(path).splitlines()]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Changed pictures are made in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def cases() -> list[EditCase]:
    return load_cases("emojikb:open", limit=150)


@pytest.fixture(scope="module")
def truths() -> Callable[[EditCase], str]:
    concepts = {record["id"]: record for record in lines(DATA / "concepts.jsonl.gz")}
    named = json.loads((DATA / "backgrounds.json").read_text(encoding="utf-8"))
    colours = {code: name for name, code in named.items()}

    def truth(case: EditCase) -> str:
        if case.type == "background":
            return colours[case.request.background]
        assert case.request.image is not None
        return concepts[case.request.image.stem][case.type]

    return truth


# -- what is kept for evaluation ------------------------------------------------------------------------------------


def test_nothing_for_evaluation_occurs_in_training():
    found = list(findings(emojikb_dir()))
    assert [line for line in found if line[1] is False] == []
    names = [name for name, _, _ in found]
    assert "their pictures in training" in names
    assert "mini-blip2 was trained on" in names


@pytest.mark.parametrize("side", ["train", "val"])
def test_editors_are_trained_on_what_training_may_see(side):
    unseen = {name for name, use in artist_uses(DATA).items() if use == EVALUATION}
    wordings = all_wordings(DATA)
    wordings.pop("frames")
    kept = {text for sides in wordings.values() for text in sides["eval"]}
    opened = load_cases(f"emojikb:open-{side}", limit=60)
    columns = {name for case in opened for name in case.generality}
    assert columns >= {FURTHER_ARTIST, FURTHER_WORDS, CHANGED_PICTURE}
    for case in opened:
        assert not case.needs.keys() & columns
        for name, queries in case.generality.items():
            assert all(query.target == case.request.target for query in queries)
            shown = {query.image.parent.name for query in queries if query.image}
            assert not shown & unseen, name
            assert not {query.prompt for query in queries} & kept, name
        for query in case.generality.get(FURTHER_WORDS, ()):
            assert query.prompt in wordings[case.type][side]


def test_there_are_as_many_artists_and_wordings_as_promised():
    uses = artist_uses(DATA)
    unseen = [artist for artist, use in uses.items() if use == EVALUATION]
    assert len(unseen) == 2
    assert len(uses) - 4 - len(unseen) >= 4
    wordings = all_wordings(DATA)
    wordings.pop("frames")
    templates = json.loads((DATA / "templates.json").read_text(encoding="utf-8"))
    assert wordings.keys() == templates.keys()
    for sides in wordings.values():
        texts = [text for side in ("train", "val", "eval") for text in sides[side]]
        assert len(set(texts)) == len(texts) >= 60
        assert (len(sides["val"]), len(sides["eval"])) == (2, 20)


def test_every_drawing_is_listed_once_and_is_of_a_concept():
    known = {record["id"] for record in lines(DATA / "concepts.jsonl.gz")}
    drawn = {
        (artist, record["id"])
        for record in lines(DATA / "drawings.jsonl.gz")
        for artist in record["artists"]
    }
    folder = emojikb_dir()
    first = {"noto", "twemoji", "fluent", "openmoji"}
    found = {
        (path.parent.name, path.stem)
        for path in folder.glob("*/*.png")
        if path.parent.name not in first
    }
    assert drawn == found
    assert {concept for _, concept in drawn} <= known
    assert {artist for artist, _ in drawn} == artist_uses(DATA).keys() - first


def test_content_words_are_what_is_asked_for():
    assert content_words("What's the country's capital, please?") == {
        "country",
        "capital",
    }
    assert content_words("What is this?") == set()


# -- planted faults -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with what the findings read and two pictures an artist, a model, and its faults by name."""
    folder, data = tmp_path / "emojikb", tmp_path / "data"
    model = data / "models" / "mini" / "training.json"
    model.parent.mkdir(parents=True)
    model.write_text("{}")
    folder.mkdir()
    packed = ("concepts.jsonl.gz", "drawings.jsonl.gz")
    plain = ("artists.json", "backgrounds.json", "wordings.json", "templates.json")
    for name in (*plain, *packed):
        shutil.copy(DATA / name, folder / name)
    for artist in artist_uses(DATA):
        (folder / artist).mkdir()
        for path in sorted((emojikb_dir() / artist).glob("*.png"))[:2]:
            shutil.copy(path, folder / artist / path.name)
    monkeypatch.setattr(emojikb_open, "share_dir", lambda name: data)

    def faults() -> dict[str, str]:
        return {name: text for name, sound, text in findings(folder) if sound is False}

    return folder, model, faults


def test_a_small_folder_is_sound(small):
    assert small[2]() == {}


def test_a_case_that_shows_an_artist_for_evaluation_is_found(small):
    folder, _, faults = small
    shown = {"request": {"image": "emojione/1f34e.png"}}
    text = json.dumps(shown) + "\n"
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    wrong = faults()["their pictures in training"]
    assert wrong == "train.jsonl.gz shows emojione"


def test_a_picture_under_another_artists_name_is_found(small):
    folder, _, faults = small
    theirs = sorted((folder / "streamline").glob("*.png"))[0]
    shutil.copy(theirs, folder / "noto" / "1f34e.png")
    wrong = faults()["their pictures in training"]
    assert wrong == f"streamline/{theirs.name} is noto/1f34e.png"


def test_a_wording_that_training_has_too_is_found(small):
    folder, _, faults = small
    wordings = all_wordings(folder)
    wordings["name"]["train"].append("what has been PORTRAYED")
    (folder / "wordings.json").write_text(json.dumps(wordings))
    wrong = faults()
    assert wrong["these in training"] == "name: 'What has been portrayed?'"
    new = wrong["in words that are new"]
    assert new == "name: 'What has been portrayed?' has portrayed"


def test_a_model_trained_on_what_is_for_evaluation_is_found(small):
    _, model, faults = small
    asked = {"name": ["Identify it."]}
    model.write_text(json.dumps({"artists": ["noto", "emojione"], "wordings": asked}))
    wrong = faults()["mini was trained on"]
    assert wrong == "emojione; name: 'Identify it.'"


# -- the columns ----------------------------------------------------------------------------------------------------


def test_the_open_world_adds_columns_and_changes_nothing_else(cases):
    closed = load_cases("emojikb:eval", limit=150)
    for before, after in zip(closed, cases, strict=True):
        assert after.request == before.request
        assert after.locality == before.locality
        assert after.portability == before.portability
        kept = {n: q for n, q in after.generality.items() if n not in COLUMNS}
        assert kept == before.generality
        kept = {n: q for n, q in after.needs.items() if n not in COLUMNS}
        assert kept == before.needs


def test_every_evaluation_has_the_columns_and_training_none(cases):
    assert load_cases("emojikb", limit=150) == cases
    for split in ("train", "val", "eval", "corrections"):
        for case in load_cases(f"emojikb:{split}", limit=20):
            assert not COLUMNS & {*case.generality, *case.needs}
    assert {case.concept for case in cases} == {c.request.image.stem for c in cases}


@pytest.mark.parametrize(
    "editor", ["liveedit", pytest.param("ft", marks=pytest.mark.slow)]
)
def test_the_other_columns_are_the_same_to_the_last_bit(tmp_path, editor):
    """The same edits of mini-blip2, asked with and without the open world in batches of other questions."""
    lines = []
    for data in ("emojikb:eval", "emojikb"):
        request = evaluation.EvalOptions(
            editor,
            loading.ModelOptions("mini-blip2", device="cpu"),
            data,
            Protocol(sequential=4, report_at=(1,)),
            limit=4,
            records=tmp_path,
        )
        evaluation.evaluate(request, Output(as_json=True))
        run = Run.view(evaluation.plan_evaluation(request).folder)
        lines.append(run.read("cases"))
    for closed, opened in zip(*lines, strict=True):
        assert closed["case"] == opened["case"]
        for table in ("scores", "base"):
            for protocol, columns in closed[table].items():
                found = opened[table][protocol]
                assert columns.items() <= found.items()
                more = {name.removesuffix(" known") for name in found.keys() - columns}
                assert more <= {f"generality.{name}" for name in COLUMNS}
                assert f"generality.{UNSEEN_WORDS}" in more


def test_each_column_asks_what_its_name_says(cases):
    uses, wordings = artist_uses(DATA), all_wordings(DATA)
    drawn = 0
    for case in cases:
        request = case.request
        (words,) = case.generality[UNSEEN_WORDS]
        assert words.prompt in wordings[case.type]["eval"]
        assert (words.image, words.target) == (request.image, request.target)
        (picture,) = case.generality[CHANGED_PICTURE]
        assert (picture.prompt, picture.target) == (request.prompt, request.target)
        assert picture.image != request.image
        for query in case.generality.get(UNSEEN_ARTIST, ()):
            drawn += 1
            assert (query.prompt, query.target) == (request.prompt, request.target)
            assert uses[query.image.parent.name] == EVALUATION
            assert query.image.stem == request.image.stem
            assert query.image.is_file()
            if case.type == "background":
                assert query.background == request.background
    assert drawn > len(cases) / 2


def test_the_untouched_model_is_asked_the_same_with_the_true_answer(cases, truths):
    for case in cases:
        for column in COLUMNS & case.generality.keys():
            (asked,), (needed,) = case.generality[column], case.needs[column]
            assert (asked.prompt, asked.image) == (needed.prompt, needed.image)
            assert asked.background == needed.background
            assert needed.target == truths(case) != asked.target


# -- changed pictures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apple() -> Picture:
    return Picture(emojikb_dir() / "noto" / "1f34e.png", "#b3d1ff")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_shows_and_is_the_same_each_time(apple, change):
    plain = Image.new("RGBA", (64, 64), apple.background)
    with Image.open(apple.path) as drawn:
        plain = Image.alpha_composite(plain, drawn.convert("RGBA")).convert("RGB")
    done = changed(apple, change, 7)
    assert (done.mode, done.size) == ("RGB", (64, 64))
    assert ImageChops.difference(done, plain).getbbox() is not None
    assert done.tobytes() == changed(apple, change, 7).tobytes()
    corner = done.getpixel((0, 0))
    near = all(abs(a - b) <= 6 for a, b in zip(corner, (0xB3, 0xD1, 0xFF), strict=True))
    assert near == (change not in GROUNDS)


def test_mirroring_is_not_for_flags_nor_signs_and_grounds_not_for_backgrounds(cases):
    world = emojikb_open.OpenWorld.read(DATA)
    for case in cases:
        concept = world.concepts[case.request.image.stem]
        left_out = set(CHANGES) - set(world._changes(case))
        wanted = set(GROUNDS) if case.type == "background" else set()
        if concept["category"] in ("flags", "symbols"):
            wanted.add("mirrored")
        assert left_out == wanted


def test_a_choice_depends_on_its_key_alone():
    names = ("a", "b", "c", "d")
    chosen = [choose(names, "key", number) for number in range(200)]
    assert chosen == [choose(names, "key", number) for number in range(200)]
    assert set(chosen) == set(names)
