"""The wheel is the product: installed outside the checkout, it does what the README shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(
    *words: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command; where it fails, the test shows what it said."""
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist from a folder of sources; return the file."""
    run(
        sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=source
    )
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sources of an sdist, so that both are known to be complete."""
    folder = tmp_path_factory.mktemp("built")
    sdist = build("sdist", ROOT, folder / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(folder / "sources", filter="data")
    (sources,) = (folder / "sources").iterdir()
    return build("wheel", sources, folder / "wheel")


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory):
    """Run the installed program outside the checkout, in an environment of its own with what it requires."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    packages = Path(
        sysconfig.get_path(
            "purelib",
            vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")},
        )
    )
    (packages / "requirements.pth").write_text(
        sysconfig.get_path("purelib")
    )  # what the tests run with, not anew
    kept = ("PATH", "LANG", "OMP_NUM_THREADS")
    env = {key: os.environ[key] for key in kept if key in os.environ}
    env |= {
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
    }

    def mmedit(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return run(python, "-I", "-m", "mmedit_cli", *words, cwd=folder, env=env)

    home = run(
        python,
        "-I",
        "-c",
        "import mmedit_cli; print(mmedit_cli.__file__)",
        cwd=folder,
        env=env,
    ).stdout
    assert Path(home.strip()).is_relative_to(folder)
    before = {path for path in packages.rglob("*") if "__pycache__" not in path.parts}
    yield mmedit
    after = {path for path in packages.rglob("*") if "__pycache__" not in path.parts}
    assert after == before, "an installed package is left as it was installed"


def test_it_carries_data_and_models_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    share = "mmedit_cli/share"
    carried = (
        "data/emojikb/noto.zip",
        "data/emojikb/eval.jsonl.gz",
        "data/models/mini-blip2/model.safetensors",
        "data/editors/liveedit/mini-blip2.safetensors",
        "hparams/liveedit.yaml",
    )
    assert not [name for name in carried if f"{share}/{name}" not in names]
    assert not [
        name for name in names if name.startswith(f"{share}/data/emojikb/noto/")
    ], "pictures are in the zips"
    assert not [
        name for name in names if not name.startswith(("mmedit_cli/", "mmedit_cli-"))
    ]


def test_it_answers(program):
    done = program("ask", "What is the capital of Peru?")
    assert done.stdout.strip().lower() == "lima"
    assert "mini-blip2" in done.stderr


def test_it_lists_what_comes_along(program):
    models = [
        row["model"] for row in json.loads(program("list", "--json").stdout)["models"]
    ]
    assert {"mini-blip2", "mini-llava", "mini-sd", "mini-ip2p", "mini-mgie"} <= set(
        models
    )


@pytest.mark.nightly  # the test of the README does the same in the checkout
def test_it_does_the_main_job_of_the_readme(program):
    report = json.loads(program("eval", "--sequential", "1000", "--json").stdout)
    assert (report["editor"], report["model"]["name"]) == ("liveedit", "mini-blip2")
    (last,) = [
        milestone for milestone in report["milestones"] if milestone["edits"] == 1000
    ]
    scores = last["scores"]["ar"]
    assert scores["reliability"]["mean"] > 0.99
    assert scores["locality.text"]["mean"] > 0.99
    assert scores["generality.image"]["mean"] > 0.8
