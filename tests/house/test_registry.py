"""Names come from file names, and nothing is imported before it is asked for."""

from __future__ import annotations

import subprocess
import sys
import zipfile
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
        "ft": f'"""Fine-tunes."""\n{BOOM}\nEDITOR: str = "ft"\n',
        "helpers": f'"""Shared by several, offers none."""\n{BOOM}',
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


@pytest.mark.parametrize(
    "name",
    ["multi-mleo", "base", "_parts", "", "../ft", "editors.ft", "notes", "helpers"],
)
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


def test_share_dir_of_a_checkout_and_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_PACKAGE", tmp_path / "mmedit_cli")
    (tmp_path / "hparams").mkdir()
    assert (
        registry.share_dir("hparams") == tmp_path / "mmedit_cli" / "share" / "hparams"
    )
    (tmp_path / "pyproject.toml").touch()
    assert registry.share_dir("hparams") == tmp_path / "hparams"
    assert registry.share_dir("data") == tmp_path / "mmedit_cli" / "share" / "data"
    assert (
        registry.hparams_file("multi-melo") == tmp_path / "hparams" / "multi_melo.yaml"
    )


def test_the_cache_folder_can_be_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path))
    assert registry.cache_dir() == tmp_path
    assert registry.data_home() == tmp_path / "data"
    monkeypatch.delenv("MMEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert registry.cache_dir() == tmp_path / "mmedit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert registry.cache_dir().parts[-2:] == (".cache", "mmedit")


def test_no_list_shows_a_module_that_offers_nothing() -> None:
    assert registry.datasets.names() == [
        "counterfact",
        "eic",
        "emojikb",
        "evqa",
        "vlkeb",
        "zsre",
    ]


def test_facts_are_read_without_an_import() -> None:
    code = (
        "import sys\nfrom mmedit_cli.registry import editors, image_editors, personalizers\n"
        "print([editors.fact(n, 'trains') for n in ('liveedit', 'ft')],"
        " [editors.fact(n, 'batch_edits') for n in ('t-patcher', 'ft')],"
        " [personalizers.fact(n, 'several') for n in ('dreambooth', 'perfusion')],"
        " image_editors.fact('mgie', 'trains'), editors.fact('ft', 'nothing'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(registry.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[True, False] [False, True] [False, True] True None\n"


def test_facts_agree_with_the_classes() -> None:
    for name in ("liveedit", "ft", "t-patcher"):
        cls = registry.editors.get(name)
        for attribute in ("trains", "batch_edits"):
            assert registry.editors.fact(name, attribute) == getattr(cls, attribute)


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Make the program believe that it is an installed package in `folder`; return where it carries EmojiKB."""
    shipped = folder / "mmedit_cli" / "share" / "data" / "emojikb"
    (shipped / "LICENSES").mkdir(parents=True)
    (shipped / "LICENSES" / "MIT.txt").write_text("a licence")
    (shipped / "manifest.json").write_text("{}")
    with zipfile.ZipFile(shipped / "noto.zip", "w") as file:
        file.writestr("1f34e.png", b"an apple")
    monkeypatch.setattr(registry, "_PACKAGE", folder / "mmedit_cli")
    for function in (registry.emojikb_home, registry.emojikb_dir):
        function.cache_clear()
    return shipped


@pytest.fixture
def _forget():
    yield
    for function in (registry.emojikb_home, registry.emojikb_dir):
        function.cache_clear()


@pytest.mark.usefixtures("_forget")
def test_an_installed_package_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = installed(monkeypatch, tmp_path)
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    folder = registry.emojikb_dir()
    assert folder.parent == tmp_path / "cache"
    assert (folder / "noto" / "1f34e.png").read_bytes() == b"an apple"
    assert (folder / "LICENSES" / "MIT.txt").is_file()
    assert [
        path
        for path in sorted(tmp_path.rglob("*"))
        if not path.is_relative_to(tmp_path / "cache")
    ] == before
    assert {path.name for path in folder.iterdir()} == {
        "LICENSES",
        "manifest.json",
        "noto",
        "noto.zip",
    }
    assert registry.emojikb_home() == folder
    assert shipped.is_dir()


@pytest.mark.usefixtures("_forget")
def test_where_nothing_can_be_unpacked_the_records_are_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = installed(monkeypatch, tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "file" / "cache"))
    assert registry.emojikb_home() == shipped
