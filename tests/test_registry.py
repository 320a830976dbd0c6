"""Names come from file names, and nothing is imported before it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmedit_cli import registry
from mmedit_cli.errors import UnknownName
from mmedit_cli.registry import Registry

BOOM = 'raise RuntimeError("imported")\n'


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """Return a registry of editors over a package made for one test."""
    package = tmp_path / "zoo_of_test" / "editors"
    (package / "folder").mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    for name, text in {
        "__init__": "",
        "base": BOOM,
        "_parts": BOOM,
        "multi_melo": '"""Melts edits together.\n\nAt length.\n"""\n\nEDITOR = "melo"\n',
        "ft": f'"""Fine-tunes."""\n{BOOM}',
        "bare": "EDITOR = 1\n",
        "folder/__init__": '"""Lives in a folder."""\n\nEDITOR = "folder"\n',
    }.items():
        (package / f"{name}.py").write_text(text)
    (package / "notes.txt").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("zoo_of_test.editors", "EDITOR")
    for module in [name for name in sys.modules if name.startswith("zoo_of_test")]:
        del sys.modules[module]


def test_names_are_file_names_and_nothing_is_imported(zoo: Registry[str]) -> None:
    assert zoo.names() == ["bare", "folder", "ft", "multi-melo"]
    assert "zoo_of_test.editors" not in sys.modules


def test_get_takes_both_spellings(zoo: Registry[str]) -> None:
    assert zoo.get("multi-melo") == zoo.get("multi_melo") == "melo"
    assert zoo.get("folder") == "folder"
    with pytest.raises(RuntimeError, match="imported"):
        zoo.get("ft")


def test_summary_does_not_import(zoo: Registry[str]) -> None:
    summaries = {name: zoo.summary(name) for name in zoo.names()}
    assert summaries == {
        "bare": "",
        "folder": "Lives in a folder.",
        "ft": "Fine-tunes.",
        "multi-melo": "Melts edits together.",
    }
    assert "zoo_of_test.editors" not in sys.modules


@pytest.mark.parametrize("name", ["multi-mleo", "base", "_parts", "", "../ft", "editors.ft", "notes"])
def test_unknown_names(zoo: Registry[str], name: str) -> None:
    for ask in (zoo.get, zoo.summary):
        with pytest.raises(UnknownName) as caught:
            ask(name)
        assert str(caught.value).startswith(f"unknown editor '{name}'")
        assert caught.value.hint == "editors: bare, folder, ft, multi-melo"
    assert ("did you mean multi-melo?" in str(caught.value)) == (name == "multi-mleo")


def test_the_real_registries_load_no_torch() -> None:
    code = (
        "import sys\nfrom mmedit_cli.registry import backbones, datasets, editors\n"
        "for kind in (backbones, datasets, editors):\n    [kind.summary(name) for name in kind.names()]\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(registry.__file__).parents[1]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root)


def test_share_dir_of_a_checkout_and_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PACKAGE", tmp_path / "mmedit_cli")
    (tmp_path / "hparams").mkdir()
    assert registry.share_dir("hparams") == tmp_path / "mmedit_cli" / "share" / "hparams"
    (tmp_path / "pyproject.toml").touch()
    assert registry.share_dir("hparams") == tmp_path / "hparams"
    assert registry.share_dir("data") == tmp_path / "mmedit_cli" / "share" / "data"
    assert registry.hparams_file("multi-melo") == tmp_path / "hparams" / "multi_melo.yaml"


def test_the_cache_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path))
    assert registry.cache_dir() == tmp_path
    assert registry.data_home() == tmp_path / "data"
    monkeypatch.delenv("MMEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert registry.cache_dir() == tmp_path / "mmedit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert registry.cache_dir().parts[-2:] == (".cache", "mmedit")
