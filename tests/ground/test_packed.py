"""Zips of small files: unpacked beside themselves once, whole, and again only if they change."""

from __future__ import annotations

import os
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

from mmedit_cli.errors import DataError
from mmedit_cli.packed import MARK, differences, loose, pack, unpack_beside, way_out
from mmedit_cli.pictures import check_picture

FILES = {"a.png": b"one", "b.png": b"two", "deep/LICENSE.txt": b"three" * 99}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A zip of three files, whose folder is gone."""
    for name, data in FILES.items():
        (path := tmp_path / "home" / "artist" / name).parent.mkdir(
            parents=True, exist_ok=True
        )
        path.write_bytes(data)
    found = pack(tmp_path / "home" / "artist")
    shutil.rmtree(tmp_path / "home" / "artist")
    return found


def contents(archive: Path) -> dict[str, bytes]:
    folder = archive.with_suffix("")
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }
    return {name: data for name, data in files.items() if name != MARK}


def test_what_was_packed_comes_out_and_nothing_is_left_beside_it(archive):
    unpack_beside(archive.parent)
    assert contents(archive) == FILES
    assert {p.name for p in archive.parent.iterdir()} == {"artist", "artist.zip"}
    assert differences(archive) == []


def test_the_same_files_make_the_same_bytes(archive):
    before = archive.read_bytes()
    unpack_beside(archive.parent)
    (archive.with_suffix("") / MARK).unlink()
    os.utime(archive.with_suffix("") / "a.png", (0, 0))
    assert pack(archive.with_suffix("")).read_bytes() == before


def test_it_is_unpacked_once_and_again_after_a_change(archive):
    folder = archive.with_suffix("")
    unpack_beside(archive.parent)
    (folder / "a.png").write_bytes(b"mine")
    (folder / "own.png").write_bytes(b"own")
    unpack_beside(archive.parent)
    assert contents(archive)["a.png"] == b"mine"
    assert differences(archive) == [
        "artist/own.png is not in artist.zip",
        "artist/a.png has changed",
    ]
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("c.png", b"new")
    unpack_beside(archive.parent)
    assert contents(archive) == {**FILES, "c.png": b"new", "own.png": b"own"}
    (folder / "b.png").unlink()
    assert differences(archive)[0] == "artist/b.png is missing"


def test_a_folder_that_was_there_is_completed(archive):
    folder = archive.with_suffix("")
    folder.mkdir()
    (folder / "a.png").write_bytes(b"half")
    unpack_beside(archive.parent)
    assert contents(archive) == FILES


def test_many_processes_at_once(archive):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(unpack_beside, [archive.parent] * 8))
    assert contents(archive) == FILES
    assert {p.name for p in archive.parent.iterdir()} == {"artist", "artist.zip"}


def test_what_is_damaged_stops_nobody_and_is_named_to_who_misses_a_file(archive):
    archive.write_bytes(archive.read_bytes()[:-30])
    unpack_beside(archive.parent)
    assert [p.name for p in archive.parent.iterdir()] == ["artist.zip"]
    assert (
        way_out(archive.with_suffix("") / "a.png")
        == f"{archive} is damaged: git checkout {archive}"
    )
    assert differences(archive) == [f"artist.zip is damaged: git checkout {archive}"]


def test_where_nothing_can_be_written(archive, monkeypatch):
    def refused(*_args, **_options):
        raise PermissionError("read-only")

    monkeypatch.setattr("mmedit_cli.packed.temporary_folder", refused)
    unpack_beside(archive.parent)
    folder = archive.with_suffix("")
    assert way_out(folder / "a.png") == f"unpack {archive} as {folder}"
    assert not folder.exists()
    assert (
        way_out(folder / "c.png")
        == way_out(Path("nowhere/c.png"))
        == way_out(Path("c.png"))
        == ""
    )
    folder.mkdir()  # by hand
    unpack_beside(archive.parent)
    assert way_out(folder / "a.png") == "", (
        "nobody is asked to delete a folder of their own"
    )


def test_a_picture_that_was_deleted_says_how_it_comes_back(archive):
    unpack_beside(archive.parent)
    (archive.with_suffix("") / "a.png").unlink()
    with pytest.raises(DataError, match="no such image") as caught:
        check_picture(archive.with_suffix("") / "a.png")
    assert (
        caught.value.hint == f"delete {archive.with_suffix('')}, which is unpacked anew"
    )


def test_what_a_folder_holds_besides_its_zips(archive):
    unpack_beside(archive.parent)
    (archive.parent / "README.md").write_text("read")
    (archive.parent / ".artist-x").mkdir()
    (archive.parent / ".artist-x" / "left").write_text("by a killed process")
    assert [path.name for path in loose(archive.parent)] == ["README.md", "artist.zip"]


def test_git_ignores_every_folder_that_is_unpacked():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for path in (ROOT / "data").rglob("*.zip"):
        assert f"{path.relative_to(ROOT).with_suffix('').as_posix()}/" in ignored
