"""What the README and the pages it leads to show is what happens: commands are run, outputs are compared."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, assert_happens

TEXT = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"


def blocks_of(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands_of(page: Path, start: str) -> list[str]:
    """The lines of a page's bash blocks that start so, without their remarks."""
    lines = "".join(blocks_of(page, "bash")).splitlines()
    commands = [line.partition(" #")[0].strip() for line in lines]
    return [command for command in commands if command.startswith(start)]


SETUPS = commands_of(ROOT / "README.md", "python3 -m venv")
COMMANDS = commands_of(DOCS / "commands.md", "mmedit ")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_two_commands_do_all_the_set_up():
    assert len(SETUPS) == 2
    assert all("pip install -q -e" in line for line in SETUPS)


def test_it_is_read_in_two_minutes():
    assert len(TEXT.splitlines()) <= 150


def test_ci_runs_exactly_the_test_command_and_then_slow_tests():
    commands = (ROOT / ".ci" / "run").read_text().splitlines()[-2:]
    assert commands[0] == SETUPS[1]
    assert commands[1].startswith(".venv/bin/python -m pytest -n 2 -m ")
    assert "slow and not nightly" in commands[1]


NUMBER = re.compile(r"\d[\d,]*\.?\d*")
SHOWN = (ROOT / "README.md", DOCS / "tutorials" / "thousand-edits.md")
TOLERANCE = 0.5  # in %: on another processor an answer or two of a thousand may differ


def words_of(line: str) -> list[str]:
    """The words of a line, with `#` for each number."""
    return NUMBER.sub("#", line).split()


def is_shown(line: str, printed: str) -> bool:
    """Whether a printed line is the one shown: the same words, numbers within the tolerance, any times."""
    if words_of(line) != words_of(printed):
        return False
    of_time = " a second" in line
    shown, real = (
        [float(number.replace(",", "")) for number in NUMBER.findall(text)]
        for text in (line, printed)
    )
    return of_time or shown == pytest.approx(real, abs=TOLERANCE)


def assert_shown(shown: list[str], printed: list[str]) -> None:
    """Check that the lines shown are printed in their order, without others between them but at `...`.

    Empty lines do not count.
    """
    shown = [line for line in shown if line.strip()]
    printed = [line for line in printed if line.strip()]
    place, gap = 0, False
    for line in shown:
        if line.strip() == "...":
            gap = True
            continue
        left = printed[place:] if gap else printed[place : place + 1]
        found = [i for i, other in enumerate(left) if is_shown(line, other)]
        assert found, f"not printed here: {line}"
        place, gap = place + found[0] + 1, False


def test_figures_are_compared_as_numbers():
    row = "ar  Rel   0.3   100.0 ±39.7   85.4 ±1.7"
    assert_shown([row], [row.replace("85.4", "85.8")])
    assert_shown(["a", "...", row], ["a", "b", "c", row])
    assert_shown(["1,247 edits, 9 a second"], ["1,247 edits, 214 a second"])
    for other in ([row.replace("85.4", "86.0")], ["b", row], [row.replace("Rel", "x")]):
        with pytest.raises(AssertionError, match="not printed here"):
            assert_shown([row], other)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_experiment_prints_what_is_shown(cli):
    words = shlex.split(SETUPS[0].rpartition("&& ")[2])
    assert words[0] == ".venv/bin/mmedit"
    code, out, _ = cli(*words[1:])
    assert code == 0
    for page in SHOWN:
        (shown,) = blocks_of(page, "text")
        assert_shown(shown.splitlines(), out.splitlines())


def test_the_readme_and_the_tutorial_show_the_same_figures():
    short, long = (blocks_of(page, "text")[0].splitlines() for page in SHOWN)
    assert set(short) < set(long)
    assert long.index(short[-1]) == len(long) - 1


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works(cli, command):
    code, out, err = cli(*shlex.split(command)[1:])
    assert code == 0, err
    assert out


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    """A folder of its own, with the data in their place: what is written does not land in the checkout."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
def test_the_dialogue_happens_as_shown(cli):
    (dialogue,) = blocks_of(ROOT / "README.md", "console")
    assert_happens(cli, dialogue, turns=6)


@pytest.mark.usefixtures("elsewhere")
def test_the_library_example_of_the_ledger(capsys):
    (code,) = blocks_of(DOCS / "edits.md", "python")
    exec(compile(code, "edits.md", "exec"), {})
    assert capsys.readouterr().out == "['a red balloon']\n['banjo']\n"


def test_the_error_that_is_shown(cli):
    (block,) = blocks_of(DOCS / "commands.md", "text")
    command, *expected = block.strip().splitlines()
    code, _, err = cli(*shlex.split(command.removeprefix("$ mmedit ")))
    assert (code, err.splitlines()) == (2, expected)


def test_the_library_example(capsys):
    code, _ = blocks_of(DOCS / "library.md", "python")
    exec(compile(code, "library.md", "exec"), {})
    assert capsys.readouterr().out == "['red balloon']\n"


def test_the_tables_name_every_editor_and_family():
    from mmedit_cli import registry

    text = (DOCS / "editors.md").read_text()
    for name in (
        *registry.editors.names(),
        *registry.backbones.names(),
        *registry.drawing_models.names(),
    ):
        assert f"| `{name}` |" in text
    for name in registry.personalizers.names():
        assert f"`{name}`" in text


def test_links_lead_somewhere():
    for page in (
        ROOT / "README.md",
        *sorted(DOCS.rglob("*.md")),
        ROOT / "CONTRIBUTING.md",
    ):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / Path(target)).exists(), f"{page.name}: {target}"
