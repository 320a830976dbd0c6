"""What goes wrong between this program and the hub: a problem and a way out, a line each, and never for ever."""

from __future__ import annotations

import errno
import functools
import time
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from download.website import CHUNKED, COMMIT
from filelock import FileLock

from mmedit_cli import catalog, hub, web
from mmedit_cli.errors import ModelError, UserError

FILES = {
    "config.json": b'{"model_type": "llava"}',
    "model.safetensors": bytes(range(256)) * 50,
}
MODEL = "someone/model"
API = f"/api/models/{MODEL}/revision/main"
WEIGHTS = f"/{MODEL}/resolve/{COMMIT}/model.safetensors"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture
def endpoint(site, tmp_path, monkeypatch):
    """A site that huggingface_hub takes for the hub, with one model, and a cache of its own."""
    site.repository(MODEL, FILES, kind="models")
    site.files[API] = site.files[f"/api/models/{MODEL}"]
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    template = f"{site.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    monkeypatch.setattr(
        web, "Pace", functools.partial(web.Pace, seconds=0.5, answer=0.8)
    )
    huggingface_hub.close_session()
    yield site
    huggingface_hub.close_session()


def trouble(revision=None):
    """Return (problem, hint) of a model that cannot be had; it takes a few seconds at most."""
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        catalog.hub_folder(MODEL, revision)
    assert time.monotonic() - start < 20
    (problem,) = caught.value.problems
    assert problem.startswith(f"{MODEL}: cannot be fetched from the hub: ")
    assert "\n" not in problem + caught.value.hint
    return problem, caught.value.hint


