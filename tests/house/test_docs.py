"""What the pages show is what happens: tutorials are followed, error messages are made, the site is built.

In a tutorial every command is run, in order and in one folder, but for those below `<!-- not run: why -->`. A block
below `<!-- file: NAME -->` is written to that file before.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from notebooks import TUTORIALS, written

DOCS = ROOT / "docs"
PAGES = sorted(TUTORIALS.glob("*.md"))
FOLLOWED = (DOCS / "index.md", *PAGES)
BLOCK = re.compile(r"(?:<!-- ([^>]*?) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
SHELL = ("cp", "mkdir")  # what a tutorial may call besides mmedit


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its remark, its language and its text."""

    remark: str
    language: str
    text: str

    def turns(self) -> Iterator[tuple[list[str], list[str]]]:
        """Yield each command of a dialogue, in words, and the lines shown below it."""
        for turn in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, *shown = turn.rstrip().splitlines()
            yield shlex.split(command), shown


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    return [Block(*found) for found in BLOCK.findall(page.read_text())]


def assert_in_order(shown: list[str], printed: list[str], what: str) -> None:
    """Check that the lines shown are printed, in their order; only `...` stands for others between them."""
    left = [line.rstrip() for line in printed if line.strip()]
    gap = False
    for line in (line.rstrip() for line in shown if line.strip()):
        if line == "...":
            gap = True
            continue
        most = len(left) if gap else 1
        assert line in left[:most], f"{what}: {line}"
        left, gap = left[left.index(line) + 1 :], False
    assert gap or not left or not shown, f"{what}: {left[0]}"


def test_only_dots_stand_for_lines():
    assert_in_order(["a", "...", "d"], ["a", "b", "c", "d"], "whole")
    for shown in (["a", "d"], ["d", "...", "a"], ["a"]):
        with pytest.raises(AssertionError):
            assert_in_order(shown, ["a", "b", "c", "d"], "not so")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder to follow a page in, with the data in their place."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(cli, page: Path) -> int:
    """Do what a page says, and return the number of commands."""
    count = 0
    for block in blocks_of(page):
        kind, _, name = block.remark.partition(": ")
        if kind == "file":
            Path(name).write_text(block.text)
        if kind == "not run" or block.language != "console":
            continue
        for words, shown in block.turns():
            do(cli, words, shown)
            count += 1
    return count


def do(cli, words: list[str], shown: list[str]) -> None:
    """Run a command, and compare what it prints."""
    if words[0] in SHELL:
        subprocess.run(words, check=True)
        return
    assert words[0] == "mmedit"
    code, out, err = cli(*words[1:])
    assert code == 0, f"{words}: {err}"
    assert_in_order(shown, out.splitlines(), shlex.join(words))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_a_tutorial_can_be_followed(cli, elsewhere, monkeypatch, page):
    monkeypatch.delenv("MMEDIT_RECORDS")  # as for a reader: in the folder
    assert follow(cli, page)


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_every_command_of_a_tutorial_is_run_or_says_why_not(page):
    for block in blocks_of(page):
        commands = re.findall(r"^(?:\$ )?mmedit ", block.text, re.MULTILINE)
        if commands and block.language != "console":
            assert block.remark.startswith(("not run: ", "output of: ")), block.text


def cells_of(page: Path) -> list[str]:
    """The code of the notebook of a tutorial, cell by cell."""
    cells = json.loads(written(page))["cells"]
    return [cell["source"] for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_does_what_its_tutorial_does(page):
    expected: list[str] = []
    for block in blocks_of(page):
        kind, _, name = block.remark.partition(": ")
        if kind == "file":
            expected.append(f"%%writefile {name}\n{block.text.rstrip()}")
        elif kind != "not run" and block.language == "console":
            expected += [shlex.join(words) for words, _ in block.turns()]
    done: list[str] = []
    for cell in cells_of(page):
        if cell.startswith("!"):
            lines = cell.splitlines()
            done += [shlex.join(shlex.split(line.removeprefix("!"))) for line in lines]
        elif cell.startswith("%%"):
            done.append(cell)
    assert done == expected
    text = written(page)
    assert len(text) < 20_000
    for link in re.findall(r"\]\((\.\./[^)#]*)", text):
        assert (ROOT / "notebooks" / link).resolve().exists(), link


def run_cell(cell: str) -> None:
    """Run a cell as a notebook does: commands of the shell, a file to write, or Python."""
    head, _, rest = cell.partition("\n")
    if head.startswith("%%writefile "):
        Path(head.split()[1]).write_text(rest + "\n")
    elif cell.startswith("!"):
        for line in cell.splitlines():
            subprocess.run(line.removeprefix("!"), shell=True, check=True)
    elif "IPython" not in cell:
        exec(compile(cell, "cell", "exec"), {})
    else:
        for picture in re.findall(r'Image\("(.*)"\)', cell):
            assert Path(picture).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [
        page
        if page.stem == "own-data"
        else pytest.param(page, marks=pytest.mark.nightly)
        for page in PAGES
    ],
    ids=lambda page: page.stem,
)
def test_a_notebook_can_be_run(elsewhere, monkeypatch, page):
    monkeypatch.delenv("MMEDIT_RECORDS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the first cell changes it
    for cell in cells_of(page):
        run_cell(cell)


def test_error_messages_are_those_of_the_program(cli, elsewhere, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MMEDIT_RECORDS")
    shutil.copy(ROOT / "data/models/mini-sd/samples.webp", "apple.png")
    Path("notes").mkdir()
    Path("notes/today.txt").write_text("buy milk")
    Path("my_facts.csv").write_text(
        "image,prompt,target\n,Who wrote Dune?,Frank Herbert\n,Who wrote Emma?,\n"
    )
    turns = [turn for block in blocks_of(DOCS / "faq.md") for turn in block.turns()]
    assert len(turns) > 20
    for words, shown in turns:
        code, _, err = cli(*words[1:])
        assert code == 2, words
        printed = err.replace(f"{ROOT}/", "").splitlines()
        assert_in_order(shown, printed, shlex.join(words))


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    listed = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    assert pages <= listed, "add it to the nav of mkdocs.yml"


def build(to: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does; no connection can be made."""
    settings = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", to, *options],
        cwd=ROOT,
        env=os.environ | settings | {"https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'mmedit-cli[docs]'")
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    loads = re.compile(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="?https?://')
    assert not [page for page in pages if loads.search(page.read_text())]
    commands = (tmp_path / "reference" / "commands.html").read_text()
    library = (tmp_path / "reference" / "python.html").read_text()
    assert 'id="mmedit-edits-undo"' in commands
    assert "--sequential" in commands
    assert 'id="mmedit_cli.load_editor"' in library


@pytest.mark.slow
def test_a_broken_link_fails(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'mmedit-cli[docs]'")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[there](nowhere.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text().partition("nav:\n  - Start")[0]
    hook = ROOT / "scripts" / "site_hooks.py"
    settings = settings.replace("scripts/site_hooks.py", str(hook))
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build(tmp_path / "site", "-f", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr
