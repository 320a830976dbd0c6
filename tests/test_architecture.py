"""The shape of the house: imports point down, public names are explained."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mmedit_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
# rows from the ground up; a module imports from rows below its own, or from its own row
ROWS = (
    {"errors", "types"},
    {
        "output",
        "reading",
        "reading_yaml",
        "hparams",
        "registry",
        "records",
        "storage",
        "runtime",
        "catalog",
        "identity",
        "model_folder",
        "not_a_model",
        "shapes",
        "patch",
        "adapters",
        "prefix",
        "pictures",
        "packed",
        "web",
        "hub",
        "download",
        "finite",
    },
    {"backbones", "datasets", "image_pairs", "subjects", "covariance"},
    {"editors", "personalizers", "image_editors"},
    {"evaluation", "training"},
    {"workflows", "reports"},
    {"edits"},
    {"options", "commands", "app", "__main__"},
)
ROW = {name: i for i, row in enumerate(ROWS) for name in row}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The dotted names a file imports from the package, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("mmedit_cli.")}


def test_every_module_has_a_row():
    assert {part_of(path) for path in FILES} - {"__init__"} == set(ROW)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return
    for name in imported(path):
        other = name.split(".")[1]
        assert ROW.get(other, 0) <= ROW[part_of(path)], f"{path.name} imports {name}"
        if part_of(path) == other and other in ("editors", "personalizers"):
            assert name.split(".")[2] in ("base",) or name.split(".")[2].startswith("_"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_take_few_arguments_and_name_what_they_catch(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and part_of(path) != "commands":
            arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            assert len(arguments) <= 7, f"{node.name}: {len(arguments)} arguments"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "bare except"
        assert not (isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)), "star import"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_are_explained(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the file has no docstring"
    for scope in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]:
        for node in scope.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_places_of_the_machine_are_named_in_one_file_only():
    for path in FILES:
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        if path.name not in ("runtime.py", "options.py"):
            assert "cuda" not in strings, path


def test_typer_is_known_to_the_command_line_only():
    for path in FILES:
        text = path.read_text()
        if part_of(path) not in ("app", "options", "commands"):
            assert "import typer" not in text, path


OPENS = {"from_pretrained"}
NOT_ASKED = {  # calls that take no such option, or run code that this program has written itself
    ("edits/exporting.py", "PeftModel.from_pretrained"),
    ("edits/exporting.py", "module.EditedModel.from_pretrained"),
}
ITS_OWN_USER_SAYS = {("editors/_runtime.py", "AutoModelForImageTextToText.from_pretrained")}  # runs without mmedit


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "scripts").rglob("*.py"))], ids=lambda path: path.name)
def test_no_code_of_others_is_run(path):
    """Whatever transformers or diffusers open is told `trust_remote_code=False`: left out, it asks on stdout."""
    place = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        builds = node.func.attr == "from_config" and called.startswith("Auto")
        if node.func.attr not in OPENS and not builds:
            continue
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (place, called) in ITS_OWN_USER_SAYS:
            assert "trust_remote_code" in said
        elif (place, called) not in NOT_ASKED:
            assert said.get("trust_remote_code") == "False", f"{place}:{node.lineno}: {called}"


def test_nothing_is_unpickled():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                assert not called.startswith("pickle."), path
                if called == "torch.load":
                    assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords], path


# where a file may be read past the one reader: our own sources, and what this program has just written itself
OWN_READERS = {
    "reading.py": "the one reader",
    "reading_yaml.py": "its YAML",
    "registry.py": "sources of this package, and its data",
    "packed.py": "zips that come along, and what was unpacked from them",
    "hparams.py": "its own YAML reader, on a text of the one reader",
    "editors/_flatten.py": "sources of this package",
    "editors/_runtime.py": "goes into exports, which run without this package",
    "backbones/_tiny_diffusion.py": "a tokenizer that was just made",
    "edits/shards.py": "compares what it reads with a digest before anything is made of it",
    "records.py": "its own encoding, to compare",
    "storage.py": "the header of what it has just made",
    "evaluation/vlm.py": "answers it has opened with the one reader before",
    "identity.py": "bytes for a digest",
    "image_editors/_loading.py": "bytes for a digest",
    "download/transfer.py": "a note of its own, which does not matter if it is damaged",
}
READS = {"json.loads", "json.load", "yaml.safe_load", "yaml.load", "yaml.compose", "safe_open"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_of_others_are_read_by_the_one_reader(path):
    if path.relative_to(PACKAGE).as_posix() in OWN_READERS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in READS, f"{called} in line {node.lineno}: use mmedit_cli.reading"
            method = called.rpartition(".")[2]
            of_a_file = isinstance(node.func, ast.Attribute) and method in ("read_text", "read_bytes")
            assert not of_a_file or called.startswith("reading."), f"{called} in line {node.lineno}"
