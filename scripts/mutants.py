"""Break the package on purpose, one small change at a time, and see whether its tests notice.

    python scripts/mutants.py                  # every mutant of scripts/mutants.yaml
    python scripts/mutants.py scope-any known-any

A mutant names a function, an expression or statement inside it, and what stands there instead; so it is found again
after code around it was moved or laid out anew. Each is put into a copy of the repository, and the tests it names run
there. Exit code 1: some survived, or no longer apply.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".yaml")
SECONDS = 600  # a mutant that runs longer than this hangs, and so was noticed
COPIED = ("mmedit_cli", "tests", "scripts")  # the rest of the repository is linked
LEFT_OUT = {".git", ".venv", "records"}
_CRASHED = 70  # no exit code of pytest: it did not get as far as the tests
# pytest warns of what was imported before it, and its settings here turn warnings into errors
_PRELOADED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
_CONTEXT = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


class DoesNotApply(Exception):
    """The code that a mutant changes is not there, or is there several times."""


@dataclass(frozen=True)
class Mutant:
    """One change: in `function` of `file` stands `new` instead of `old`; `tests` should fail then."""

    name: str
    file: str
    function: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed, survived, or an error with its reason."""

    mutant: Mutant
    word: str
    seconds: float = 0.0
    reason: str = ""


def read_table(path: Path = TABLE) -> list[Mutant]:
    """Return the mutants of a YAML file."""
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def apply(source: str, mutant: Mutant) -> str:
    """Return the source of a file with the mutant in it; raise DoesNotApply."""
    place = _find(ast.parse(source), mutant)
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: place.lineno - 1])) + place.col_offset
    end = sum(map(len, lines[: _last_line(place) - 1])) + (place.end_col_offset or 0)
    if isinstance(place, ast.expr):
        new = f"({mutant.new})"
    else:
        new = textwrap.indent(mutant.new, " " * place.col_offset).lstrip()
    text = source.encode()
    mutated = (text[:start] + new.encode() + text[end:]).decode()
    ast.parse(mutated)
    return mutated


def _find(module: ast.Module, mutant: Mutant) -> ast.expr | ast.stmt:
    inside = _is_expression(mutant.old) and _is_expression(mutant.new)
    kind = ast.expr if inside else ast.stmt
    text = ast.unparse(ast.parse(mutant.old))
    scope = _function(module, mutant.function)
    found = [
        node
        for node in ast.walk(scope)
        if isinstance(node, kind) and ast.unparse(node) == text
    ]
    if len(found) != 1:
        times = "is not there" if not found else f"is there {len(found)} times"
        raise DoesNotApply(f"{mutant.file}: {mutant.function}: `{text}` {times}")
    return found[0]


def _is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return True


def _function(module: ast.Module, dotted: str) -> ast.AST:
    """Return the function or class of this dotted name; an empty name is the module itself."""
    scope: ast.AST = module
    for name in filter(None, dotted.split(".")):
        inner = [node for node in ast.walk(scope) if getattr(node, "name", "") == name]
        if not inner:
            raise DoesNotApply(f"there is no {dotted}")
        scope = inner[0]
    return scope


def _last_line(node: ast.expr | ast.stmt) -> int:
    return node.end_lineno or node.lineno


def copy_repository(root: Path, target: Path) -> None:
    """Make a copy in which files of the package, the tests and the scripts may be changed."""
    for item in root.iterdir():
        if item.name in COPIED:
            shutil.copytree(item, target / item.name)
        elif item.name not in LEFT_OUT:
            (target / item.name).symlink_to(item)


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests in a copy of the repository; return pytest's exit code and what it said."""
    report = folder / "mutant.log"
    process = _CONTEXT.Process(target=_pytest, args=(folder, tests, report))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return 1, f"ran longer than {SECONDS} s"
    return process.exitcode or 0, report.read_text(encoding="utf-8")


def _pytest(folder: Path, tests: Sequence[str], report: Path) -> None:
    """Run pytest in this process, a child of its own for each mutant."""
    import pytest

    with report.open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)  # of programs that tests start
        sys.path.insert(0, str(folder))
        options = ["-x", "-q", "-p", "no:cacheprovider", *_PRELOADED]
        code = _CRASHED
        try:
            code = int(pytest.main([*options, "-m", "not gpu and not network", *tests]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def preload() -> None:
    """Import what every test imports but the package itself, once for all children."""
    temporary = tempfile.mkdtemp(prefix="mutants-")
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=temporary, OMP_NUM_THREADS="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false")
    for name in ("pytest", "torch", "transformers", "safetensors.torch", "typer"):
        importlib.import_module(name)


def judge(root: Path, mutant: Mutant) -> Verdict:
    """Put one mutant into a copy, run its tests there, and say whether they noticed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        copy_repository(root, copy)
        file = copy / mutant.file
        try:
            file.write_text(apply(file.read_text(encoding="utf-8"), mutant))
        except (DoesNotApply, OSError, SyntaxError) as error:
            return Verdict(mutant, "error", reason=str(error))
        code, said = run_tests(copy, mutant.tests)
    seconds = time.monotonic() - began
    if code in (0, 1):
        return Verdict(mutant, "survived" if code == 0 else "killed", seconds)
    return Verdict(mutant, "error", seconds, f"no test ran: {said.strip()[-500:]}")


def _passes(root: Path, mutants: Sequence[Mutant]) -> bool:
    """Tell whether the tests pass without any mutant; say what they said if not."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_repository(root, Path(folder))
        code, said = run_tests(Path(folder), tests)
    if code:
        print(said[-3000:])
        print("error: the tests fail without any mutant")
    return not code


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the mutants of a table and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="only these mutants")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args(arguments)
    mutants = read_table(given.table)
    if given.names:
        known = {mutant.name: mutant for mutant in mutants}
        if unknown := [name for name in given.names if name not in known]:
            parser.error(f"no mutant {unknown[0]} in {given.table}")
        mutants = [known[name] for name in given.names]
    preload()
    if not _passes(given.root, mutants):
        return 1
    verdicts = []
    for mutant in mutants:
        verdict = judge(given.root, mutant)
        name, reason = verdict.mutant.name, verdict.reason
        print(f"{verdict.word:9}{verdict.seconds:5.0f} s  {name}  {reason}", flush=True)
        verdicts.append(verdict)
    killed = sum(verdict.word == "killed" for verdict in verdicts)
    print(f"{killed} of {len(verdicts)} mutants were killed")
    for verdict in verdicts:
        if verdict.word != "killed":
            print(f"  {verdict.word}: {verdict.mutant.name}")
    return int(killed < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
