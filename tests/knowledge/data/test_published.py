"""E-VQA, E-IC and VLKEB: every record of the published files, their quirks, their leaks, and what a user meets."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.base import (
    DataOptions,
    find_dataset,
    load_cases,
    read_data,
)
from mmedit_cli.knowledge.data.shared import audit
from mmedit_cli.knowledge.data.shared.published import tidy
from mmedit_cli.types import EditCase, Query

COUNTS = {  # cases, distinct pictures of the requests, of the M-Loc probes, and in all
    "evqa:train": (6345, 3363, 5032, 14332),
    "evqa": (2093, 1390, 2090, 5517),
    "eic:train": (2849, 2849, 2846, 8355),
    "eic:eval": (1000, 1000, 999, 2971),
    "vlkeb:train": (5000, 5000, 2701, 12143),
    "vlkeb:eval": (3174, 3174, 2034, 8178),
    "vlkeb:onehop": (1278, 1278, 984, 3467),
}
WORDS = {
    "src": "What is it?",
    "alt": "a lynx\n",
    "pred": "a cat",
    "rephrase": '"Which thing is it?"',
    "loc": "nq question: who wrote it",
    "loc_ans": "Ada",
    "m_loc_q": "What sport is it?",
    "m_loc_a": "golf",
}


def record(name: str, **changes: object) -> dict[str, object]:
    return {
        **WORDS,
        "image": f"val2014/{name}.jpg",
        "image_rephrase": f"val2014_image_rephrase/{name}.png",
        "m_loc": f"val2014/{name}-other.jpg",
        **changes,
    }


def save(root: Path, file: str, records: object) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(records, indent=1), encoding="utf-8")


def draw(folder: Path, records: list[dict]) -> None:
    """Draw a stand-in picture for every name that the records use."""
    for number, name in enumerate(
        r[key] for r in records for key in ("image", "image_rephrase", "m_loc")
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            Image.new("RGB", (32, 32), (number % 256, 7 * number % 256, 99)).save(
                folder / name
            )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder in the layout of MMEdit: three records to train on, four to evaluate, one of each leaks."""
    train = [record("a"), record("b"), record("c", alt="a fox")]
    evaluation = [
        record("c", src="Where is it?"),  # a picture of training
        record("d"),  # question and answer of training
        record(
            "e", alt="a wolf", m_loc="val2014/a-other.jpg"
        ),  # a picture of training in M-Loc
        record("f", alt="a bear"),
    ]
    save(tmp_path, "vqa/vqa_train.json", train)
    save(tmp_path, "vqa/vqa_eval.json", evaluation)
    draw(tmp_path / "images", train + evaluation)
    return tmp_path


def read(
    name: str, root: Path, problems: list[str] | None = None, **options: object
) -> list[EditCase]:
    """All cases of a split, whether their pictures are there or not."""
    dataset, split = find_dataset(name)
    found: list[str] = [] if problems is None else problems
    cases = list(
        dataset.cases(dataset.split(split), DataOptions(root, **options), found)
    )
    assert problems is not None or not found
    return cases


def findings(
    name: str, root: Path, **options: object
) -> dict[str, tuple[bool | None, str]]:
    dataset, split = find_dataset(name)
    return {
        check: (ok, found)
        for check, ok, found in dataset.check(split, DataOptions(root, **options))
    }


# -- the published files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in ("evqa", "vlkeb:onehop") else pytest.mark.slow
        )
        for name in COUNTS
    ],
)
def test_every_record_is_read(annotations, name):
    cases = read(name, annotations)
    requests = {case.request.image for case in cases}
    local = {query.image for query in audit.probes(cases, "locality.image")}
    assert (len(cases), len(requests), len(local), len(audit.images(cases))) == COUNTS[
        name
    ]
    assert len({case.uid for case in cases}) == len(cases)
    columns = Counter(column for case in cases for column, _ in case.columns())
    assert set(columns.values()) == {len(cases)}
    assert len(columns) == 5 + (name == "vlkeb:onehop")
    assert all(
        query.prompt.strip() and query.target.strip()
        for c in cases
        for _, qs in c.columns()
        for query in qs
    )


