"""The embedded data set keeps its promises, and its audit finds what it is there to find."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.data.emojikb import SPLITS, audit, queries
from mmedit_cli.reading import read_text

DATA = ROOT / "data" / "emojikb"
TYPES = {
    "name",
    "kind",
    "category",
    "background",
    "country",
    "capital",
    "continent",
    "currency",
    "language",
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(path).splitlines()]


@pytest.fixture(scope="module")
def concepts() -> dict[str, dict]:
    return {concept["id"]: concept for concept in lines(DATA / "concepts.jsonl.gz")}


@pytest.fixture(scope="module")
def cases() -> dict[str, list[dict]]:
    return {split: lines(DATA / f"{split}.jsonl.gz") for split in SPLITS}


@pytest.fixture(scope="module")
def report() -> dict:
    return audit(DATA)


def test_the_shipped_data_has_no_problem(report):
    assert report["problems"] == []
    assert set(report["leaks"]) == {
        f"{a}-{b}"
        for a in ("train", "val")
        for b in SPLITS
        if SPLITS.index(b) > SPLITS.index(a)
    }
    assert not any(
        items for shared in report["leaks"].values() for items in shared.values()
    )


def test_the_counts_are_as_promised(report):
    assert report["concepts"] >= 800
    assert report["flags"] >= 190
    assert report["picture_bytes"] <= 10_000_000
    cases = {split: report["splits"][split]["cases"] for split in SPLITS}
    assert cases["train"] >= 3000
    assert cases["val"] >= 300
    assert cases["eval"] >= 1200
    assert report["splits"]["eval"]["edited_facts"] == cases["eval"], (
        "one fact is edited twice in the eval stream"
    )
    assert cases["corrections"] >= 100
    for split in SPLITS[:3]:
        assert set(report["splits"][split]["types"]) == TYPES
    assert set(report["splits"]["corrections"]["types"]) == TYPES - {"background"}


def test_the_strict_reader_takes_every_case(cases):
    for split in SPLITS:
        assert len(load_cases(DATA / f"{split}.jsonl.gz")) == len(cases[split])


def test_every_picture_is_64_by_64_with_alpha(concepts):
    drawn = {c["id"]: list(c["artists"]) for c in concepts.values()}
    for record in lines(DATA / "drawings.jsonl.gz"):
        drawn[record["id"]] += record["artists"]
    wanted = {f"{artist}/{c}.png" for c, artists in drawn.items() for artist in artists}
    found = {path.relative_to(DATA).as_posix() for path in DATA.glob("*/*.png")}
    assert found == wanted
    for name in sorted(found):
        with Image.open(DATA / name) as picture:
            assert picture.size == (64, 64)
            alpha = picture.convert("RGBA").getchannel("A").getextrema()
            assert alpha[0] < 255, f"{name} has no transparent part"
            assert alpha[1] > 200, f"{name} is empty"


def test_a_case_asks_what_the_readme_says(cases):
    for case in cases["eval"] + cases["val"] + cases["train"]:
        request, relation = case["request"], case["type"]
        assert (
            len(
                {query["prompt"] for query in case["generality"]["text"]}
                - {request["prompt"]}
            )
            >= 2
        )
        artists = {
            query["image"].split("/")[0] for query in case["generality"]["image"]
        }
        assert len(artists - {request["image"].split("/")[0]}) >= 2
        assert {Path(query["image"]).stem for query in case["generality"]["image"]} == {
            Path(request["image"]).stem
        }
        assert set(case["locality"]) == {"text", "near", "same_image", "far"}
        assert all(
            query["image"] == request["image"]
            for query in case["locality"]["same_image"]
        )
        assert all(
            Path(q["image"]).stem != Path(request["image"]).stem
            for name in ("near", "far")
            for q in case["locality"][name]
        )
        probes = [
            query
            for name in ("near", "far", "text")
            for query in case["locality"][name]
        ]
        assert request["target"] not in {query["target"] for query in probes}
        assert "portability" not in case or relation in ("name", "country")


def test_targets_are_false_and_every_other_answer_is_true(cases, concepts):
    colours = {
        code: name
        for name, code in json.loads((DATA / "backgrounds.json").read_text()).items()
    }
    templates = json.loads((DATA / "templates.json").read_text())
    types = {text: name for name, forms in templates.items() for text in forms["image"]}
    said = {
        template.format(**fact): fact
        for fact in lines(DATA / "facts.jsonl.gz")
        for template in templates[fact["type"]].get("text", ())
        if "it" in fact or "city" in fact
    }

    def truth(query: dict) -> str:
        if "image" not in query:
            return said[query["prompt"]]["answer"]
        relation = types[query["prompt"]]
        if relation == "background":
            return colours[query["background"]]
        return concepts[Path(query["image"]).stem][relation]

    for split, records in cases.items():
        for case in records:
            right = truth(case["request"]) == case["request"]["target"]
            assert right == (split == "corrections"), case["id"]
            for column, query in queries(case):
                if column.startswith("locality.text"):
                    assert concepts[said[query["prompt"]]["concept"]]["role"] == "probe"
                if column.startswith("locality"):
                    assert query["target"] == truth(query), (case["id"], column)
                if "image" in query:
                    concept = concepts[Path(query["image"]).stem]
                    assert concept["split"] == split.replace("corrections", "eval")
                    edited = column in (
                        "request",
                        "locality.same_image",
                    ) or not column.startswith("locality")
                    assert concept["role"] == ("edit" if edited else "probe"), (
                        case["id"],
                        column,
                    )


def test_facts_are_single_and_plain(concepts):
    flags = [concept for concept in concepts.values() if "country" in concept]
    for name in ("country", "capital"):
        assert max(Counter(flag[name] for flag in flags if flag[name]).values()) == 1
    assert {flag["continent"] for flag in flags} <= {
        "Africa",
        "Asia",
        "Europe",
        "North America",
        "South America",
        "Oceania",
        None,
    }
    peru = next(flag for flag in flags if flag["country"] == "Peru")
    assert [peru[key] for key in ("capital", "continent", "currency", "language")] == [
        "Lima",
        "South America",
        "Peruvian sol",
        "Spanish",
    ]
    assert all(
        str(value).isascii()
        for concept in concepts.values()
        for value in concept.values()
    )


def test_the_case_files_are_what_the_script_makes_of_the_concepts(
    concepts, cases, monkeypatch
):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    from emojikb_cases import Maker, facts

    assert facts(list(concepts.values())) == lines(DATA / "facts.jsonl.gz")
    assert Maker(list(concepts.values()), "eval").cases() == cases["eval"]


def test_corrections_teach_the_truth(concepts, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    from emojikb_cases import Maker

    mine = next(
        c
        for c in concepts.values()
        if c["split"] == "eval" and c["role"] == "edit" and c["kind"] == "fruit"
    )
    wrong = [
        {"picture": f"noto/{mine['id']}.png", "type": "name", "answer": answer}
        for answer in ("brick", "boot")
    ]
    wrong.append(
        {"picture": f"noto/{mine['id']}.png", "type": "kind", "answer": "Fruit"}
    )  # right after all
    wrong.append(
        {
            "picture": f"noto/{next(i for i, c in concepts.items() if c['split'] == 'train')}.png",
            "type": "name",
            "answer": "brick",
        }
    )  # another side
    (case,) = Maker(list(concepts.values()), "eval").corrections(wrong)
    assert case["request"]["target"] == mine["name"]
    assert case["id"] == f"correct-name-{mine['id']}-noto"
    assert set(case["locality"]) == {"text", "near", "same_image", "far"}


# ---------------------------------------------------------------------------------------------- planted faults


@pytest.fixture
def small(tmp_path, cases):
    """A sound folder with a few records of each side, and a way to write them back."""
    folder = tmp_path / "kb"
    folder.mkdir()
    records = {split: json.loads(json.dumps(cases[split][:6])) for split in SPLITS}
    for name in ("concepts.jsonl.gz", "templates.json"):
        shutil.copy(DATA / name, folder / name)
    for image in {
        query["image"]
        for side in records.values()
        for case in side
        for _, query in queries(case)
        if "image" in query
    }:
        (folder / image).parent.mkdir(exist_ok=True)
        shutil.copy(DATA / image, folder / image)

    def check() -> list[str]:
        for split, side in records.items():
            text = "".join(json.dumps(case) + "\n" for case in side)
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        return [
            problem
            for problem in audit(folder)["problems"]
            if not problem.startswith("files: manifest.json")
        ]

    return folder, records, check


def test_a_small_folder_is_sound(small):
    assert small[2]() == []


def test_a_shared_request_is_found(small):
    _, records, check = small
    records["eval"].append({**records["train"][0], "id": "smuggled"})
    found = "\n".join(check())
    for sort in ("concepts", "images", "requests", "locality"):
        assert f"leak train-eval: {sort}" in found


def test_a_picture_under_another_name_is_found(small):
    folder, records, check = small
    request = records["eval"][0]["request"]
    shutil.copy(
        folder / records["train"][0]["request"]["image"], folder / request["image"]
    )
    found = check()
    assert any(problem.startswith("leak train-eval: images") for problem in found)
    assert not any(problem.startswith("leak train-eval: concepts") for problem in found)


def test_a_shared_fact_without_a_picture_is_found(small):
    _, records, check = small
    fact = dict(records["train"][0]["locality"]["text"][0])
    records["val"][0]["locality"]["text"] = [{**fact, "prompt": fact["prompt"].upper()}]
    assert any("leak train-val: locality" in problem for problem in check())


def test_contradictions_duplicates_and_spoilt_probes_are_found(small):
    _, records, check = small
    first = records["eval"][0]
    other = json.loads(
        json.dumps(first).replace(f'"{first["request"]["target"]}"', '"something else"')
    )
    records["eval"].append(other)
    asked = {**first["request"], "target": "the truth"}
    records["eval"][1]["locality"]["near"] = [asked]
    found = "\n".join(check())
    assert "contradictions: eval.jsonl.gz:7" in found
    assert "spoilt probes: eval.jsonl.gz:2: locality.near" in found
    assert f"duplicates: {first['id']} stands 2 times" in found


def test_missing_and_altered_pictures_are_found(small):
    folder, records, check = small
    gone = records["val"][2]["request"]["image"]
    (folder / gone).unlink()
    assert any(
        "missing pictures: val.jsonl.gz:3: request" in problem for problem in check()
    )
    (folder / "manifest.json").write_text(
        json.dumps({"files": {gone: "0" * 64, "templates.json": "0" * 64}})
    )
    found = check()
    assert f"files: {gone} is missing" in found
    assert "files: templates.json has changed" in found
    assert "files: concepts.jsonl.gz is not in the manifest" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.pop("locality"), "no locality"),
        (
            lambda case: case["request"].pop("target"),
            "a query needs a prompt and a target",
        ),
        (lambda case: case["request"].update(colour="red"), "unknown keys ['colour']"),
        (lambda case: case["request"].update(background="blue"), "is no colour"),
        (lambda case: case["request"].pop("background"), "come together"),
        (
            lambda case: case["generality"]["text"][0].update(target="x"),
            "another answer",
        ),
        (lambda case: case.update(generality=[1]), "AttributeError"),
    ],
)
def test_malformed_records_are_named_with_their_line(small, change, message):
    _, records, check = small
    change(records["train"][4])
    found = [
        problem
        for problem in check()
        if problem.startswith("malformed: train.jsonl.gz:5")
    ]
    assert found
    assert any(message in problem for problem in found)
