"""`mmedit ui`: two visitors, each with edits of their own; what is asked, taught, undone, drawn and changed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import CHROMIUM, PageOfTabs
from conftest import ROOT

from mmedit_cli.errors import DataError, UserError
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.output import Output
from mmedit_cli.ui.knowledge import Knowledge, edits_of, question
from mmedit_cli.ui.tables import EDITS, asked_rows, edit_rows, summary
from mmedit_cli.ui.visitors import Visitors

SEAL = ROOT / "data" / "emojikb" / "noto" / "1f9ad.png"
BALLOON = "a red balloon"
needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="pip install 'mmedit-cli[ui]'"
)


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory) -> Knowledge:
    """The model that comes along."""
    records = tmp_path_factory.mktemp("records")
    return Knowledge(ModelOptions(device="cpu"), records, Output(quiet=True))


def test_visitors_do_not_see_each_others_edits(knowledge, tmp_path):
    visitors = Visitors(tmp_path, None)
    one, two = visitors.begin(), visitors.begin()
    asked = question("What is this?", str(SEAL))
    assert knowledge.ask(one, asked).text == "seal"
    taught = question("What is this?", str(SEAL), f" {BALLOON} ")
    report = knowledge.teach(one, taught, ["Name the thing."])
    assert report["editor"] == "liveedit"
    assert asked_rows(report)[0][-2:] == [BALLOON, "yes"]
    assert asked_rows(report)[1][:2] == ["otherwise", "Name the thing."]
    assert f"Edit 1 holds: 'seal' became {BALLOON!r}." in summary(report)
    edited = knowledge.ask(one, asked)
    assert (edited.text, edited.base) == (BALLOON, "seal")
    assert edited.fired.startswith("1 (")
    assert knowledge.ask(two, asked).text == "seal"
    assert edits_of(two) == []
    (row,) = edit_rows(edits_of(one))
    assert len(row) == len(EDITS)
    assert row[-1] == "active"
    assert knowledge.change(one, "undo", "last") == [1]
    assert knowledge.ask(one, asked).text == "seal"
    assert edit_rows(edits_of(one))[0][-1] == "undone"
    assert knowledge.change(one, "redo", "1") == [1]
    assert knowledge.ask(one, asked).text == BALLOON
    visitors.leave(str(one))
    assert not one.exists()


def test_an_editor_may_be_named(knowledge, tmp_path):
    fact = question("What is the capital of Peru?", None, "Arequipa")
    with pytest.raises(DataError, match="liveedit routes by the picture"):
        knowledge.teach(tmp_path / "one", fact, editor="liveedit")
    report = knowledge.teach(tmp_path / "two", fact)
    assert report["editor"] == "multi-melo"
    with pytest.raises(UserError, match="nothing was taught yet"):
        knowledge.change(tmp_path / "one", "undo", "last")
    with pytest.raises(UserError, match="new answer is empty"):
        knowledge.teach(tmp_path / "two", question("What?", None))


def test_questions_are_checked(tmp_path):
    (tmp_path / "no.png").write_text("<svg/>")
    with pytest.raises(DataError, match="not a readable image"):
        question("What is this?", str(tmp_path / "no.png"))
    with pytest.raises(UserError, match="the question is empty"):
        question(" ", None)
    with pytest.raises(UserError, match="longer than 2,000"):
        question("What?", None, "x" * 2001)


def test_ledgers_are_opened_by_name(tmp_path):
    shared = tmp_path / "shared"
    (shared / "ours").mkdir(parents=True)
    visitors = Visitors(tmp_path / "home", shared)
    assert visitors.open(" ours ") == shared / "ours"
    for name in ("", "..", "../home", "a/b", ".hidden", "/tmp", "x" * 65):
        with pytest.raises(UserError, match="name"):
            visitors.open(name)
    visitors.leave(str(shared / "ours"))
    assert (shared / "ours").exists()
    with pytest.raises(UserError, match="closed here"):
        Visitors(tmp_path, None).open("ours")


def test_without_gradio_it_is_said(cli, monkeypatch):
    monkeypatch.setattr("mmedit_cli.commands.ui.find_spec", lambda name: None)
    code, _, said = cli("ui")
    assert code == 2
    assert "mmedit ui needs gradio" in said
    assert "pip install 'mmedit-cli[ui]'" in said


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The address of the page, served by the program in a process of its own."""
    folder = tmp_path_factory.mktemp("page")
    words = [sys.executable, "-m", "mmedit_cli", "ui", "--port", str(free_port())]
    words += ["--ledgers", str(folder / "ledgers")]
    said, talk = folder / "out.txt", folder / "err.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with said.open("w") as out, talk.open("w") as err:
        program = subprocess.Popen(
            words, stdout=out, stderr=err, cwd=folder, env=environment
        )
    try:
        yield started(program, said, talk)
    finally:
        program.terminate()
        assert program.wait(30) == 0
    assert "Traceback" not in talk.read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def started(program: subprocess.Popen[bytes], said: Path, talk: Path) -> str:
    """Wait until the program says where its page is."""
    for _ in range(600):
        found = re.search(r"http://[\w.:]+/", said.read_text())
        if found:
            return found[0]
        assert program.poll() is None, talk.read_text()
        time.sleep(0.2)
    raise AssertionError(talk.read_text())