def test_the_first_record_of_each_is_asked_as_published(annotations):
    first = read("evqa", annotations)[0]
    assert (first.request.prompt, first.request.target) == (
        "How many tennis balls are in the picture? The answer is:",
        "2",
    )
    assert first.place.endswith("vqa_eval.json:2")
    assert [first.locality[k][0].prompt[-14:] for k in ("text", "image")] == [
        "have on trade?",
        "The answer is:",
    ]
    assert first.locality["text"][0].image is None
    caption = read("eic", annotations)[0]
    assert (caption.request.prompt, caption.generality["text"][0].prompt) == (
        "a photo of",
        "a photograph of",
    )
    city = read("vlkeb", annotations)[0]
    assert city.request.prompt == "What city in Illinois is depicted in the image?"
    assert city.request.target == "Kankakee"


def test_the_hop_is_asked_about_the_edited_picture_and_its_fact_edited_in_text(
    annotations,
):
    hops, edits = (
        read("vlkeb:onehop", annotations),
        read("vlkeb:onehop-edits", annotations),
    )
    (asked,) = hops[0].portability["1-hop"]
    assert asked == Query(
        "What is the time zone of the location shown in the picture?",
        "Central Time Zone",
        hops[0].request.image,
    )
    assert len(edits) == 2 * len(hops)
    assert edits[0].portability == hops[0].portability
    assert edits[1].request == Query(
        "What timezone does Fort Smith, Arkansas follow?", "Central Time Zone"
    )
    assert [(case.uid, case.type) for case in edits[:3]] == [
        ("onehop-edits-0", ""),
        ("onehop-edits-0-fact0", "fact"),
        ("onehop-edits-1", ""),
    ]


