"""The shape of the house: imports point down, public names are explained."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from measure_house import (
    PACKAGE,
    circles,
    density_of_functions,
    import_graph,
    nodes_of,
    percentile,
    private_imports,
    relative_imports,
)

FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up: a module imports from rows below its own, or from its own row.
ROWS = (
    {"errors", "in_hand", "types", "web"},
    {
        "adapters",
        "assembled",
        "catalog",
        "download",
        "eight_bits",
        "finite",
        "gallery",
        "hparams",
        "hub",
        "identity",
        "layers",
        "model_folder",
        "not_a_model",
        "output",
        "packed",
        "page",
        "patch",
        "pickled_weights",
        "picture_changes",
        "pictures",
        "plugins",
        "reading",
        "reading_yaml",
        "records",
        "registry",
        "runtime",
        "shapes",
        "storage",
        "vocabulary",
    },
    {"knowledge"},
    {"drawing"},
    {"picture_editing"},
    {"doctor", "installation", "reports", "serving", "ui"},
    {"options", "kinds", "commands", "app", "__main__"},
)
# The same inside each of the three domains.
DOMAIN_ROWS = (
    {"models", "covariance"},
    {"data"},
    {"methods"},
    {"trained_networks", "evaluation", "training_loop", "loading"},
    {"ledger"},
    {"workflow"},
)
DOMAINS = {"knowledge", "drawing", "picture_editing"}
ROW = {name: i for i, row in enumerate(ROWS) for name in row}
DOMAIN_ROW = {name: i for i, row in enumerate(DOMAIN_ROWS) for name in row}
# Where functions have an argument an option.
COMMANDS = ("commands", "kinds")


# Syntax nodes a line of a function (`scripts/measure_house.py`): of a file at most, and of the package in the middle.
DENSEST, MIDDLE = 14, 9.0


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_of(module: str) -> tuple[str, ...]:
    """The parts of a module's dotted name below the package."""
    return tuple(module.split(".")[1:])


def goes_up(importer: str, imported: str) -> bool:
    """Tell whether an import points to a row above; both are dotted names of modules."""
    here, there = room_of(importer), room_of(imported)
    tower = here[0]
    if tower != there[0]:
        return ROW[there[0]] > ROW[tower]
    if tower not in DOMAINS or len(here) < 2 or len(there) < 2:
        return False
    return DOMAIN_ROW[there[1]] > DOMAIN_ROW[here[1]]


def method_of(module: str) -> tuple[str, str] | None:
    """The domain and the method that a module belongs to, None for what is no method's own."""
    room = room_of(module)
    if len(room) < 3 or room[0] not in DOMAINS or room[1] != "methods":
        return None
    return None if room[2] in ("base", "shared") else (room[0], room[2])


def test_every_module_has_a_row(graph):
    assert {part_of(path) for path in FILES} - {"__init__"} == set(ROW)
    rooms = [room_of(module) for module in graph]
    inside = {room[1] for room in rooms if room[0] in DOMAINS and len(room) > 1}
    assert inside == set(DOMAIN_ROW)


def test_imports_are_absolute():
    assert relative_imports(PACKAGE) == []


def test_imports_point_down(graph):
    edges = [(importer, name) for importer, names in graph.items() for name in names]
    assert sorted(edge for edge in edges if goes_up(*edge)) == []


def test_imports_do_not_run_in_circles(graph):
    found = [" -> ".join(circle) for circle in circles(graph)]
    assert found == []


def test_functions_are_not_folded():
    densities = {
        place_of(path): density_of_functions(path.read_text()) for path in FILES
    }
    too_dense = {}
    for place, found in densities.items():
        high = percentile(found, 0.95)
        if high > DENSEST:
            too_dense[place] = round(high, 1)
    assert too_dense == {}
    assert statistics.median(chain.from_iterable(densities.values())) <= MIDDLE


def test_methods_share_through_the_room_for_what_is_shared(graph):
    """A method imports the base class, what is shared, and its own files; never another method of its domain."""
    for importer, names in graph.items():
        ours = method_of(importer)
        for name in names:
            theirs = method_of(name)
            if ours and theirs and ours[0] == theirs[0]:
                assert ours == theirs, f"{importer} imports {name}"


def test_what_others_use_has_no_underscore():
    assert private_imports(PACKAGE) == []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """What every module of the package imports."""
    return import_graph(PACKAGE)


def place_of(path: Path) -> str:
    """A file's path below the package, or its name where it lies outside."""
    inside = path.is_relative_to(PACKAGE)
    return path.relative_to(PACKAGE).as_posix() if inside else path.name


def nodes(*kinds: type[ast.AST], among: Sequence[Path] = FILES):
    """Yield (path, node) for every syntax node of these kinds in the package."""
    for path in among:
        for node in nodes_of(path):
            if isinstance(node, kinds):
                yield path, node


def at(path: Path, node: ast.AST) -> str:
    return f"{place_of(path)}:{getattr(node, 'lineno', 1)}"


def test_functions_take_few_arguments():
    too_many = []
    for path, function in nodes(ast.FunctionDef):
        parameters = (*function.args.args, *function.args.kwonlyargs)
        named = [p.arg for p in parameters if p.arg not in ("self", "cls")]
        if len(named) > 7 and part_of(path) not in COMMANDS:
            too_many.append(f"{at(path, function)}: {function.name}")
    assert too_many == []


