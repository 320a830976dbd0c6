"""Measure the shape of the package: how dense its functions are, and whether its imports go one way.

    python scripts/measure_house.py                 # this checkout
    python scripts/measure_house.py PATH/mmedit_cli  # another one

A syntax node is a node of Python's `ast`. A code line has at least one token that is neither comment nor docstring.
Functions with fewer than three lines of body are left out: a single `return` says nothing about how code is folded.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "mmedit_cli"
SHORTEST = 3  # lines of a body
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Return every syntax node of a file, the module first; a file is parsed once."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def density_of_functions(source: str) -> list[float]:
    """Return syntax nodes a code line for the body of every function of a file."""
    tree = ast.parse(source)
    code = _code_lines(source)
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, _FUNCTIONS):
            continue
        has_docstring = ast.get_docstring(function, clean=False) is not None
        body = function.body[1:] if has_docstring else function.body
        if not body:
            continue
        last = body[-1].end_lineno or body[-1].lineno
        lines = [line for line in range(body[0].lineno, last + 1) if line in code]
        if len(lines) >= SHORTEST:
            nodes = sum(1 for statement in body for _ in ast.walk(statement))
            found.append(nodes / len(lines))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies (nearest rank); 0 where there are none."""
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0


def module_name(path: Path, package: Path) -> str:
    """Return the dotted name of a file below the package, the package itself being `mmedit_cli`."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: set[str], *, lazily: bool = True) -> set[str]:
    """Return the modules of the package that a file imports; `lazily` counts those imported inside functions too."""
    nodes = nodes_of(path) if lazily else _at_the_top(nodes_of(path)[0])
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return found & modules


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return which modules of the package each module imports."""
    files = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    names = set(files)
    inner = names - {package.name}  # the package itself only points to public names
    return {
        name: imported_modules(files[name], inner) - {name} for name in sorted(inner)
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return circles of imports, shortest way found first; one circle for each edge that has to go."""
    graph = {name: set(others) for name, others in graph.items()}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = list(
                reversed(error.args[1])
            )  # a, b, ..., a: each imports the next
            found.append(circle)
            graph[circle[0]].discard(circle[1])
        else:
            return found


def private_imports(package: Path) -> list[str]:
    """Return the imports of a private module or name that cross from one folder into another."""
    found = []
    for path in sorted(package.rglob("*.py")):
        here = module_name(path.parent / "__init__.py", package)
        for name in _imported_names(path):
            owner = _owner_of_private(name)
            inside = name.startswith(f"{package.name}.")
            if inside and owner not in (None, here):
                found.append(f"{path.relative_to(package)}: {name}")
    return found


def relative_imports(package: Path) -> list[str]:
    """Return the files with a relative import, which `import_graph` does not see."""
    found = []
    for path in sorted(package.rglob("*.py")):
        imports = [n for n in nodes_of(path) if isinstance(n, ast.ImportFrom)]
        if any(node.level for node in imports):
            found.append(str(path.relative_to(package)))
    return found


def _imported_names(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file takes with `from ... import ...`."""
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def _owner_of_private(name: str) -> str | None:
    """Return the package that the first private part of a name belongs to, None where no part is private."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.startswith("_") and not part.startswith("__"):
            return ".".join(parts[:place])
    return None


def _code_lines(source: str) -> set[int]:
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - _docstring_lines(ast.parse(source))


def _count_comments(source: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(
            node, (ast.Module, ast.ClassDef, *_FUNCTIONS)
        ) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def _at_the_top(module: ast.AST) -> Iterator[ast.AST]:
    assert isinstance(module, ast.Module)
    for node in module.body:
        if isinstance(node, ast.If):  # `if TYPE_CHECKING:` makes no circle
            continue
        yield node


def main() -> None:
    """Print the figures of a package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", nargs="?", type=Path, default=PACKAGE)
    package = parser.parse_args().package.resolve()
    files = sorted(package.rglob("*.py"))
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    by_file = {path: density_of_functions(source) for path, source in sources.items()}
    everything = [density for densities in by_file.values() for density in densities]
    dense = [
        path for path, densities in by_file.items() if percentile(densities, 0.95) > 14
    ]
    dense.sort(key=lambda path: -percentile(by_file[path], 0.95))
    code = sum(len(_code_lines(source)) for source in sources.values())
    comments = sum(_count_comments(source) for source in sources.values())
    skips = sum(source.count("# fmt: skip") for source in sources.values())
    median = statistics.median(everything)
    high = percentile(everything, 0.95)
    figures = {
        "files": len(files),
        "folders": len({path.parent for path in files}),
        "code lines": code,
        "comments per 100 code lines": f"{100 * comments / code:.1f}",
        "nodes a line of a function, median": f"{median:.1f}",
        "nodes a line of a function, 95th percentile": f"{high:.1f}",
        "files whose 95th percentile is above 14": len(dense),
        "`# fmt: skip`": skips,
        "private imports across folders": len(private_imports(package)),
        "circles of imports": len(circles(import_graph(package))),
    }
    for name, value in figures.items():
        print(f"{name:45}{value}")
    for path in dense:
        print(f"  {percentile(by_file[path], 0.95):5.1f}  {path.relative_to(package)}")


if __name__ == "__main__":
    main()