LEAKS = {
    "evqa": {
        "train file": "6,345 records, the published copy",
        "eval file": "2,093 records, the published copy",
        "train duplicates": "2 edits",
        "eval duplicates": "1 edit repeats",
        "eval contradictions": "0 edits",
        "eval same picture": "1,154 of 2,093",
        "eval same question": "254 of 2,093",
        "train M-Loc pictures": "512 of 6,345",
        "eval M-Loc pictures": "56 of 2,093",
        "eval answers": "1.3 words; 79.6% are one word, 13.8% yes or no; the 10 commonest cover 27.8%",
        "train quotation marks": "1,686 of 6,345",
        "eval quotation marks": "562 of 2,093",
        "train not rephrased": "117 of 6,345",
        "eval not rephrased": "45 of 2,093",
        "leak train-eval: edited picture": "1,380 of 2,093 occur in training (845 distinct)",
        "leak train-eval: question": "460 of 2,093",
        "leak train-eval: question and answer": "77 of 2,093",
        "leak train-eval: question and picture": "0 of 2,093",
        "leak train-eval: M-Loc pairs": "2,093 of 2,093",
        "leak train-eval: T-Loc questions": "0 of 2,093",
        "eval clean list": "610 of 2,093 cases, 610 without M-Loc",
        "images": "16,911 of 16,911 images are missing",
    },
    "eic": {
        "eval answers": "10.3 words",
        "train blanks": "413 of 2,849",
        "eval blanks": "144 of 1,000",
        "leak train-eval: edited picture": "0 of 1,000",
        "leak train-eval: question": "1,000 of 1,000 occur in training (1 distinct)",
        "leak train-eval: M-Loc pairs": "1,000 of 1,000",
        "leak train-eval: M-Loc pairs and answers": "745 of 1,000",
        "eval clean list": "917 of 1,000 cases, 917 without M-Loc",
    },
    "vlkeb": {
        "onehop file": "1,278 records, the published copy",
        "multihop file": "eval_multihop.json is not there",
        "eval same question": "1,962 of 3,174",
        "eval told answers": "13.0%",
        "leak train-eval: edited picture": "2 of 3,174",
        "leak train-eval: question and picture": "2 of 3,174",
        "leak train-eval: question and answer": "1,173 of 3,174",
        "leak train-eval: M-Gen pictures": "785 of 3,174",
        "leak train-eval: M-Loc pairs": "2,071 of 3,174 occur in training (1,100 distinct)",
        "eval clean list": "2,001 of 3,174 cases, 1,232 without M-Loc",
        "images": "18,434 of 18,434 images are missing",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAKS)
def test_the_audit_reproduces_the_known_counts(annotations, name, tmp_path):
    found = findings(name, annotations, images=tmp_path)
    for check, counts in LEAKS[name].items():
        assert counts in found[check][1], check
    wrong = {check for check, (ok, _) in found.items() if ok is False}
    assert wrong == {"images"}


@pytest.mark.slow
def test_the_clean_lists_are_clean(annotations):
    from mmedit_cli.knowledge.data.shared.selection import read_subset, select

    for name in ("evqa", "eic", "vlkeb"):
        findings(f"{name}:eval", annotations, images=annotations)
        dataset = find_dataset(name)[0]
        kept = read_subset(dataset.subset("eval", DataOptions(annotations)))
        cases = list(select(read(name, annotations), kept))
        assert len(cases) > 500
        train = read(f"{name}:train", annotations)
        assert not audit.images(train) & audit.images(cases)
        assert not {audit.fact(case.request) for case in train} & {
            audit.fact(case.request) for case in cases
        }
        assert all(ok for label, ok, _ in audit.repeated(cases)), name


@pytest.mark.slow
def test_eval_runs_on_the_real_annotations(annotations, cli, tmp_path):
    images = tmp_path / "stand-ins"
    draw(
        images,
        json.loads((annotations / "vqa/vqa_eval.json").read_text(encoding="utf-8"))[
            :12
        ],
    )
    missing = 5517 - sum(path.is_file() for path in images.rglob("*"))
    words = (
        "eval",
        "ft",
        "--model",
        "tiny-blip2",
        "--data",
        "evqa",
        "--root",
        annotations,
        "--images",
        images,
    )
    words = (*words, "--set", "steps=1", "--sequential", 12, "--skip-long", "--json")
    code, text, err = cli(*words, "--limit", 12)
    assert code == 0, err
    report = json.loads(text)
    assert report["data"]["cases"] == report["milestones"][-1]["cases"] == 12
    assert report["data"]["template"] == "liveedit"
    code, _, err = cli(*words)
    assert code == 2
    assert f"{missing:,} of 5,517 images are missing; the first: " in err
    assert (
        f"hint: expected as {images}/val2014/COCO_val2014_000000451435.jpg; --images FOLDER"
        in err
    )
    code, text, err = cli(*words, "--skip-missing")
    assert code == 0, err
    report = json.loads(text)
    assert report["data"]["skipped"]["cases"] == 2093 - report["data"]["cases"]
    assert report["data"]["skipped"]["missing_images"] == missing


# -- a small folder -----------------------------------------------------------------------------------------------


def test_the_templates(small):
    def asked(**options: str) -> list[tuple[str, str]]:
        case = read("evqa", small, **options)[1]
        queries = [
            queries[0]
            for column, queries in case.columns()
            if column != "generality.image"
        ]
        return [(query.prompt, query.target) for query in queries]

    assert asked() == asked(template="liveedit")
    assert asked(template="liveedit") == [
        ("What is it? The answer is:", "a lynx\n"),
        ('"Which thing is it?" The answer is:', "a lynx\n"),
        ("nq question: who wrote it?", "Ada"),
        ("What sport is it? The answer is:", "golf"),
    ]
    assert [prompt for prompt, _ in asked(template="easyedit")] == [
        "Question: What is it? Short answer:",
        'Question: "Which thing is it?" Short answer:',
        "nq question: who wrote it",
        "Question: What sport is it? Short answer:",
    ]
    assert asked(template="verbatim")[:2] == [
        ("What is it?", "a lynx\n"),
        ('"Which thing is it?"', "a lynx\n"),
    ]
    assert asked(template="plain") == [
        ("What is it?", "a lynx"),
        ("Which thing is it?", "a lynx"),
        ("who wrote it?", "Ada"),
        ("What sport is it?", "golf"),
    ]
    chat = read("evqa", small, template="chat")[1]
    assert (
        chat.request.prompt
        == "What is it?\nAnswer the question using a single word or phrase."
    )
    assert all(query.chat for _, queries in chat.columns() for query in queries)
    with pytest.raises(
        DataError, match=r"evqa has no such template \(did you mean plain\?\)"
    ):
        read("evqa", small, template="plian")


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (
            '"How many?"\n\nRewritten as:\n"What is the quantity?"',
            "What is the quantity?",
        ),
        ('"Are they lit?" can be rewritten as "Are they aglow?"', "Are they aglow?"),
        ('Rewritten question: "What dishes are these?"', "What dishes are these?"),
        (
            'What does it mean when it says "OPEN"?',
            'What does it mean when it says "OPEN"?',
        ),
        ('"Tell me"', "Tell me"),
        ('"', '"'),
        ("nq question: who wrote it", "who wrote it"),
    ],
)
def test_tidy_keeps_the_question_alone(text, question):
    assert tidy(text) == question