def test_what_is_well_comes(endpoint):
    folder = catalog.hub_folder(MODEL, None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_accept_the_licence_then_log_in(endpoint, status):
    for path in (
        WEIGHTS,
        WEIGHTS.replace("model.safetensors", "config.json"),
    ):  # its description is public
        endpoint.always[path] = ("status", status, {"X-Error-Code": "GatedRepo"})
    problem, hint = trouble()
    assert f"{MODEL} is gated" in problem
    assert hint == (
        f"accept the licence at {endpoint.url}/{MODEL}, then log in with `hf auth login` or set HF_TOKEN"
    )


def test_only_a_name_that_is_not_there_is_to_be_checked(endpoint):
    endpoint.always[API] = ("status", 404, {"X-Error-Code": "RepoNotFound"})
    assert "check the name" in trouble()[1]


def test_a_revision_that_is_not_there_is_named(endpoint):
    endpoint.always[f"/api/models/{MODEL}/revision/v9"] = (
        "status",
        404,
        {"X-Error-Code": "RevisionNotFound"},
    )
    problem, hint = trouble("v9")
    assert "no revision 'v9'" in problem
    assert hint.startswith(f"{endpoint.url}/{MODEL}/tree/main lists them")


PAGE = b"<html>log in to this network</html>"
BROKEN = {
    "a page": (
        ("raw", HEAD + b"Content-Length: %d\r\n\r\n" % len(PAGE) + PAGE),
        "answers as no hub does",
    ),
    "a list": (
        ("raw", HEAD + b"Content-Length: 2\r\n\r\n[]"),
        "answers as no hub does",
    ),
    "nothing known": (
        ("raw", HEAD + b"Content-Length: 2\r\n\r\n{}"),
        "answers as no hub does",
    ),
    "nothing": (("hang",), "no answer within|does not answer"),
    "a cut": (("raw", b""), "cut the connection"),
    "half": (("raw", HEAD + b"Content-Length: 100\r\n\r\n{"), "cut the connection"),
    "busy": (("status", 503), "HTTP 503 from .*: it is busy or out of order"),
    "an old token": (
        (
            "status",
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
        ),
        "HTTP 401",
    ),
    "drops": (("drip", HEAD + b"X: "), "no answer within"),
    "an endless answer": (
        ("endless", CHUNKED),
        "an answer of more than 67,108,864 bytes|no answer within",
    ),
    "a packed answer": (
        ("endless", CHUNKED.replace(b"OK", b"OK\r\nContent-Encoding: gzip")),
        ".",
    ),
    "a step to nowhere": (
        ("status", 302, {"Location": "http://127.0.0.1:9/x"}),
        "cannot be reached",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.filterwarnings("ignore")  # of huggingface_hub about its retries
def test_a_hub_that_answers_badly_is_no_wrong_name(endpoint, case):
    fault, expected = BROKEN[case]
    endpoint.always[API] = fault
    problem, hint = trouble()
    assert pytest.raises(AssertionError, match=expected).matches(
        AssertionError(problem)
    ), problem
    assert "check the name" not in hint
    assert hint


def test_a_file_that_is_refused_half_way(endpoint, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    endpoint.always[WEIGHTS] = ("cut", 100)
    problem, hint = trouble()
    assert "cut the connection" in problem
    assert "where it stopped" in hint


def test_a_folder_that_cannot_be_written_is_no_wrong_name(
    endpoint, tmp_path, monkeypatch
):
    (tmp_path / "cache").write_text("a file where the cache should be")
    problem, hint = trouble()
    assert f"{tmp_path / 'cache'}" in problem
    assert hint == "set HF_HOME to a folder that can be written"
    found = hub.trouble(
        OSError(errno.EROFS, "Read-only file system", "/cache/x"), hub.Repository(MODEL)
    )
    assert found == hub.Trouble(
        "/cache/x: cannot be written: Read-only file system", hint
    )
    found = hub.trouble(
        OSError(errno.ENOSPC, "No space left on device", "/cache/x"),
        hub.Repository(MODEL),
    )
    assert "make room" in found.hint


def test_a_proxy_that_does_not_answer_is_named(endpoint, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    huggingface_hub.close_session()
    problem, hint = trouble()
    assert "through the proxy http://127.0.0.1:9" in problem
    assert "secret" not in problem
    assert "HTTPS_PROXY" in hint


def test_the_hub_is_asked_through_the_proxy_of_the_environment(endpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.example")
    monkeypatch.setenv("HTTP_PROXY", endpoint.url)
    huggingface_hub.close_session()
    assert (catalog.hub_folder(MODEL, None) / "config.json").read_bytes() == FILES[
        "config.json"
    ]


def test_a_proxy_that_cannot_be_used_is_named(endpoint, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nonsense://x")
    hub.prepare.cache_clear()
    with pytest.raises(UserError, match=r"all proxy nonsense://x: cannot be used"):
        catalog.hub_folder(MODEL, None)


def test_the_hub_itself_is_guarded(endpoint):
    hub.prepare()
    session = huggingface_hub.get_session()
    assert session.event_hooks["response"], "redirects and bodies are watched"
    assert len(session.event_hooks["request"]) >= 2, "the hook of huggingface_hub stays"
    endpoint.files["/big"] = b"x"
    endpoint.always["/big"] = ("endless", CHUNKED.replace(b"200 OK", b"500 Oh"))
    with pytest.raises(web.Refused, match="more than 1,048,576 bytes"):
        session.get(f"{endpoint.url}/big", timeout=None)


def test_what_a_killed_download_left_goes(endpoint, tmp_path):
    blobs = tmp_path / "cache" / f"models--{MODEL.replace('/', '--')}" / "blobs"
    locks = tmp_path / "cache" / ".locks" / blobs.parent.name
    blobs.mkdir(parents=True)
    locks.mkdir(parents=True)
    for name in ("a" * 40, "b" * 40):
        (blobs / f"{name}.01234567.incomplete").write_bytes(b"half")
        (locks / f"{name}.lock").touch()
    (blobs / "notes.incomplete").write_text("not ours")
    with FileLock(locks / f"{'b' * 40}.lock"):  # on its way in another process
        catalog.hub_folder(MODEL, None)
    left = sorted(path.name for path in blobs.glob("*.incomplete"))
    assert left == [f"{'b' * 40}.01234567.incomplete", "notes.incomplete"]


def test_data_that_come_along_are_sought_in_the_package_only(tmp_path):
    from mmedit_cli.download.sources import Courier, Item, Source, SourceError

    for place in ("../mmedit_cli", "/etc", "models/../../docs", ".."):
        with pytest.raises(SourceError, match="leads out of the data that come along"):
            Courier().bring(Source("bundled", place), Item("x", "", ()), Path(tmp_path))
