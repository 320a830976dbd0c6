"""What the shell completes, and what `mmedit env` tells."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


@pytest.fixture
def complete(cli, monkeypatch, tmp_path):
    """Return what bash would offer for a line."""
    run = tmp_path / "records" / "eval" / "0123456789ab"
    run.mkdir(parents=True)
    (run / "report.json").write_text("{}")

    def offered(line: str) -> set[str]:
        monkeypatch.setenv("_MMEDIT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        return set(cli()[1].split())

    return offered


def test_the_shell_completes_names(complete):
    assert complete("mmedit eval perf") == {"perfusion"}
    assert complete("mmedit edit u") == {"ultraedit", "unike", "uce"}
    assert {"liveedit", "perfusion", "mgie"} <= complete("mmedit eval ")
    assert complete("mmedit edit live") == {"liveedit"}
    assert {"mini-blip2", "mini-llava"} <= complete("mmedit eval ft --model mini-")
    assert complete("mmedit eval ft --data counter") == {"counterfact"}
    assert complete("mmedit report view la") == {"latest"}
    assert complete("mmedit report view 0") == {"0123456789ab"}


def test_env_tells_the_machine_and_nothing_of_the_user(cli, monkeypatch):
    monkeypatch.setenv("MMEDIT_CACHE", "/somebody/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, text, _ = cli("env", "--json")
    found = json.loads(text)
    assert code == 0
    assert {"mmedit", "torch", "python"} <= set(found["versions"])
    assert found["cores"] == os.cpu_count()
    assert found["devices"][0].startswith("cpu")
    assert "HF_TOKEN" in found["variables that are set"]
    assert "secret" not in text
    assert str(Path.home()) not in text
    assert "torch:" in cli("env")[1]
