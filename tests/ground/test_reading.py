"""The one reader: whatever is wrong with a file is one error with the file, the line and a way out."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tracemalloc

import pytest

from mmedit_cli import reading
from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.reading import Record


def refusal(read, *arguments, **settings) -> str:
    with pytest.raises(DataError) as caught:
        read(*arguments, **settings)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (
        ("fifo", "a pipe (FIFO)"),
        ("zero", "a device"),
        ("", "a folder"),
        ("nosuch", "no such file"),
    ):
        path = tmp_path / name
        for read in (
            reading.read_text,
            reading.read_bytes,
            reading.read_json,
            reading.read_yaml,
        ):
            assert said in refusal(read, path)
        for read in (
            reading.read_lines,
            reading.read_json_lines,
            lambda path: reading.read_csv(path, []),
        ):
            assert said in refusal(lambda path, read=read: list(read(path)), path)
    assert "cannot be read" in refusal(reading.read_text, tmp_path / "loop")
    assert "null" in refusal(reading.read_text, tmp_path / "a\0b")
    assert "cannot be read" in refusal(reading.read_text, tmp_path / ("a" * 300))


def test_sockets_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("sock")
        assert "is a socket" in refusal(reading.read_text, tmp_path / "sock")


def test_links_to_files_are_followed_and_packed_files_unpacked(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffgrün\r\n".encode())
    (tmp_path / "link").symlink_to("a.txt")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert reading.read_text(tmp_path / "link") == "grün\r\n"
    assert list(reading.read_lines(tmp_path / "link")) == [(1, "grün")]
    assert list(reading.read_lines(tmp_path / "a.txt.gz")) == [(1, "one"), (2, "two")]


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_LINE", 100)
    monkeypatch.setattr(reading, "LARGEST_DATA", 250)
    (tmp_path / "long").write_bytes(b"ok\n" + b"x" * 200)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress((b"x" * 90 + b"\n") * 10))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 5000)[:-9])
    assert ":2: a line longer" in refusal(
        lambda: list(reading.read_lines(tmp_path / "long"))
    )
    assert ":3: more than" in refusal(
        lambda: list(reading.read_lines(tmp_path / "bomb.gz"))
    )
    assert "not a whole gzip file" in refusal(reading.read_text, tmp_path / "cut.gz")
    assert "larger than" in refusal(reading.read_text, tmp_path / "long", limit=100)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    assert "larger than 48 MiB" in refusal(reading.read_text, tmp_path / "sparse")
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "a").write_bytes(b"fine\n\xff\n")
    assert "a:2: not UTF-8" in refusal(reading.read_text, tmp_path / "a")
    assert "a:2: not UTF-8" in refusal(lambda: list(reading.read_lines(tmp_path / "a")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,\n "b": }', ":2: not valid JSON"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[" * 200 + "]" * 200, "nested deeper than 64 levels"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64 levels"),
        ('{"a":\n ' + "9" * 4301 + "}", ":2: a whole number of 4,301 digits"),
        ('{"a": -' + "9" * 5000 + "}", "a whole number of 5,001 digits"),
        ('{"a": Infinity}', "Infinity is no JSON number"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1e999}', "the number 1e999 is out of range"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ("", "not valid JSON"),
        ('{"a": 1} x', "not valid JSON"),
    ],
)
def test_json_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    problem = refusal(reading.read_json, tmp_path / "a.json")
    assert problem.startswith(str(tmp_path / "a.json"))
    assert said in problem
    assert said.lstrip(":2 ") in refusal(reading.parse_json, text, "here:7")


def test_json_values_are_counted_before_they_are_made():
    assert "more than 4,000,000 values" in refusal(
        reading.parse_json, "[" + "[]," * 4_000_001 + "[]]", "here"
    )


def test_json_pairs_of_surrogates_and_large_limits_are_fine():
    assert reading.parse_json(
        '{"a": "\\ud83c\\udf4e", "b": 1' + "0" * 30 + "}", "here"
    ) == {"a": "🍎", "b": 10**30}


def test_items_of_an_array_are_read_one_by_one():
    text = '[{"a": 1}, [[]], 1e999]'
    assert reading.json_item(text, 1) == ({"a": 1}, 9)
    with pytest.raises(ValueError, match="out of range"):
        reading.json_item(text, 17)
    with pytest.raises(ValueError, match="nested deeper"):
        reading.json_item("[" * 100_000, 0)


def test_json_lines_name_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[1]\n')
    rows = reading.read_json_lines(path)
    assert next(rows).integer("a") == 1
    assert (
        refusal(next, rows)
        == f"{path}:3: expected an object with keys, got a list of 1"
    )


def test_csv_names_the_line_a_record_begins_in(tmp_path):
    path = tmp_path / "a.csv"
    for text, rows, problem in (
        (
            'a;b\n"x\ny";z\n;2\n1;2;3\n',
            [("2", {"a": "x\ny", "b": "z"}), ("4", {"b": "2"})],
            ":5: more cells",
        ),
        ("a,a\n1,2\n", [], ":1: column a stands twice"),
        ('a,b\n1\n"1,2\n', [("2", {"a": "1"})], ":3: not valid CSV"),
        (
            "a,b\n" + "x" * 200_000,
            [],
            ":2: not valid CSV (field larger than field limit",
        ),
        ("", [], ""),
    ):
        path.write_text(text)
        problems: list[str] = []
        assert list(reading.read_csv(path, problems)) == [
            (f"{path}:{line}", row) for line, row in rows
        ]
        assert problem in "".join(problems)
        assert len(problems) == bool(problem)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", ":1: anchors and aliases are not supported"),
        ("b: *x\n", ":1: anchors and aliases are not supported"),
        ("a: !!python/object:os.system 1", ":1: tags are not supported"),
        ("[" * 5000, "nest"),
        ("- " * 5000, ":1: nested deeper than 64 levels"),
        ("a: " + "9" * 5000, ":1: a whole number of 5,000 digits"),
        ("a: .inf", ":1: .inf is not a finite number"),
        ("x: 0\na: .nan", ":2: .nan is not a finite number"),
        ("1: a", ":1: a key must be text"),
        ("? [a]\n: b", ":1: a key must be text"),
        ("<<: {a: 1}", ":1: a key must be text"),
        ("a: 1\na: 2", ":2: the key 'a' stands twice"),
        ("a: \0", "not valid YAML"),
        ("a: 1\n---\nb: 1", "not valid YAML"),
        ("=: 1", "a key must be text"),
        ("a: =", "not valid YAML"),
    ],
)
def test_yaml_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    problem = refusal(reading.read_yaml, tmp_path / "a.yaml")
    assert problem.startswith(str(tmp_path / "a.yaml"))
    assert said in problem


def test_yaml_dates_stay_text():
    found = reading.parse_yaml(
        "a: 2024-01-01\nb: 2024-99-99\nc: [1, 1.5, yes, null, x]\n", "f"
    )
    assert found == {
        "a": "2024-01-01",
        "b": "2024-99-99",
        "c": [1, 1.5, True, None, "x"],
    }


def test_every_field_has_its_type():
    record = Record(
        {
            "t": 1,
            "n": "x",
            "i": True,
            "l": [1, "a"],
            "m": [],
            "e": " ",
            "r": [{"z": 0}],
        },
        "f:3",
        hint="h",
    )
    (inner,) = record.records("r")
    for problem, read in (
        ("f:3: t: expected a text, got 1", lambda: record.text("t")),
        ("f:3: n: expected a number, got 'x'", lambda: record.number("n")),
        ("f:3: i: expected a whole number, got true", lambda: record.integer("i")),
        ("f:3: l[1]: expected a whole number, got 'a'", lambda: record.array("l", int)),
        (
            "f:3: m: expected an object with keys, got a list of 0",
            lambda: record.record("m"),
        ),
        (
            "f:3: e: must be a text that is not empty",
            lambda: record.text("e", empty=False),
        ),
        ("f:3: r[0].z: expected a text, got 0", lambda: inner.text("z")),
        (
            "f:3: r[0].z: expected a whole number from 1 to 2, got 0",
            lambda: inner.integer("z", low=1, high=2),
        ),
        ("f:3: q is missing", lambda: record.text("q")),
        (
            "f:3: unknown key 'i' (did you mean it?)",
            lambda: record.only("t", "n", "it"),
        ),
    ):
        assert refusal(read) == problem
    assert record.text("q", None) is None
    assert record.array("l") == [1, "a"]
    with pytest.raises(ModelError, match="f: expected an object with keys, got null"):
        Record(None, "f", error=ModelError)


def test_headers_of_tensors(tmp_path):
    path = tmp_path / "a.safetensors"

    def write(header, data=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    write(
        {
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "__metadata__": {"a": "b"},
        },
        b"1234",
    )
    tensors, metadata = reading.read_tensor_header(path)
    assert tensors.record("w").array("shape", int) == [1]
    assert metadata == {"a": "b"}
    with reading.open_tensors(path) as file:
        assert list(file.keys()) == ["w"]
    for header, said in (
        ({"w": 3}, "w: expected an object with keys, got 3"),
        ({"__metadata__": {"a": 1}}, "a: expected a text, got 1"),
        (b"[" * 1000, "nested deeper"),
        (b"null", "expected an object with keys, got null"),
        ({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "damaged"),
    ):
        write(header)
        with (
            pytest.raises(DataError, match=r"a\.safetensors") as caught,
            reading.open_tensors(path),
        ):
            pass
        assert said in caught.value.problems[0]
    path.write_bytes(b"\xff" * 20)
    assert "not a safetensors file" in refusal(reading.read_tensor_header, path)


def test_own_records_may_name_files_that_are_not_utf8(tmp_path):
    (tmp_path / "a.json").write_text('{"path": "\\udc80"}')
    (tmp_path / "a.yaml").write_text('path: "\\udc80"')
    for read, name in ((reading.read_json, "a.json"), (reading.read_yaml, "a.yaml")):
        assert read(tmp_path / name, halves=True) == {"path": "\udc80"}
        assert "half a character" in refusal(read, tmp_path / name)
