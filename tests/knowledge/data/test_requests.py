"""Users' own facts from JSON, JSON lines and CSV: a bad line is named with its number, the good ones are right."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SHAPES
from PIL import Image

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.base import (
    DataOptions,
    fingerprint,
    load_cases,
    read_data,
)
from mmedit_cli.types import Query

RECORD = {"image": "a.png", "prompt": "Who is this?", "target": "Ada"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "own" / name)
    return tmp_path / "own"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def test_the_three_formats_say_the_same(folder):
    other = {
        **RECORD,
        "rephrases": ["Her name?", "Name her, please."],
        "image_rephrase": "b.png",
        "id": "ada",
    }
    records = [other, {"prompt": 'Say "hi", twice', "target": "hi\nhi"}]
    table = (
        "id;image;prompt;target;rephrase1;rephrase2;image_rephrase\r\n"
        "ada;a.png;Who is this?;Ada;Her name?;Name her, please.;b.png\r\n"
        ';;"Say ""hi"", twice";"hi\nhi";;;\r\n'
    )
    files = [
        write(folder, "facts.json", json.dumps(records, indent=2)),
        write(folder, "facts.jsonl", "\n".join(map(json.dumps, records))),
        write(folder, "facts.csv", "\ufeff" + table),
    ]
    for file in files:
        ada, hi = load_cases(file)
        who, image = "Who is this?", folder / "a.png"
        assert (ada.uid, ada.request) == ("ada", Query(who, "Ada", image))
        assert ada.generality == {
            "text": (
                Query("Her name?", "Ada", image),
                Query("Name her, please.", "Ada", image),
            ),
            "image": (Query(who, "Ada", folder / "b.png"),),
        }
        assert (hi.uid, hi.request, hi.generality) == (
            "2",
            Query('Say "hi", twice', "hi\nhi"),
            {},
        )
    assert [load_cases(file)[1].place.rpartition(":")[2] for file in files] == [
        "13",
        "2",
        "3",
    ]
    assert read_data(files[2]).name == "facts"


def test_the_examples_of_the_documentation(folder):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table, record = (
        page.partition(f"```{kind}\n")[2].partition("```")[0]
        for kind in ("csv", "json")
    )
    Image.new("RGB", (4, 4)).save(folder / "cat.png")
    cat, dune = load_cases(write(folder, "facts.csv", table))
    assert (dune.request.image, dune.request.target) == (None, "Frank Herbert")
    assert [len(queries) for queries in cat.generality.values()] == [2]
    (same,) = load_cases(write(folder, "facts.jsonl", record))
    assert (same.request, same.generality) == (cat.request, cat.generality)


def test_cases_may_stand_in_an_array_too(folder):
    records = [
        json.loads(line) for line in (SHAPES / "cases.jsonl").read_text().splitlines()
    ]
    cases = load_cases(
        write(folder, "cases.json", json.dumps(records)),
        options=DataOptions(images=SHAPES),
    )
    expected = load_cases(SHAPES)
    assert [(case.uid, case.request, case.locality) for case in cases] == [
        (case.uid, case.request, case.locality) for case in expected
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "image,prompt,target\na.png,Who?,Ada\n,Who?\n",
            r"facts.csv:3: target is missing",
        ),
        (
            "image,prompt,target\na.png,Who, really?,Ada\n",
            r"facts.csv:2: more cells than the header has columns",
        ),
        (
            'image,prompt,target\na.png,"Who?\nReally?",Ada\nb.png,,Bea\n',
            r"facts.csv:4: prompt is missing",
        ),
        (
            'image,prompt,target\na.png,Who?,Ada\nb.png,"Who?,Bea\n',
            r"facts.csv:3: not valid CSV",
        ),
        (
            "image,promt,target\na.png,Who?,Ada\n",
            r"facts.csv:2: unknown key 'promt' \(did you mean prompt\?\)",
        ),
        (
            "image,prompt,target,target\na.png,Who?,Ada,Bea\n",
            r"facts.csv:1: column target stands twice",
        ),
        (
            "image,prompt,target\nc.png,Who?,Ada\n",
            r"facts.csv:2: request.image: .*c.png: no such image",
        ),
        (
            "image,prompt,target\n" + "c" * 300 + ",Who?,Ada\n",
            r"facts.csv:2: request.image: .*: no such image",
        ),
        (
            "image,prompt,target\n../x.png,Who?,Ada\n",
            r"facts.csv:2: image: ../x.png lies outside the folder",
        ),
        (
            "image,prompt,target,id\na.png,Who?,Ada,1\nb.png,Who?,Bea,1\n",
            r"facts.csv:3: id: '1' stands in line 2",
        ),
        ("image,prompt,target\n", "no cases in it"),
        ("", "no cases in it"),
    ],
)
def test_a_bad_row_is_named_with_its_line(folder, text, problem):
    with pytest.raises(DataError, match=problem):
        load_cases(write(folder, "facts.csv", text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '[\n {"prompt": "a", "target": "b"},\n {"prompt": "a"}\n]',
            "facts.json:3: target is missing",
        ),
        (
            '[\n {"prompt": "a", "target": "b"},\n {"prompt": "a", "tar',
            "facts.json:3: not valid JSON",
        ),
        (
            '[{"prompt": "a", "target": "b"}\n{"prompt": "a"}]',
            "facts.json:1: not valid JSON .no comma or bracket",
        ),
        ('{"prompt": "a", "target": "b"}', "facts.json: must be an array of records"),
        (
            '[{"prompt": "a", "target": "b", "rephrases": [3]}]',
            r"facts.json:1: rephrases\[0\].prompt: must be a text",
        ),
        (
            '[{"prompt": "a", "target": "b", "image": "a.png\\u0000"}]',
            "facts.json:1: image: must be a path",
        ),
        ("[]", "no cases in it"),
    ],
)
def test_a_bad_record_is_named_with_its_line(folder, text, problem):
    with pytest.raises(DataError, match=problem):
        load_cases(write(folder, "facts.json", text))


def test_images_may_lie_elsewhere_and_missing_ones_be_skipped(folder, tmp_path):
    elsewhere = tmp_path / "pictures"
    elsewhere.mkdir()
    (folder / "a.png").rename(elsewhere / "a.png")
    file = write(
        folder,
        "facts.csv",
        "image,prompt,target,image_rephrase\na.png,Who?,Ada,b.png\nb.png,Who?,Bea,\n",
    )
    with pytest.raises(DataError, match=r"b\.png: no such image"):
        load_cases(file, options=DataOptions(images=elsewhere))
    data = read_data(file, options=DataOptions(images=elsewhere, skip_missing=True))
    (ada,) = data.cases
    assert (ada.request.image, ada.generality) == (elsewhere / "a.png", {})
    assert data.selection == {
        "skipped": {
            "cases": 1,
            "queries": {"generality.image": 1},
            "missing_images": 1,
            "images": 2,
        }
    }


def test_own_facts_are_asked_as_written_or_as_a_chat(folder):
    file = write(folder, "facts.json", json.dumps([RECORD]))
    assert not load_cases(file)[0].request.chat
    assert load_cases(file, options=DataOptions(template="chat"))[0].request.chat
    with pytest.raises(DataError, match="--template liveedit"):
        load_cases(file, options=DataOptions(template="liveedit"))


def test_a_list_of_cases(folder):
    file = write(
        folder, "facts.csv", "id,prompt,target,rephrase\na,Who?,Ada,Her?\nb,Why?,Bea,\n"
    )
    chosen = write(
        folder, "list.json", json.dumps({"cases": {"a": ["generality.text"]}})
    )
    data = read_data(file, options=DataOptions(subset=str(chosen)))
    assert [(case.uid, case.generality) for case in data.cases] == [("a", {})]
    assert data.selection == {"subset": "list.json"}
    for content, problem in (
        ('{"cases": {"c": []}}', r"1 of its cases are not in the data \(c\)"),
        ("[", "not valid JSON"),
    ):
        with pytest.raises(DataError, match=problem):
            read_data(
                file,
                options=DataOptions(subset=str(write(folder, "list.json", content))),
            )
    with pytest.raises(DataError, match="--subset clean"):
        read_data(file, options=DataOptions(subset="clean"))
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        read_data(file, options=DataOptions(subset="nowhere.json"))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("facts.csv", "Question,Answer,picture"),
        ("facts.tsv", "query\tnew_answer\timage_path"),
        ("facts.tsv", "Prompt\ttarget_new\tIMAGE"),
    ],
)
def test_other_names_of_columns_mean_the_same(folder, name, header):
    mark = "\t" if name == "facts.tsv" else ","
    row = mark.join(("Who is this?", "Ada", "a.png"))
    (case,) = load_cases(write(folder, name, f"{header}\n{row}\n"))
    assert case.request == Query("Who is this?", "Ada", folder / "a.png")


def test_a_tsv_may_have_commas_in_its_texts(folder):
    text = "prompt\ttarget\nWho, where, and why?\tAda, here\n"
    (case,) = load_cases(write(folder, "facts.tsv", text))
    assert case.request == Query("Who, where, and why?", "Ada, here")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "question,query,answer\nWho?,What?,Ada\n",
            "facts.csv:2: question and query both say prompt",
        ),
        (
            "question,answer,image\nWho?,Ada,https://a.org/b.png\n",
            "facts.csv:2: image: https://a.org/b.png is an address",
        ),
    ],
)
def test_names_and_pictures_that_cannot_be_used(folder, text, problem):
    with pytest.raises(DataError, match=problem):
        load_cases(write(folder, "facts.csv", text))


def test_another_kind_of_file_is_refused(folder):
    with pytest.raises(DataError, match=r"not one of .jsonl, .json, .csv, .tsv"):
        load_cases(write(folder, "facts.xlsx", "PK"))
    (folder / "facts.csv").write_bytes(b"prompt,target\nWho?,Ren\xe9\n")
    with pytest.raises(
        DataError, match=r"facts.csv:2: not UTF-8 \(byte 8 of the line\)"
    ):
        load_cases(folder / "facts.csv")


def test_gzipped_files_are_read_and_broken_ones_refused(folder, tmp_path):
    plain = write(folder, "facts.csv", "image,prompt,target\na.png,Who?,Ada\n")
    packed = folder / "more.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    data = read_data(packed)
    assert (data.name, [case.request for case in data.cases]) == (
        "more",
        [case.request for case in load_cases(plain)],
    )
    assert data.cases[0].place == f"{packed}:2"
    cases = tmp_path / "cases"
    shutil.copytree(SHAPES, cases)
    (cases / "cases.jsonl.gz").write_bytes(
        gzip.compress((cases / "cases.jsonl").read_bytes())
    )
    (cases / "cases.jsonl").unlink()
    assert read_data(cases).name == "cases"
    assert fingerprint(load_cases(cases)) == fingerprint(load_cases(SHAPES))
    whole = packed.read_bytes()
    for broken in (whole[:-9], plain.read_bytes(), whole[:15] + b"\xff" + whole[16:]):
        packed.write_bytes(broken)
        with pytest.raises(
            DataError, match=r"more.csv.gz(: not a whole gzip file|:1: not UTF-8)"
        ):
            load_cases(packed)


def test_eval_and_doctor_take_a_table(cli, folder):
    file = write(
        folder,
        "facts.csv",
        "image,prompt,target,rephrase\na.png,Who?,Ada,Her?\nb.png,Who?,Bea,\n",
    )
    words = (
        "eval",
        "ft",
        "--model",
        "tiny-blip2",
        "--set",
        "steps=1",
        "--data",
        file,
        "--sequential",
        2,
        "--json",
    )
    code, text, _ = cli(*words)
    report = json.loads(text)
    assert (code, report["data"]["name"], report["data"]["cases"]) == (0, "facts", 2)
    assert set(report["milestones"][0]["scores"]["ar"]) == {
        "reliability",
        "generality.text",
        "scope",
    }
    assert report["milestones"][0]["scores"]["ar"]["generality.text"]["n"] == 1
    assert cli("doctor", file)[0] == 0
    write(
        folder,
        "facts.csv",
        "image,prompt,target\na.png,Who?,Ada\na.png,Who?,Bea\na.png,Who?,Ada\n",
    )
    code, text, _ = cli("doctor", file, "--json")
    found = {row["check"]: row for row in json.loads(text)}
    assert code == 1
    assert found["contradictions"]["found"].endswith(
        "1 edit contradicts an earlier one: facts.csv:3 and facts.csv:2"
    )
    assert found["duplicates"]["found"].endswith(
        "1 edit repeats an earlier one: facts.csv:4 and facts.csv:2"
    )
    write(folder, "facts.csv", "image,prompt,target\na.png,Who?\n")
    code, text, _ = cli("doctor", file)
    assert (code, "facts.csv:2: target is missing" in " ".join(text.split())) == (
        1,
        True,
    )


def test_queries_too_long_for_the_model_can_be_skipped(cli, folder):
    long = "why " * 200
    write(
        folder,
        "facts.csv",
        f"prompt,target,rephrase\nWho?,Ada,Her?\nWhat?,Bea,{long}\n{long},Cec,\n",
    )
    words = (
        "eval",
        "ft",
        "--model",
        "tiny-blip2",
        "--set",
        "steps=1",
        "--data",
        folder / "facts.csv",
    )
    code, _, err = cli(*words)
    assert code == 2
    assert "facts.csv:3: 2: generality.text: 'why why" in err
    assert "hint: --skip-long" in err
    code, text, _ = cli(*words, "--skip-long")
    assert code == 0
    assert (
        "skipped: 2 queries are too long for the model, and with them 1 cases" in text
    )
    report = json.loads(cli(*words, "--skip-long", "--json")[1])
    assert report["data"]["too_long"] == {"cases": 1, "queries": 2}
    assert report["milestones"][0]["cases"] == 2


def test_other_columns_are_named_and_not_read(cli, folder, capfd):
    table = (
        "image,prompt,target,Subject,image_id\na.png,Who?,Ada,x,7\nb.png,Who?,Bea,,\n"
    )
    ada, bea = load_cases(write(folder, "facts.csv", table))
    assert (ada.request.target, bea.request.target) == ("Ada", "Bea")
    (said,) = capfd.readouterr().err.splitlines()
    assert said.endswith("not read, as they mean nothing here: Subject, image_id")
    code, found, _ = cli("doctor", folder / "facts.csv", "--json")
    columns = {line["check"]: line for line in json.loads(found)}["columns"]
    assert code == 0
    assert (columns["ok"], columns["found"]) == (None, said.partition("csv: ")[2])
    many = {f"more {i}": i for i in range(12)}
    load_cases(write(folder, "facts.json", json.dumps([{**RECORD, **many}])))
    assert capfd.readouterr().err.endswith("more 9, and 2 more\n")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tagret", "target"), ("imgae", "image"), ("answr", "answer"), ("questoin", 0)],
)
def test_a_misspelt_column_is_refused(folder, name, meant):
    record = json.dumps([{**RECORD, name: "x"}])
    with pytest.raises(DataError, match=f"did you mean {meant or 'question'}"):
        load_cases(write(folder, "facts.json", record))


def test_a_picture_may_be_named_by_its_whole_path(folder, tmp_path):
    inside = {**RECORD, "image": str(folder / "a.png")}
    (case,) = load_cases(write(folder, "facts.json", json.dumps([inside])))
    assert case.request.image == folder / "a.png"
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    for path in (tmp_path / "out.png", f"{folder}/../out.png"):
        outside = {**RECORD, "image": str(path)}
        with pytest.raises(DataError, match="lies outside the folder"):
            load_cases(write(folder, "facts.json", json.dumps([outside])))


EASYEDIT = {
    **{"src": "What is this?", "pred": "cat", "alt": "lynx"},
    **{"rephrase": "Which animal?", "image": "a.png", "image_rephrase": "b.png"},
    **{"loc": "nq question: who wrote dune", "loc_ans": "Frank Herbert"},
    **{"m_loc": "b.png", "m_loc_q": "What is that?", "m_loc_a": "dog"},
}


def test_the_json_of_easyedit_is_read(folder, capfd):
    short = {"src": "Who?", "alt": "Ada", "subject": "x", "image": "", "loc": None}
    file = write(folder, "vqa.json", json.dumps([EASYEDIT, short]))
    lynx, ada = load_cases(file)
    assert lynx.request == Query("What is this?", "lynx", folder / "a.png")
    assert lynx.generality == {
        "text": (Query("Which animal?", "lynx", folder / "a.png"),),
        "image": (Query("What is this?", "lynx", folder / "b.png"),),
    }
    assert lynx.locality == {
        "text": (Query("nq question: who wrote dune", "Frank Herbert"),),
        "image": (Query("What is that?", "dog", folder / "b.png"),),
    }
    assert (ada.uid, ada.request) == ("2", Query("Who?", "Ada"))
    assert not ada.generality
    assert not ada.locality
    assert capfd.readouterr().err.endswith("mean nothing here: subject\n")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"alt": ""}, "alt is missing"),
        ({"src": 3}, "src: must be a text that is not empty"),
        ({"loc_ans": ""}, "loc_ans is missing"),
        ({"m_loc": "../a.png"}, "m_loc: ../a.png lies outside the folder"),
        ({"image_rephrase": "c.png"}, "generality.image.image: .*: no such image"),
        ({"rephase": "Who?"}, r"unknown key 'rephase' \(did you mean rephrase\?\)"),
    ],
)
def test_what_is_wrong_with_a_record_of_easyedit(folder, change, problem):
    file = write(folder, "vqa.json", json.dumps([{**EASYEDIT, **change}]))
    with pytest.raises(DataError, match=f"vqa.json:1: {problem}"):
        load_cases(file)


def test_pictures_of_requests_may_lie_elsewhere(cli, folder, tmp_path):
    file = write(tmp_path, "vqa.json", json.dumps([EASYEDIT]))
    words = ("edit", "ft", "--model", "tiny-blip2", "--set", "steps=1")
    wanted = (*words, "--requests", file, "--into", tmp_path / "edits", "--json")
    code, _, said = cli(*wanted)
    assert code == 2, said
    assert "no such image" in said
    code, out, _ = cli(*wanted, "--images", folder)
    assert code in (0, 1)
    asked = [way["prompt"] for way in json.loads(out)["otherwise"]]
    assert asked == ["Which animal?", "What is this?"]
