"""One Python file out of several: what it imports from this package is written into it."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

_PACKAGE = "mmedit_cli."


def flatten(file: Path) -> str:
    """Return the source of a file in which every `from mmedit_cli... import a, b` is replaced by what a and b are.

    The names of this package that those need in turn have to be imported there as well.
    """
    source = file.read_text(encoding="utf-8")
    lines, out, at = source.splitlines(), [], 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(_PACKAGE):
            out += lines[at : node.lineno - 1]
            module = importlib.import_module(str(node.module))
            out += _definitions(module, {alias.name for alias in node.names})
            at = node.end_lineno or node.lineno
    return "\n".join([*out, *lines[at:]]) + "\n"


def _definitions(module: ModuleType, names: set[str]) -> list[str]:
    """Return the lines that define these names of a module, in its own order, after what it imports from elsewhere."""
    source = inspect.getsource(module)
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            outside = not ast.unparse(node).startswith((f"from {_PACKAGE}", "from __future__"))
            found += [ast.unparse(node)] if outside else []
            continue
        if isinstance(node, ast.Assign):
            defined = {target.id for target in node.targets if isinstance(target, ast.Name)}
        else:
            defined = {node.name} if isinstance(node, ast.ClassDef | ast.FunctionDef) else set()
        if defined & names:
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found += ["", "", *lines[start - 1 : node.end_lineno]]
    return found
