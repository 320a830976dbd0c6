"""Data sets and models from a hub-shaped endpoint: the program in a process of its own, with HF_ENDPOINT set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from download.website import COMMIT

MODEL = {
    "config.json": b'{"model_type": "llava"}',
    "model.safetensors": bytes(range(256)) * 500,
    "pytorch_model.bin": b"never fetched",
    "unet/diffusion_pytorch_model.safetensors": b"weights of a part",
}


@pytest.fixture
def program(site, tmp_path):
    """Run `mmedit download` against the site: `program("name")` -> code, out, err."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": site.url,
        "HF_HOME": str(tmp_path / "hf"),
        "MMEDIT_DATA": str(tmp_path / "data"),
    }
    env |= {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(*words, **more):
        command = [sys.executable, "-m", "mmedit_cli", "download", *map(str, words)]
        done = subprocess.run(
            command,
            env=env | more,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


@pytest.fixture
def catalogue(tmp_path):
    """Write a catalogue with one hub item and return its path."""

    def write(**source):
        item = {
            "sources": [{"hub": "someone/things", **source}],
            "layout": {"data/*.parquet": 2},
        }
        groups = {
            "things": {"summary": "things", "licence": "mit", "items": {"rows": item}}
        }
        (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump(groups))
        return tmp_path / "catalogue.yaml"

    return write


def test_a_model_goes_into_the_cache_and_is_verified(site, program, tmp_path):
    site.repository("someone/model", MODEL, kind="models", licence="apache-2.0")
    done = program("someone/model", "--dry-run", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert (plan["revision"], plan["licence"], plan["state"]) == (
        COMMIT,
        "apache-2.0",
        "missing",
    )
    assert {file["path"] for file in plan["files"]} == set(MODEL) - {
        "pytorch_model.bin"
    }
    assert not any("resolve" in path for path, _ in site.seen)

    done = program("someone/model")
    assert done.code == 0, done.err
    assert "licence: apache-2.0" in done.err
    folder = tmp_path / "hf" / "hub" / "models--someone--model" / "snapshots" / COMMIT
    assert {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    } == set(MODEL) - {"pytorch_model.bin"}
    assert "someone/model: present" in program("someone/model").out
    assert program("someone/model", "--verify").code == 0
    offline = program("someone/model", HF_HUB_OFFLINE="1")
    assert (offline.code, str(folder) in offline.out) == (0, True)

    weights = (folder / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    done = program("someone/model", "--verify")
    assert done.code == 1
    assert "PROBLEM model.safetensors: wrong checksum" in done.out
    assert "wrong checksum" in program("someone/model").err


def test_a_data_set_comes_with_its_commit_and_its_digests(
    site, program, catalogue, tmp_path
):
    files = {
        "data/a.parquet": b"a" * 999,
        "data/b.parquet": b"b" * 999,
        "data/c.csv": b"c",
        "README.md": b"r",
    }
    site.repository("someone/things", files)
    path = catalogue(include=["data/*.parquet"])
    done = program("things", "--catalogue", path, "--json")
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["items"]
    assert (row["revision"], row["checked"], row["files"], row["bytes"]) == (
        COMMIT,
        "source",
        2,
        1998,
    )
    found = tmp_path / "data" / "things"
    assert sorted(p.name for p in found.rglob("*") if p.is_file()) == [
        "a.parquet",
        "b.parquet",
        "download.json",
    ]
    assert program("things", "--catalogue", path, "--verify").code == 0
    (found / "data" / "a.parquet").write_bytes(b"A" * 999)
    done = program("things", "--catalogue", path, "--verify")
    assert (done.code, "data/a.parquet: wrong checksum" in done.out) == (1, True)


def test_bytes_that_the_hub_did_not_promise_are_refused(
    site, program, catalogue, tmp_path
):
    site.repository(
        "someone/things", {"data/a.parquet": b"a" * 999, "data/b.parquet": b"b" * 999}
    )
    for revision in ("main", COMMIT):
        site.files[f"/datasets/someone/things/resolve/{revision}/data/a.parquet"] = (
            b"x" * 999
        )
    done = program("things", "--catalogue", catalogue())
    assert done.code == 1
    assert "data/a.parquet: wrong checksum: sha256" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "data" / "things" / "data").exists()


def test_a_gated_repository_says_what_to_do(site, program):
    site.repository("someone/model", MODEL, kind="models")
    for path in ("", "/revision/main"):
        site.always[f"/api/models/someone/model{path}"] = (
            "status",
            403,
            {"X-Error-Code": "GatedRepo"},
        )
    done = program("someone/model")
    assert done.code == 1
    assert (
        f"someone/model is gated; accept the licence at {site.url}/someone/model, then log in"
        in done.err
    )
    assert "HF_TOKEN" in done.err


def test_what_the_hub_does_not_have(site, program, catalogue):
    done = program("someone/nothing")
    assert done.code == 1
    assert "no such repository, or a private one" in done.err
    site.repository("someone/things", {"README.md": b"r"})
    done = program("things", "--catalogue", catalogue(include=["data/*.parquet"]))
    assert (done.code, "no file there matches data/*.parquet" in done.err) == (1, True)
    done = program("someone/things", "--revision", "v9")
    assert (done.code, "someone/things: hub model: " in done.err) == (1, True)


def test_the_token_goes_to_the_hub(site, program):
    site.repository("someone/model", MODEL, kind="models")
    assert program("someone/model", HF_TOKEN="hf_secret").code == 0
    assert site.tokens == {"Bearer hf_secret"}
