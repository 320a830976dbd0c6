"""Run folders: one writer, atomic files, and what a kill leaves can be continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmedit_cli.errors import RunError
from mmedit_cli.records import Run
from mmedit_cli.storage import sha256_json, write_atomic

ROOT = Path(__file__).parents[2]
CONFIG = {
    "editor": "ft",
    "hparams": {"lr": 1e-05, "big": 1e22, "text": "1e-4", "layers": [1, 2]},
    "seed": 0,
}


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    """Start a child process that runs `code` with an open Run called `run`."""
    code = (
        f"import sys\nfrom pathlib import Path\nfrom mmedit_cli.records import Run\n"
        f"run = Run.open(Path(sys.argv[1]), {CONFIG!r}, {{}})\n{code}"
    )
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Run.open(tmp_path / "run", CONFIG, {"torch": "2"}) as run:
        yield run


def test_a_run_from_start_to_report(tmp_path: Path) -> None:
    folder = Run.locate(tmp_path, ["eval", "ft"], CONFIG)
    assert Run.finished(folder) is None
    with Run.open(folder, CONFIG, {"torch": "2"}) as run:
        run.append("cases", [{"b": 1, "a": "é\n"}, {"c": 0.1}])
        run.append("cases", [])
        run.append("cases", iter([{"odd path": "\udc80"}]))
        run.rewrite("log", [{"x": 1}])
        run.rewrite("log", [{"x": 2}])
        assert (folder / "cases.jsonl").read_bytes().splitlines()[
            0
        ] == '{"b":1,"a":"é\\n"}'.encode()
        assert run.read("cases") == [
            {"a": "é\n", "b": 1},
            {"c": 0.1},
            {"odd path": "\udc80"},
        ]
        assert run.read("log") == [{"x": 2}]
        assert run.read("edits") == []
        assert run.finish({"z": 1, "a": "é"}) == folder / "report.json"
    assert Run.finished(folder) == {"z": 1, "a": "é"}
    assert (folder / "report.json").read_text(
        "utf-8"
    ) == '{\n  "z": 1,\n  "a": "é"\n}\n'
    assert not list(folder.glob("*.tmp"))


def test_a_config_is_the_same_after_a_round_trip(run: Run) -> None:
    folder = run.folder
    run.close()
    run.close()
    before = (folder / "run.yaml").read_bytes()
    with Run.open(
        folder,
        CONFIG | {"hparams": CONFIG["hparams"] | {"layers": (1, 2)}},
        {"torch": "3"},
    ):
        assert (folder / "run.yaml").read_bytes() == before
    with pytest.raises(
        RunError, match=r"another config \(different: extra, seed\)"
    ) as caught:
        Run.open(folder, CONFIG | {"seed": 1, "extra": None}, {})
    assert "--force" in caught.value.hint
    Run.open(folder, CONFIG, {}).close()  # the refused attempt let go of the lock


@pytest.mark.parametrize("text", ["a: [", "- 1", "config: 3", "\0"])
def test_a_damaged_run_yaml(run: Run, text: str) -> None:
    run.close()
    (run.folder / "run.yaml").write_text(text)
    with pytest.raises(RunError, match=r"run\.yaml(:\d+)?: ") as caught:
        Run.open(run.folder, CONFIG, {})
    assert "--force" in caught.value.hint


def test_a_second_writer_is_refused_within_and_across_processes(run: Run) -> None:
    with pytest.raises(RunError, match="another process is writing"):
        Run.open(run.folder, CONFIG, {})
    run.close()
    child = start("print('open', flush=True)\nsys.stdin.read()", run.folder)
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    with pytest.raises(RunError, match="another process is writing"):
        Run.open(run.folder, CONFIG, {}, force=True)
    assert (run.folder / "run.yaml").exists()
    child.kill()
    child.communicate()
    Run.open(run.folder, CONFIG, {}).close()


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_writer_leaves_whole_records(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = start(
        "for i in range(10**9):\n    run.append('cases', [{'i': i, 'pad': 'x' * 20000}])",
        folder,
    )
    path = folder / "cases.jsonl"
    while not path.exists() or path.stat().st_size < 200_000:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with Run.open(folder, CONFIG, {}) as run:
        done = len(run.read("cases"))
        assert done >= 9
        run.append("cases", [{"i": done}])
        assert [record["i"] for record in run.read("cases")] == list(range(done + 1))


@pytest.mark.parametrize("torn", [b'{"i":', b'{"i":2}', b"\0\0\0", b'{"a":"\xff"}'])
def test_a_torn_last_line_is_cut_off(run: Run, torn: bytes) -> None:
    run.append("cases", [{"i": 0}])
    path = run.folder / "cases.jsonl"
    with path.open("ab") as file:
        file.write(torn)
    run.close()
    assert run.read("cases") == [{"i": 0}]
    assert path.read_bytes().endswith(torn)  # without the lock the file is only read
    with Run.open(run.folder, CONFIG, {}) as again:
        again.append("cases", [{"i": 1}])  # even before anyone reads
        assert path.read_bytes() == b'{"i":0}\n{"i":1}\n'


@pytest.mark.parametrize(
    "data",
    [
        b'{"i":0}\n{"i":\n{"i":2}\n',
        b'{"i":0}\n{"i:1}\n',
        b'{"i":0}\n[1]\n{"i"',
        b"{}\n\0\0\n",
        b'{}\n{"a":"\xff"}\n',
    ],
)
def test_a_corrupt_line_is_named_and_kept_even_the_last(run: Run, data: bytes) -> None:
    """Only a line without its newline was torn by a kill; anything else was damaged, and is not ours to cut off."""
    path = run.folder / "cases.jsonl"
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"cases\.jsonl:2: ") as caught:
        run.read("cases")
    assert "--force" in caught.value.hint
    assert path.read_bytes() == data[: data.rfind(b"\n") + 1]


def test_force_removes_only_files_of_a_run(run: Run) -> None:
    run.append("cases", [{"i": 0}])
    run.finish({})
    theirs = ("my-facts.jsonl", "my-lora.safetensors", "x.tmp", "notes.txt")
    for name in theirs:
        (run.folder / name).write_text("no newline")
    run.close()
    Run.open(run.folder, CONFIG, {}).close()
    assert Run.finished(run.folder) == {}
    Run.open(run.folder, {"other": 1}, {}, force=True).close()
    assert {path.name for path in run.folder.iterdir()} - {".lock"} == {
        "run.yaml",
        *theirs,
    }
    assert {(run.folder / name).read_text() for name in theirs} == {"no newline"}
    with pytest.raises(ValueError, match=r"name it in records\.py"):
        run.append("unheard", [])


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize(
    "name", [".lock", "run.yaml", "cases.jsonl", "report.json", "editor.safetensors"]
)
def test_nothing_is_written_or_cut_through_a_link(
    run: Run, tmp_path: Path, name: str
) -> None:
    run.close()
    victim = tmp_path / "victim"
    victim.write_text("config: {}")
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).symlink_to(victim)
    for force in (False, True):
        with pytest.raises(RunError, match="a link, where this program writes a file"):
            Run.open(run.folder, CONFIG, {}, force=force)
    assert victim.read_text() == "config: {}"


def test_finish_is_all_or_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        RunError, match=r"report\.json: cannot write: No space left on device"
    ):
        run.finish({"a": 1})
    assert {path.name for path in run.folder.iterdir()} - {".lock"} == {"run.yaml"}


def test_a_failed_append_leaves_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    run.append("cases", [{"i": 0}])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match=r"cases\.jsonl: cannot write: Input/output"):
            run.append("cases", [{"i": 1}])
    with pytest.raises(RunError, match=r"cases\.jsonl: cannot be written as JSON"):
        run.append("cases", [{"i": 1}, {"i": float("nan")}])
    assert run.read("cases") == [{"i": 0}]


def test_a_damaged_report(run: Run) -> None:
    for data in (b'{"a":', b"[]", b"\xff"):
        (run.folder / "report.json").write_bytes(data)
        with pytest.raises(
            RunError, match=r"report\.json(:\d+)?: (not|expected) "
        ) as caught:
            Run.finished(run.folder)
        assert "--force" in caught.value.hint


def test_failures_of_the_file_system_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file.run: cannot create the folder"):
        Run.open(tmp_path / "file" / "run", CONFIG, {})
    with pytest.raises(RunError, match=r"missing.x: cannot write"):
        write_atomic(tmp_path / "missing" / "x", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"folder: cannot write"):
        write_atomic(tmp_path / "folder", b"")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_locate_makes_safe_and_distinct_names(tmp_path: Path) -> None:
    odd = [
        "..",
        ".",
        "",
        "/",
        "../up",
        "a/b",
        "a\\b",
        "a b",
        ".hidden",
        "ä",
        "x" * 500,
        "x" * 501,
        "a\0",
        "\udc80",
        "a.",
    ]
    folders = [Run.locate(tmp_path, [part], {}) for part in odd]
    assert len(set(folders)) == len(odd)
    for folder in folders:
        assert folder.parents[1] == tmp_path
        assert folder.parent.name[0] not in ".-"
        assert len(folder.parent.name) <= 70
        folder.mkdir(parents=True)
    digest = sha256_json({})[:12]
    assert (
        Run.locate(tmp_path, ["eval", "mini-blip2_v1.5"], {})
        == tmp_path / "eval" / "mini-blip2_v1.5" / digest
    )


def test_sha256_json_is_canonical() -> None:
    assert sha256_json({"a": 1, "b": (2,)}) == sha256_json(
        json.loads('{"b": [2], "a": 1}')
    )
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        sha256_json(float("inf"))


def test_tensors(run: Run) -> None:
    torch = pytest.importorskip("torch")
    assert run.load_tensors("last") is None
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T
    path = run.save_tensors("last", {"w": weight}, {"step": "3"})
    assert path == run.folder / "last.safetensors"
    tensors, metadata = run.load_tensors("last")
    assert torch.equal(tensors["w"], weight)
    assert metadata == {"step": "3"}
    run.save_tensors("last", {"w": weight + 1}, {})
    assert torch.equal(
        tensors["w"], weight
    )  # what was loaded before does not follow the file
    assert run.load_tensors("last")[1] == {}
    data = path.read_bytes()
    for damaged in (data[:-1], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"last\.safetensors: damaged") as caught:
            run.load_tensors("last")
        assert "--force" in caught.value.hint
    assert not list(run.folder.glob("*.tmp"))
