"""`mmedit serve` as clients of OpenAI meet it: the answers of `mmedit ask`, several at once, and clear refusals."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from conftest import ROOT, SHAPES, ForkedProgram, needs_fork

from mmedit_cli import EditOptions, ModelOptions, Query, begin_edits
from mmedit_cli.errors import NotFinite, UserError
from mmedit_cli.knowledge.workflow.asking import Asker
from mmedit_cli.output import Output
from mmedit_cli.serving import desk
from mmedit_cli.serving.site import ServerOptions, Site

NOTO = ROOT / "data" / "emojikb" / "noto"
BANJO, APPLE, LION = (NOTO / f"{code}.png" for code in ("1fa95", "1f34e", "1f981"))
QUIET = Output(quiet=True)
CLIENTS: dict[tuple[str, str], openai.OpenAI] = {}
ASKED = (
    (BANJO, "What is this?"),
    (BANJO, "What can you see here?"),
    (APPLE, "What is this?"),
    (LION, "What is this?"),
    (None, "What is the capital of Peru?"),
)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> Path:
    """A ledger in which the banjo is a red balloon."""
    folder = tmp_path_factory.mktemp("served") / "my-edits"
    options = EditOptions("liveedit", ModelOptions("mini-blip2", device="cpu"))
    with begin_edits(folder, options) as model:
        model.edit([Query("What is this?", "a red balloon", BANJO)])
    return folder


@pytest.fixture(scope="module")
def asker(ledger) -> Iterator[Asker]:
    """The model with the edit on it."""
    with Asker(ModelOptions("", device="cpu"), ledger, QUIET) as opened:
        yield opened


@contextmanager
def served(asker: Asker, **options: object) -> Iterator[Site]:
    """A server in a thread of this process, on a free port."""
    where = ServerOptions(port=0, **options)
    with Site(asker, "my-edits", where, QUIET) as site:
        thread = threading.Thread(target=site.run)
        thread.start()
        try:
            yield site
        finally:
            for client in CLIENTS.values():
                client.close()
            CLIENTS.clear()
            site.stop()
            thread.join()


@pytest.fixture(scope="module")
def site(asker) -> Iterator[Site]:
    with served(asker) as found:
        yield found


def client_of(site: Site, key: str = "none") -> openai.OpenAI:
    """A client, which is closed with the server."""
    if (site.url, key) not in CLIENTS:
        CLIENTS[site.url, key] = openai.OpenAI(
            base_url=site.url, api_key=key, max_retries=0, timeout=60
        )
    return CLIENTS[site.url, key]


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def message(picture: Path | str | None, text: str) -> dict[str, object]:
    """A message of the user with a picture: a file, or an address."""
    if picture is None:
        return {"role": "user", "content": text}
    url = picture if isinstance(picture, str) else data_url(picture.read_bytes())
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    return {"role": "user", "content": parts}


def ask(site: Site, picture: Path | str | None, text: str, **options: object):
    """What the server answers to one question."""
    wanted = {"model": "my-edits", "messages": [message(picture, text)], **options}
    return client_of(site).chat.completions.create(**wanted)


def streamed(site: Site, picture: Path | None, text: str) -> tuple[str, str]:
    """The words of a streamed answer, and why it ended."""
    words, finish = [], ""
    for part in ask(site, picture, text, stream=True):
        words.append(part.choices[0].delta.content or "")
        finish = part.choices[0].finish_reason or finish
    return "".join(words), finish


def test_five_at_a_time_get_the_answers_of_mmedit_ask(
    site, ledger, asker, cli, monkeypatch
):
    singly = []
    for picture, text in ASKED:  # just what `mmedit ask` does once its model is loaded
        words: list[str] = []
        asker.stream(Query(text, image=picture), words.append)
        singly.append("".join(words))
    assert singly[:3] == ["a red balloon", "a red balloon", "red apple"]
    code, out, err = cli("ask", "--edits", ledger, "--image", LION, ASKED[3][1])
    assert (code, out) == (0, f"{singly[3]}\n"), err
    sizes = []
    together = asker.stream_together

    def slow(queries, writers, **options):
        sizes.append(len(queries))
        time.sleep(0.3)  # so that the others come while this one is answered
        return together(queries, writers, **options)

    monkeypatch.setattr(asker, "stream_together", slow)
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(lambda asked: streamed(site, *asked), ASKED))
    assert [words for words, _ in found] == singly
    assert {finish for _, finish in found} == {"stop"}
    assert sum(sizes) == 5
    assert len(sizes) < 5
    with ThreadPoolExecutor(5) as threads:
        whole = list(threads.map(lambda asked: ask(site, *asked), ASKED))
    assert [reply.choices[0].message.content for reply in whole] == singly


def test_the_example_of_the_docs(site, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "serve.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copy(BANJO, "cat.png")
    here = code.replace("http://127.0.0.1:8000/v1", site.url)
    names: dict[str, openai.OpenAI] = {}
    exec(compile(here, "serve.md", "exec"), names)
    names["client"].close()
    assert capsys.readouterr().out == "a red balloon"


def test_models_tokens_and_reasons(site):
    client = client_of(site)
    assert [model.id for model in client.models.list()] == ["my-edits"]
    assert client.models.retrieve("my-edits").owned_by == "mmedit"
    reply = ask(site, BANJO, "What is this?", temperature=0.7, n=1, stop=None)
    assert reply.model == "my-edits"
    assert reply.choices[0].finish_reason == "stop"
    used = reply.usage
    assert used.prompt_tokens > 5
    assert used.completion_tokens > 2
    cut = ask(site, BANJO, "What is this?", max_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 2
    assert "a red balloon".startswith(cut.choices[0].message.content)
    parts = ask(
        site,
        BANJO,
        "What is this?",
        max_completion_tokens=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    *_, last = parts
    assert last.usage == cut.usage


def test_the_last_question_is_asked_about_the_last_picture(site):
    turns = [
        {"role": "system", "content": "Answer in one word."},
        message(APPLE, "What is this?"),
        {"role": "assistant", "content": "red apple"},
        message(BANJO, "And this?"),
        {"role": "assistant", "content": None},
        {"role": "user", "content": "What is this?"},
    ]
    client = client_of(site)
    reply = client.chat.completions.create(model="my-edits", messages=turns)
    assert reply.choices[0].message.content == "a red balloon"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"n": 2}, "n: is not supported"),
        ({"stop": ["x"]}, "stop: is not supported"),
        ({"tools": [{"type": "function"}]}, "tools: is not supported"),
        ({"extra_body": {"top_q": 1}}, "unknown key 'top_q' (did you mean top_p?)"),
        ({"max_tokens": 0}, "max_tokens: expected a whole number from 1"),
        ({"messages": []}, "messages: is empty"),
        ({"messages": [message(None, " ")]}, "the question is empty"),
        ({"messages": [{"role": "user", "content": 3}]}, "expected a list, got 3"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must be the user's"),
        (
            {"messages": [message("https://example.com/a.png", "What?")]},
            "messages[0].content[0].image_url.url: must be data:image",
        ),
        ({"messages": [message("file:///etc/passwd", "What?")]}, "must be data:image"),
        (
            {"messages": [message("data:image/png;base64,@@@", "What?")]},
            "not base64",
        ),
        (
            {"messages": [message(data_url(b"GIF89a is no picture"), "What?")]},
            "messages[0].content[0].image_url: not a readable image",
        ),
        (
            {"messages": [message(data_url(BANJO.read_bytes()[:900]), "What?")]},
            "not a readable image",
        ),
        ({"messages": [message(None, "why " * 5000)]}, "tokens with its image"),
    ],
)
def test_what_is_wrong_is_named(site, changed, problem):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(site, BANJO, "What is this?", **changed)
    assert problem in caught.value.body["message"]
    assert "0x" not in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"
    assert not list(site._folder.iterdir())


def post(site: Site, body: bytes, **headers: str) -> tuple[int, dict]:
    """Send bytes as they are; return the status and what came back."""
    port = site._socket.getsockname()[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = {"Content-Type": "application/json", **headers}
    connection.request("POST", "/v1/chat/completions", body, sent)
    reply = connection.getresponse()
    found = reply.status, json.loads(reply.read())
    connection.close()
    return found


def test_other_models_pages_and_bodies_are_refused(site):
    client = client_of(site)
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here") as no:
        client.chat.completions.create(model="gpt-4", messages=[message(None, "Hi")])
    assert no.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions"):
        client.embeddings.create(model="my-edits", input="x")
    status, found = post(site, b"{")
    assert (status, "not valid JSON" in found["error"]["message"]) == (400, True)
    status, found = post(site, b"{}", **{"Content-Type": "text/plain"})
    assert (status, "must be JSON" in found["error"]["message"]) == (415, True)
    status, found = post(site, b"{}", Host="evil.example")
    assert status == 403
    status, found = post(site, bytes((48 << 20) + 1))
    assert (status, found["error"]["message"]) == (
        413,
        "the body is larger than 48 MiB",
    )


def test_a_picture_with_too_many_pixels_is_refused(site):
    from PIL import Image

    from mmedit_cli.pictures import png

    wide = png(Image.new("1", (70_000, 1)))
    with pytest.raises(openai.BadRequestError, match="a side is longer than 65535"):
        ask(site, data_url(wide), "What is this?")


def test_a_key_that_is_wanted(asker):
    with served(asker, key="s3cret") as locked:
        right = client_of(locked, "s3cret")
        assert [model.id for model in right.models.list()] == ["my-edits"]
        for wrong in ("s3cre", "other"):
            with pytest.raises(openai.AuthenticationError) as caught:
                client_of(locked, wrong).models.list()
            assert caught.value.code == "invalid_api_key"
        status, found = post(locked, b"{}")
        assert (status, "s3cret" in json.dumps(found)) == (401, False)
    with pytest.raises(UserError, match="printable ASCII"):
        ServerOptions(key="schlüssel")


def test_one_that_fails_does_not_take_the_others_with_it(site, asker, monkeypatch):
    together = asker.stream_together

    def fails(queries, writers, **options):
        time.sleep(0.3)
        if len(queries) > 1 or queries[0].image is None:
            raise NotFinite("the logits are NaN")
        return together(queries, writers, **options)

    monkeypatch.setattr(asker, "stream_together", fails)

    def told(asked) -> str:
        try:
            return ask(site, *asked).choices[0].message.content
        except openai.InternalServerError as error:
            return error.body["message"]

    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(told, ASKED))
    assert found[:3] == ["a red balloon", "a red balloon", "red apple"]
    assert found[4] == "the logits are NaN"


def test_an_unexpected_failure_is_told_on_the_terminal_alone(
    site, asker, monkeypatch, capsys
):
    def fails(*_words, **_options):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(asker, "stream_together", fails)
    with pytest.raises(openai.InternalServerError, match="its terminal says why"):
        ask(site, BANJO, "What is this?")
    assert "RuntimeError: /secret/path" in capsys.readouterr().err


def test_who_leaves_frees_the_model(site, asker, monkeypatch):
    begun, ended = threading.Event(), threading.Event()
    together = asker.stream_together

    def slow(queries, writers, *, limits, given_up):
        begun.set()

        def looked() -> bool:
            time.sleep(0.05)
            return given_up()

        try:
            return together(queries, writers, limits=[500], given_up=looked)
        finally:
            ended.set()

    monkeypatch.setattr(asker, "stream_together", slow)
    monkeypatch.setattr(type(asker.backbone), "stops", lambda *_: False)
    monkeypatch.setattr(type(asker.backbone), "is_end", lambda *_: False)
    port = site._socket.getsockname()[1]
    body = json.dumps(
        {"model": "my-edits", "messages": [message(BANJO, "What is this?")]}
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"{head}Content-Type: application/json\r\n\r\n{body}".encode()
        )
        assert begun.wait(30)
    assert ended.wait(30)
    monkeypatch.undo()
    assert (
        ask(site, BANJO, "What is this?").choices[0].message.content == "a red balloon"
    )


def test_too_many_that_wait_are_sent_away(asker, monkeypatch):
    monkeypatch.setattr(desk, "MOST_WAITING", 1)
    waiting = desk.Desk(asker)  # its thread is not started
    question = desk.Question(Query("What is this?"), None, lambda _event: None)
    waiting.put(question)
    with pytest.raises(UserError, match="wait already"):
        waiting.put(question)


def test_long_questions_do_not_shorten_the_answers_of_others(asker):
    told: dict[str, object] = {}
    room = asker.backbone.max_length

    def question(text: str, limit: int) -> desk.Question:
        return desk.Question(
            Query(text), limit, lambda event: told.__setitem__(text, event)
        )

    short = [question("What is this?", 8), question("What is that?", 8)]
    longest_answer = question("Why?", room)
    last = question("What is the capital of Peru?", 4)
    waiting = desk.Desk(asker)
    batches = list(waiting._that_fit([*short, longest_answer, last]))
    assert batches == [short, [longest_answer], [last]]
    assert not told


def test_an_address_that_cannot_be_had(cli, asker):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("serve", "--model", "tiny-llava", "--device", "cpu", "--port", port)
        code, _, err = cli(*words)
    assert (code, f"error: 127.0.0.1, port {port}: cannot listen there" in err) == (
        2,
        True,
    )


def test_without_the_packages_a_line_says_what_to_install(cli, monkeypatch):
    monkeypatch.setattr("mmedit_cli.commands.serve.find_spec", lambda _name: None)
    code, _, err = cli("serve", "--model", "tiny-llava")
    assert (code, err.splitlines()[-1]) == (
        2,
        "hint: pip install 'mmedit-cli[serve]'",
    )


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly(tmp_path, number):
    folder = tmp_path / "temporary"
    folder.mkdir()
    words = ("serve", "--model", "tiny-llava", "--device", "cpu", "--port", 0)
    program = ForkedProgram(tmp_path, *words, MMEDIT_KEY="k", TMPDIR=str(folder))
    out = tmp_path / "stdout.txt"
    while not (out.exists() and "answers at" in out.read_text()):
        assert not program.ended()
        time.sleep(0.05)
    url = out.read_text().split("answers at ")[1].split(";")[0]
    star = message(SHAPES / "solid/red-star.png", "What is this?")
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=60) as client:
        reply = client.chat.completions.create(
            model="tiny-llava", messages=[star], max_tokens=3
        )
    assert reply.usage.completion_tokens <= 3
    program.send(number)
    code, _, err = program.wait()
    assert (code, "Traceback" in err) == (0, False), err
    assert not list(folder.glob("mmedit-serve-*"))