@needs_gradio
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_clients_have_ledgers_of_their_own(address):
    from gradio_client import Client, handle_file

    picture = handle_file(str(SEAL))
    asked = (picture, "What is this?")
    one, two = (Client(address, verbose=False) for _ in range(2))
    assert one.predict(*asked, api_name="/ask") == ("seal", "seal", "none")
    taught = (*asked, BALLOON, "", "as suits the fact")
    said, rows, edits = one.predict(*taught, api_name="/teach")
    assert said.startswith("Edit 1 holds")
    assert {row[-1] for row in rows["data"]} <= {"yes", "no"}
    assert [row[4:] for row in edits["data"]] == [[BALLOON, "active"]]
    assert one.predict(*asked, api_name="/ask")[:2] == (BALLOON, "seal")
    assert two.predict(*asked, api_name="/ask")[0] == "seal"
    two.predict("ours", api_name="/open")
    two.predict(*taught, api_name="/teach")
    one.predict("ours", api_name="/open")
    assert one.predict(*asked, api_name="/ask")[0] == BALLOON
    assert one.predict("last", api_name="/undo")[0] == "undone: 1"
    assert two.predict(*asked, api_name="/ask")[0] == "seal"
    readme = handle_file(str(ROOT / "README.md"))
    with pytest.raises(Exception, match=r"README.md: not a readable image"):
        one.predict(readme, "What is this?", api_name="/ask")
    with pytest.raises(Exception, match="no such finished run"):
        one.predict("../page", api_name="/run")
    for client in (one, two):
        client.close()


@needs_gradio
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_the_documentation(address, monkeypatch, capsys):
    page = (ROOT / "docs" / "ui.md").read_text()
    example = page.partition("```python\n")[2].partition("```")[0]
    default = "http://127.0.0.1:7860/"
    assert default in example
    monkeypatch.chdir(ROOT)
    exec(example.replace(default, address), {})
    assert "a sea lion instead of seal" in capsys.readouterr().out


@needs_gradio
@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")
def test_in_a_browser(address):
    with PageOfTabs(address) as page:
        page.choose("1f9ad.png")
        page.write("New answer", BALLOON)
        page.click("Teach")
        said = page.read("What the edit did")
        assert said.startswith("Edit 1 holds: 'seal' became 'a red balloon'")
        page.click("Ask")
        assert page.read("Answer") == BALLOON
        page.click("Undo")
        assert page.read("Done") == "undone: 1"
        page.tab("Change a picture")
        page.choose("1f9ad.png")
        page.click("Change")
        assert "blue" in page.read("Expressive instruction of the model")
        page.tab("Draw")
        page.click("Draw")
        page.wait_until(lambda: page.pictures() == 1)


@needs_gradio
@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")
def test_a_thing_is_learned_in_a_browser(address):
    with PageOfTabs(address) as page:
        page.tab("Draw")
        page.click("Teach it a thing of your own")
        page.click("Take four drawings of a goose")
        page.wait_until(lambda: page.files() == 4)
        page.write("Training steps", "3")
        page.click("Learn")
        assert page.read("Learned").startswith("learned <goose> from 4 pictures in ")
        assert page.read("What to draw") == "a drawing of a <goose>"
        page.wait_until(lambda: page.pictures() == 1)
        page.click("Forget all of mine")
        page.wait_until(lambda: page.read("Learned") == "forgotten: <goose>")