def test_what_is_caught_and_imported_is_named():
    bare = [at(*found) for found in nodes(ast.ExceptHandler) if found[1].type is None]
    assert bare == []
    starred = [
        at(path, node)
        for path, node in nodes(ast.ImportFrom)
        if any(alias.name == "*" for alias in node.names)
    ]
    assert starred == []


def public(scope: ast.Module | ast.ClassDef):
    """Yield a scope and what it defines by a public name, methods of public classes too."""
    yield scope
    for node in scope.body:
        named = isinstance(node, ast.ClassDef | ast.FunctionDef)
        if named and not node.name.startswith("_"):
            of_a_module = isinstance(scope, ast.Module)
            inner = isinstance(node, ast.ClassDef) and of_a_module
            yield from public(node) if inner else (node,)


def test_public_names_are_explained():
    unexplained = [
        f"{at(path, node)}: {getattr(node, 'name', 'the file')}"
        for path, module in nodes(ast.Module)
        for node in public(module)
        if not ast.get_docstring(node) and not getattr(node, "name", "").startswith("_")
    ]
    assert unexplained == []


def test_places_of_the_machine_are_named_in_one_file_only():
    named = [at(*found) for found in nodes(ast.Constant) if found[1].value == "cuda"]
    elsewhere = [
        place for place in named if not place.startswith(("runtime.py", "options.py"))
    ]
    assert elsewhere == []


def test_typer_is_known_to_the_command_line_only():
    for path in FILES:
        text = path.read_text()
        if part_of(path) not in ("app", "options", "kinds", "commands"):
            assert "import typer" not in text, path


OPENS = {"from_pretrained"}
NOT_ASKED = {  # calls that take no such option, or run code that this program has written itself
    ("knowledge/workflow/exporting.py", "PeftModel.from_pretrained"),
    ("knowledge/workflow/exporting.py", "module.EditedModel.from_pretrained"),
}
ITS_OWN_USER_SAYS = {
    (
        "knowledge/methods/shared/exported_runtime.py",
        "auto.from_pretrained",
    )
}  # runs without mmedit


def test_no_code_of_others_is_run():
    """Whatever transformers or diffusers open is told `trust_remote_code=False`: left out, it asks on stdout."""
    scripts = sorted((ROOT / "scripts").rglob("*.py"))
    for path, node in nodes(ast.Call, among=[*FILES, *scripts]):
        if not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in (*OPENS, "from_config"):
            continue
        place, called = place_of(path), ast.unparse(node.func)
        if node.func.attr == "from_config" and not called.startswith("Auto"):
            continue
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (place, called) in ITS_OWN_USER_SAYS:
            assert "trust_remote_code" in said
        elif (place, called) not in NOT_ASKED:
            assert said.get("trust_remote_code") == "False", (
                f"{place}:{node.lineno}: {called}"
            )


def test_nothing_is_unpickled():
    for path, node in nodes(ast.Call):
        if not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        assert not called.startswith("pickle."), at(path, node)
        if called == "torch.load":
            said = [ast.unparse(keyword) for keyword in node.keywords]
            assert "weights_only=True" in said, at(path, node)


# where a file may be read past the one reader: our own sources, and what this program has just written itself
OWN_READERS = {
    "reading.py": "the one reader",
    "reading_yaml.py": "its YAML",
    "registry.py": "data of this package",
    "plugins.py": "sources of this package and of plug-ins",
    "packed.py": "zips that come along, and what was unpacked from them",
    "hparams.py": "its own YAML reader, on a text of the one reader",
    "knowledge/methods/shared/flatten.py": "sources of this package",
    "knowledge/methods/shared/exported_runtime.py": "goes into exports, which run without this package",
    "drawing/models/tiny.py": "a tokenizer that was just made",
    "knowledge/ledger/shards.py": "compares what it reads with a digest before anything is made of it",
    "records.py": "its own encoding, to compare",
    "storage.py": "the header of what it has just made",
    "knowledge/evaluation/protocol.py": "answers it has opened with the one reader before",
    "identity.py": "bytes for a digest",
    "picture_editing/methods/shared/loading.py": "bytes for a digest",
    "download/transfer.py": "a note of its own, which does not matter if it is damaged",
}
READS = {
    "json.loads",
    "json.load",
    "yaml.safe_load",
    "yaml.load",
    "yaml.compose",
    "safe_open",
}


def reads_past_the_reader(call: ast.Call) -> bool:
    called = ast.unparse(call.func)
    method = called.rpartition(".")[2]
    of_a_file = isinstance(call.func, ast.Attribute) and method in (
        "read_text",
        "read_bytes",
    )
    return called in READS or (of_a_file and not called.startswith("reading."))


def test_files_of_others_are_read_by_the_one_reader():
    ours = [path for path in FILES if place_of(path) not in OWN_READERS]
    past = [
        at(path, call)
        for path, call in nodes(ast.Call, among=ours)
        if reads_past_the_reader(call)
    ]
    assert past == [], "use mmedit_cli.reading"
