"""What every data set with a name promises; a new one inherits these tests by being in its folder.

One whose files are not part of the repository is read from stand-ins, which `stand_in` writes in its layout.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from mmedit_cli import registry
from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.base import (
    DataOptions,
    Dataset,
    find_dataset,
    fingerprint,
    read_data,
)
from mmedit_cli.knowledge.data.shared.published import PublishedDataset

SEVERAL = 6  # records of each stand-in, and cases that are looked at
HOP = {
    "port_q": "Which family is it of?",
    "port_a": "cats",
    "port_edit_q": "Which family is the lynx of?",
    "port_edit_a": "cats",
    "port_type": "1-hop",
    "Q&A": {"Question": "Which family is it of?", "Answer": "cats"},
}


def record(number: int) -> dict[str, object]:
    return {
        "src": f"What is it, number {number}?",
        "alt": "a lynx",
        "pred": "a cat",
        "rephrase": f"Which thing is number {number}?",
        "loc": "who wrote it",
        "loc_ans": "Ada",
        "m_loc_q": "What sport is it?",
        "m_loc_a": "golf",
        "image": f"val2014/{number}.png",
        "image_rephrase": f"val2014/{number}-again.png",
        "m_loc": f"val2014/{number}-other.png",
        "port_new": [HOP],
        "answers": ["a cat"],
        "requested_rewrite": {
            "prompt": "{} is",
            "subject": f"Number {number}",
            "target_new": {"str": "a lynx"},
            "target_true": {"str": "a cat"},
        },
        "paraphrase_prompts": [f"We call number {number}"],
        "neighborhood_prompts": [f"The beast of house {number} is"],
    }


def stand_in(dataset: PublishedDataset, root: Path) -> DataOptions:
    """Write a few records for each split of a published data set, with their pictures."""
    records = [record(number) for number in range(SEVERAL)]
    for source in dataset.sources.values():
        file = root / source.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records))
    images = root / "pictures"
    for number, row in enumerate(records):
        for shade, key in enumerate(("image", "image_rephrase", "m_loc")):
            path = images / str(row[key])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, shade, 99)).save(path)
    return DataOptions(root, images=images)


@pytest.fixture(params=registry.datasets.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dataset(name: str) -> Dataset:
    return registry.datasets.get(name)


@pytest.fixture
def options(dataset: Dataset, tmp_path: Path) -> DataOptions:
    if isinstance(dataset, PublishedDataset):
        return stand_in(dataset, tmp_path)
    return DataOptions()


def some(dataset: Dataset, split: str, options: DataOptions) -> list:
    """The first cases of a split; nothing in it may be wrong."""
    problems: list[str] = []
    cases = list(islice(dataset.cases(split, options, problems), SEVERAL))
    assert problems == []
    return cases


def test_it_is_found_by_its_name_and_the_split_behind_a_colon(name, dataset):
    assert dataset.name == name
    assert find_dataset(name) == (dataset, "")
    for split in dataset.splits:
        assert find_dataset(f"{name}:{split}") == (dataset, split)
        assert dataset.split(split) == split


def test_its_splits_have_one_that_is_meant_without_a_word(name, dataset):
    assert dataset.split("") == dataset.default
    assert dataset.default in dataset.splits
    assert len(set(dataset.splits)) == len(dataset.splits)
    meant = f"{name}:{dataset.default}x: no such split .did you mean {dataset.default}"
    with pytest.raises(DataError, match=meant):
        dataset.split(f"{dataset.default}x")


def test_its_cases_are_the_same_whenever_they_are_read(dataset, options):
    for split in dataset.splits:
        cases = some(dataset, split, options)
        assert cases == some(dataset, split, options)
        assert len({case.uid for case in cases}) == len(cases) == SEVERAL, split


def test_every_question_has_an_answer_and_a_place(dataset, options):
    for split in dataset.splits:
        for case in some(dataset, split, options):
            assert case.place, split
            queries = [query for _, asked in case.columns() for query in asked]
            assert case.request in queries
            assert all(q.prompt.strip() and q.target.strip() for q in queries)


def test_its_pictures_are_there_and_are_pictures(dataset, options):
    for split in dataset.splits:
        for case in some(dataset, split, options)[:2]:
            for _, asked in case.columns():
                for image in {query.image for query in asked} - {None}:
                    with Image.open(image) as picture:
                        picture.verify()


def test_a_limit_takes_the_first(name, dataset, options):
    data = read_data(name, limit=2, options=options)
    assert [case.uid for case in data.cases] == [
        case.uid for case in some(dataset, dataset.default, options)[:2]
    ]
    assert data.name.startswith(name)


def test_its_content_is_known_by_a_digest(name, options):
    cases = read_data(name, limit=2, options=options).cases
    digest = fingerprint(cases)
    assert fingerprint(read_data(name, limit=2, options=options).cases) == digest
    assert fingerprint(cases[:1]) != digest
    other = replace(cases[0].request, target="something else")
    assert fingerprint([replace(cases[0], request=other), cases[1]]) != digest


def test_it_says_in_one_line_what_it_expects(dataset, options):
    for split in dataset.splits:
        for said in (dataset.form(split), dataset.layout(options)):
            assert said.strip()
            assert "\n" not in said


def test_files_that_are_not_there_are_named(dataset, tmp_path):
    nowhere = tmp_path / "nowhere"
    if not isinstance(dataset, PublishedDataset):
        dataset = type(dataset)(nowhere)
    with pytest.raises(DataError) as caught:
        next(dataset.cases(dataset.default, DataOptions(nowhere), []))
    assert "nowhere" in caught.value.problems[0]
    assert caught.value.hint