def test_the_files_are_found_in_the_folders_of_the_releases(small, tmp_path):
    expected = [case.request for case in load_cases("evqa", options=DataOptions(small))]
    for folder in ("easy-edit-mm", "editing-data"):
        moved = tmp_path / "elsewhere" / folder
        shutil.copytree(small / "vqa", moved / "vqa")
        with pytest.raises(DataError, match="no such image"):
            load_cases("evqa", options=DataOptions(moved.parent))
        options = DataOptions(moved.parent, images=small)
        assert [
            case.request for case in load_cases("evqa", options=options)
        ] == expected
        assert load_cases(
            "evqa", options=DataOptions(moved, images=small / "images")
        ) == load_cases("evqa", options=options)
        shutil.rmtree(moved)


def test_what_was_downloaded_is_found_without_a_root(small, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(small / "vqa", home / "mmedit-data/vqa")
    shutil.copytree(small / "images", home / "mmedit-data", dirs_exist_ok=True)
    monkeypatch.setenv("MMEDIT_DATA", str(home))
    assert len(load_cases("evqa")) == 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"alt": " "}, "alt: must be a text that is not empty"),
        ({"m_loc_a": 3}, "m_loc_a: must be a text that is not empty"),
        (
            {"image": "../a.jpg"},
            "image: '../a.jpg' lies outside the folder of the pictures",
        ),
        (
            {"image_rephrase": "/etc/passwd"},
            "image_rephrase: '/etc/passwd' lies outside",
        ),
    ],
)
def test_a_malformed_record_is_named_and_the_others_are_not_lost(
    small, cli, change, problem
):
    save(
        small,
        "vqa/vqa_eval.json",
        [record("d"), record("e", **change), {"src": "What?"}, 3],
    )
    place = small / "vqa/vqa_eval.json"
    with pytest.raises(DataError) as caught:
        load_cases("evqa", options=DataOptions(small))
    first, second, third = caught.value.problems
    assert f"{place}:15: {problem}" in first
    assert second == f"{place}:28: alt is missing"
    assert third == f"{place}:31: must be an object with keys"
    assert (
        "a record of evqa:eval is an object with src, alt, rephrase"
        in caught.value.hint
    )
    assert "`request`" not in caught.value.hint
    assert len(read("evqa", small, problems=[])) == 1
    code, text, _ = cli("doctor", "evqa", "--root", small, "--json")
    rows = [
        (row["ok"], row["found"])
        for row in json.loads(text)
        if row["check"] == "eval record"
    ]
    assert code == 1
    assert rows == [(False, line) for line in caught.value.problems]
    save(small, "vqa/vqa_eval.json", [record("d")])
    (place).write_bytes(place.read_bytes()[:200])
    with pytest.raises(
        DataError, match=r"vqa_eval.json:\d+: not valid JSON .*is the file cut off\?"
    ):
        load_cases("evqa", options=DataOptions(small))


