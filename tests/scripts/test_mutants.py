"""The mutants of scripts/mutants.py: all of them still apply, and the script tells killed from survived."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))
from mutants import DoesNotApply, Mutant, apply, read_table

MUTANTS = read_table()


def functions_of(file: str) -> set[str]:
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_there_are_enough_of_them():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60


def test_every_mutant_applies():
    stale = []
    for mutant in MUTANTS:
        try:
            source = (ROOT / mutant.file).read_text()
            assert ast.dump(ast.parse(apply(source, mutant))) != ast.dump(
                ast.parse(source)
            )
        except (DoesNotApply, OSError) as error:
            stale.append(f"{mutant.name}: {error}")
    assert stale == []


def test_every_mutant_has_tests_that_are_there():
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or name in functions_of(file), test


SOURCE = """
def outer(a, b):
    if (a <
            b):
        return a   # a comment stays
    return b


class Box:
    def outer(self):
        return self
"""
MUTANT = Mutant("m", "box.py", "outer", "a < b", "a > b", ("tests/test_box.py",))


def test_a_place_is_found_however_it_is_laid_out():
    changed = apply(SOURCE, MUTANT)
    assert "if ((a > b)):\n        return a   # a comment stays" in changed
    inner = replace(MUTANT, function="Box.outer", old="return self", new="return None")
    assert apply(SOURCE, inner).endswith("return None\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "a <= b"}, "`a <= b` is not there"),
        ({"old": "return c"}, "`return c` is not there"),
        ({"old": "a"}, "`a` is there 2 times"),
        ({"function": "Box.inner"}, r"there is no Box\.inner"),
    ],
)
def test_a_mutant_that_does_not_apply_says_why(change, message):
    with pytest.raises(DoesNotApply, match=message):
        apply(SOURCE, replace(MUTANT, **change))


def test_killed_and_survived_are_told_apart(tmp_path):
    for folder in ("mmedit_cli", "tests", "scripts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mmedit_cli" / "__init__.py").touch()
    settings = '[tool.pytest.ini_options]\nfilterwarnings = ["error"]\n'
    (tmp_path / "pyproject.toml").write_text(settings)
    (tmp_path / "mmedit_cli" / "box.py").write_text(SOURCE)
    (tmp_path / "tests" / "test_box.py").write_text(
        "from mmedit_cli.box import outer\n\n\n"
        "def test_it():\n    assert outer(1, 2) == 1\n"
    )
    row = {**vars(MUTANT), "file": "mmedit_cli/box.py", "tests": list(MUTANT.tests)}
    rows = [
        {**row, "name": "noticed"},
        {**row, "name": "missed", "old": "return b", "new": "return a"},
        {**row, "name": "stale", "old": "a == b"},
    ]
    table = tmp_path / "table.yaml"
    table.write_text(yaml.safe_dump(rows))
    script = ROOT / "scripts" / "mutants.py"
    words = [sys.executable, script, "--root", tmp_path, "--table", table]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [(line[0], line[3]) for line in lines[:3]] == [
        ("killed", "noticed"),
        ("survived", "missed"),
        ("error", "stale"),
    ]
    assert lines[3][:3] == ["1", "of", "3"]
