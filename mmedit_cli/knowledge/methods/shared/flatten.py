"""One Python file out of several: what it imports from this package is written into it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

_PACKAGE = "mmedit_cli."


def flatten(file: Path) -> str:
    """Return the source of a file with everything it imports from this package written into it.

    What is written in brings what it needs in turn; names that only annotations use are left out. Raises ValueError
    if two modules give different things the same name.
    """
    here = _Module(file)
    modules: dict[str, _Module] = {}
    needed: dict[str, str] = {}  # name -> its module
    above: dict[str, set[str]] = {}  # module -> those that have to stand above it

    def need(origin: str, name: str) -> None:
        if name in needed:
            if needed[name] != origin:
                raise ValueError(
                    f"{file.name}: both {origin} and {needed[name]} define {name}"
                )
            return
        needed[name] = origin
        module = modules.setdefault(origin, _Module(_file(origin)))
        for other in _used(module.defined[name]):
            if other in module.defined:
                need(origin, other)
            elif other in module.imported:
                above.setdefault(origin, set()).add(module.imported[other][0])
                need(*module.imported[other])

    for origin, name in here.imported.values():
        above.setdefault(origin, set())
        need(origin, name)
    body = []
    for origin in TopologicalSorter(above).static_order():
        names = {name for name, owner in needed.items() if owner == origin}
        body += modules[origin].written(names)
    first, *_, last = here.imports
    body += here.lines[last:]
    outside = _outside([here, *modules.values()], "\n".join(body))
    return "\n".join([*here.lines[: first - 1], *outside, *body]) + "\n"


class _Module:
    """One file: what it defines, and what it imports from this package (name -> module, name there) and elsewhere.

    `imports` are the numbers of the first and last line of each import, in order, but for that of the future.
    """

    def __init__(self, file: Path) -> None:
        source = file.read_text(encoding="utf-8")
        self.lines = source.splitlines()
        self.imports: list[int] = []
        self.imported: dict[str, tuple[str, str]] = {}
        # where from ("": a module as a whole), and what
        self.outside: list[tuple[str, ast.alias]] = []
        self.defined: dict[str, ast.stmt] = {}
        for node in ast.parse(source).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                self.defined |= dict.fromkeys(_names(node), node)
                continue
            origin = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            if origin == "__future__":
                continue
            self.imports += [node.lineno, node.end_lineno or node.lineno]
            if origin.startswith(_PACKAGE):
                self.imported |= {
                    alias.asname or alias.name: (origin, alias.name)
                    for alias in node.names
                }
            else:
                self.outside += [(origin, alias) for alias in node.names]

    def written(self, names: set[str]) -> list[str]:
        """Return the lines that define these names, in the order of the file."""
        found: list[str] = []
        wanted = [node for name, node in self.defined.items() if name in names]
        for node in dict.fromkeys(wanted):
            decorators = getattr(node, "decorator_list", [])
            starts = [node.lineno, *(decorator.lineno for decorator in decorators)]
            lines = self.lines[min(starts) - 1 : node.end_lineno]
            found += ["", "", *lines]
        return found


def _outside(modules: Sequence[_Module], text: str) -> list[str]:
    """Return the imports from elsewhere whose names the text uses, each once, in order."""
    wanted: dict[str, set[str]] = {}
    for module in modules:
        for origin, alias in module.outside:
            name = alias.asname or alias.name
            if re.search(rf"\b{name}\b", text):
                names = wanted.setdefault(origin, set())
                names.add(ast.unparse(alias))
    modules_as_a_whole = sorted(wanted.pop("", ()))
    lines = [f"import {name}" for name in modules_as_a_whole]
    for origin, names in sorted(wanted.items()):
        listed = ", ".join(sorted(names))
        lines.append(f"from {origin} import {listed}")
    return lines


def _file(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [getattr(node, "target", None)]
    )
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _used(node: ast.AST) -> Iterator[str]:
    """Yield the names that are read when a definition runs: those in annotations are not."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _used(child)