def test_doctor_writes_the_list_that_subset_clean_uses(small, cli):
    words = (
        "eval",
        "ft",
        "--model",
        "tiny-llava",
        "--set",
        "steps=1",
        "--data",
        "evqa",
        "--root",
        small,
        "--json",
    )
    code, _, err = cli(*words, "--subset", "clean")
    assert (
        code,
        f"hint: `mmedit doctor evqa:eval --root {small}` writes it" in err,
    ) == (2, True)
    code, text, _ = cli("doctor", "evqa", "--root", small, "--json")
    found = {row["check"]: row for row in json.loads(text)}
    assert code == 1, "these are not the published copies"
    assert found["eval file"]["found"].startswith(
        "vqa/vqa_eval.json: 4 records, not the published copy"
    )
    assert found["leak train-eval: edited picture"] == {
        "check": "leak train-eval: edited picture",
        "ok": None,
        "found": "1 of 4 occur in training (1 distinct)",
    }
    assert found["images"]["found"] == "17 distinct, 0 unusable"
    assert found["eval clean list"]["found"].startswith(
        "2 of 4 cases, 2 without T-Loc, 1 without M-Loc: "
    )
    code, text, err = cli(*words, "--subset", "clean")
    report = json.loads(text)
    assert (code, report["data"]["subset"], report["data"]["cases"]) == (0, "clean", 2)
    scores = report["milestones"][0]["scores"]["ar"]
    assert (scores["reliability"]["n"], scores["locality.image"]["n"]) == (2, 1)
    assert "locality.text" not in scores, (
        "every record of the made-up data asks the same there"
    )
    assert (
        "2 cases, template liveedit, subset clean"
        in cli(*words[:-1], "--subset", "clean")[1]
    )
    assert (
        cli("eval", "ft", "--data", "evqa:train", "--root", small, "--subset", "clean")[
            0
        ]
        == 2
    )
    save(small, "vqa/vqa_train.json", [record("a")])  # other files, another list
    assert cli(*words, "--subset", "clean")[0] == 2


def test_a_missing_rephrase_folder_costs_its_column_alone(small):
    shutil.rmtree(small / "images/val2014_image_rephrase")
    with pytest.raises(
        DataError, match=r"val2014_image_rephrase/c\.png: no such image"
    ):
        load_cases("evqa", options=DataOptions(small))
    data = read_data("evqa", options=DataOptions(small, skip_missing=True))
    assert [set(case.generality) for case in data.cases] == [{"text"}] * 4
    assert data.selection["skipped"]["queries"] == {"generality.image": 4}


def test_a_limit_looks_at_no_more_pictures_than_it_needs(small):
    (small / "images/val2014/f.jpg").unlink()
    assert len(load_cases("evqa", limit=3, options=DataOptions(small))) == 3


def test_vlkeb_hops(tmp_path):
    hops = [
        {
            "port_type": "1-hop",
            "Q&A": {"Question": "In which country is it?", "Answer": "Peru"},
        },
        {
            "port_type": "3-hop",
            "Q&A": {"Question": "Which language is it?", "Answer": "Spanish"},
        },
    ]
    records = [
        record("a", port_new=hops),
        record("b"),
        record("c", port_new=[{"port_type": "2-hop"}]),
    ]
    save(tmp_path, "VLKEB/eval_multihop.json", records)
    problems: list[str] = []
    first, second = read("vlkeb:multihop", tmp_path, problems)
    assert {name: queries[0].target for name, queries in first.portability.items()} == {
        "1-hop": "Peru",
        "3-hop": "Spanish",
    }
    assert (
        first.portability["3-hop"][0].image
        == tmp_path / "VLKEB/VLKEB_images/val2014/a.jpg"
    )
    assert second.portability == {}
    assert [problem.partition(": ")[2] for problem in problems] == [
        "must be an object with keys"
    ]
    (tmp_path / "VLKEB/mmkb_images").mkdir()
    assert (
        read("vlkeb:multihop", tmp_path, [])[0].request.image
        == tmp_path / "VLKEB/mmkb_images/val2014/a.jpg"
    )


def test_absent_files_are_explained(small, tmp_path):
    with pytest.raises(DataError, match="none of the files of evqa is there") as caught:
        load_cases("evqa")
    assert (
        "--root FOLDER says where vqa/vqa_train.json, vqa/vqa_eval.json lie"
        in caught.value.hint
    )
    with pytest.raises(DataError, match="none of the files of eic is there"):
        load_cases("eic", options=DataOptions(small))
    (small / "vqa/vqa_train.json").unlink()
    with pytest.raises(DataError, match=r"vqa_train\.json: not there"):
        load_cases("evqa:train", options=DataOptions(small))
    found = findings("evqa", small)
    assert found["train file"] == (None, "vqa/vqa_train.json is not there")
    assert "eval clean list" not in found
