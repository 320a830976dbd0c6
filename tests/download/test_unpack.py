"""Archives that mean harm, or are broken: refused, named, nothing left behind."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
import zlib
from collections import namedtuple

import pytest

from mmedit_cli.download.unpack import ArchiveError, Limits, is_archive, unpack


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def make_tar(path, entries, mode="w:gz"):
    """Entries are (name, bytes), or a TarInfo made by `link`."""
    if not hasattr(tarfile, "data_filter"):  # before Python 3.11.4
        pytest.skip("this Python cannot unpack tar files safely: they are refused")
    with tarfile.open(path, mode) as file:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                file.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            file.addfile(info, io.BytesIO(entry[1]))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def refused(archive, tmp_path, match, **kw):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArchiveError, match=match):
        unpack(archive, tmp_path / "out", **kw)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_good_archives(tmp_path, mode):
    entries = [("a/b.txt", b"one"), ("c d.txt", b"two"), ("empty.txt", b"")]
    archive = tmp_path / "some.download"  # the content tells, not the name
    make_zip(archive, entries) if mode == "zip" else make_tar(
        archive, [("./a/b.txt", b"one"), *entries[1:]], mode
    )
    assert is_archive(archive)
    unpack(archive, tmp_path / "out")
    out = tmp_path / "out"
    assert {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file()
    } == dict(entries)


EVIL = [
    "../evil",
    "a/../../evil",
    "/tmp/evil",
    "a\\..\\evil",
    "C:/evil",
    "a//b",
    "./../evil",
]


@pytest.mark.parametrize("name", EVIL)
def test_names_that_lead_out_of_a_zip(tmp_path, name):
    archive = make_zip(tmp_path / "x.zip", [("good", b"1"), (name, b"2")])
    refused(archive, tmp_path, "x.zip: .*does not stay in the folder")


@pytest.mark.parametrize("name", [name for name in EVIL if name != "a//b"])
def test_names_that_lead_out_of_a_tar(tmp_path, name):
    archive = make_tar(tmp_path / "x.tar.gz", [("good", b"1"), (name, b"2")])
    refused(archive, tmp_path, "x.tar.gz: .*does not stay in the folder")


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../secret", "..", "good/../../.."]
)
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_that_lead_out(tmp_path, target, kind):
    archive = make_tar(
        tmp_path / "x.tar", [("good", b"1"), link("bad", target, kind)], "w"
    )
    refused(archive, tmp_path, "x.tar: bad: ")


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "home").mkdir()
    entries = [link("way", str(tmp_path / "home")), ("way/evil", b"2")]
    refused(make_tar(tmp_path / "x.tar", entries, "w"), tmp_path, "x.tar: way: ")
    entries = [link("way", "."), link("way/further", ".."), ("way/further/evil", b"2")]
    refused(make_tar(tmp_path / "y.tar", entries, "w"), tmp_path, "y.tar: ")


def test_a_link_inside_becomes_a_copy(tmp_path):
    entries = [
        link("second/copy", "../first"),
        ("first", b"1"),
        link("hard", "first", tarfile.LNKTYPE),
    ]
    unpack(make_tar(tmp_path / "x.tar", entries, "w"), tmp_path / "out")
    for name in ("first", "second/copy", "hard"):
        path = tmp_path / "out" / name
        assert path.read_bytes() == b"1"
        assert not path.is_symlink()
        assert path.stat().st_nlink == 1


def test_devices_are_refused(tmp_path):
    archive = make_tar(tmp_path / "x.tar", [link("null", "", tarfile.CHRTYPE)], "w")
    refused(archive, tmp_path, "x.tar: null: ")


def test_a_link_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("bad")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    refused(
        make_zip(tmp_path / "x.zip", [(info, b"/etc/passwd")]),
        tmp_path,
        "x.zip: bad: a link",
    )


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(tmp_path):
    refused(
        make_zip(tmp_path / "x.zip", [("a", b"1"), ("a", b"2")]),
        tmp_path,
        "x.zip: a: two entries",
    )
    refused(
        make_tar(tmp_path / "x.tar", [("a", b"1"), ("a", b"2")], "w"),
        tmp_path,
        "x.tar: a: two entries",
    )


def test_a_password(tmp_path):
    archive = make_zip(tmp_path / "x.zip", [("a", b"1")])
    raw = bytearray(archive.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(raw)
    refused(archive, tmp_path, "x.zip: a: locked with a password")


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_cut_off(tmp_path, suffix):
    entries = [
        (f"{i}", bytes(range(256)) * 40 + str(i).encode() * 999) for i in range(20)
    ]
    archive = tmp_path / f"x.{suffix}"
    make_zip(archive, entries) if suffix == "zip" else make_tar(
        archive, entries, "w" if suffix == "tar" else "w:gz"
    )
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    refused(archive, tmp_path, f"x.{suffix}: (damaged|neither)")


def test_damaged_inside(tmp_path):
    archive = make_zip(tmp_path / "x.zip", [("a", b"some text " * 99)])
    raw = bytearray(archive.read_bytes())
    raw[40] ^= 0xFF
    archive.write_bytes(raw)
    refused(archive, tmp_path, "x.zip: damaged")


def test_no_archive(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"quota exceeded")
    assert not is_archive(tmp_path / "x.zip")
    refused(tmp_path / "x.zip", tmp_path, "x.zip: neither")


def test_limits(tmp_path):
    archive = make_zip(tmp_path / "x.zip", [(str(i), bytes(50_000)) for i in range(10)])
    refused(archive, tmp_path, "more than 9 entries", limits=Limits(entries=9))
    refused(
        archive,
        tmp_path,
        "unpacks to more than 499,999 bytes",
        limits=Limits(bytes=499_999),
    )
    refused(
        archive,
        tmp_path,
        "unpacks to more than",
        limits=Limits(ratio=20, free_ratio_bytes=1000),
    )
    unpack(archive, tmp_path / "out", Limits(entries=10, bytes=500_000))


def bomb(path, kind, count):
    """Write a gzipped tar whose first header says that its text is so many bytes long, and gives them."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, count
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(count >> 20):
            file.write(bytes(1 << 20))
    return path


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
    ],
)
def test_a_tar_header_that_claims_gigabytes_is_not_read(tmp_path, kind):
    archive = bomb(tmp_path / "x.tar.gz", kind, 64 << 20)
    tracemalloc.start()
    refused(archive, tmp_path, r"x.tar.gz: a header of more than 32 MiB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20


def test_headers_that_follow_headers(tmp_path):
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) * 5_000)
    refused(tmp_path / "x.tar", tmp_path, "x.tar: damaged or cut off")


def test_an_archive_that_claims_more_than_it_has(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    refused(tmp_path / "x.tar", tmp_path, "x.tar: damaged or cut off")


def test_an_xz_file_that_wants_gigabytes_of_memory(tmp_path):
    (tmp_path / "x.tar.xz").write_bytes(with_dictionary(lzma.compress(bytes(10_240))))
    refused(tmp_path / "x.tar.xz", tmp_path, "x.tar.xz: neither a zip nor a tar file")


def with_dictionary(packed):
    """Return an xz file whose block header asks for a dictionary of 3 GiB."""
    raw = bytearray(packed)
    start, size = 12, (raw[12] + 1) * 4
    raw[start + 4] = 39
    raw[start + size - 4 : start + size] = zlib.crc32(
        raw[start : start + size - 4]
    ).to_bytes(4, "little")
    return bytes(raw)


def test_a_zip_packed_with_lzma_is_left_to_others(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a", b"1")
    refused(
        tmp_path / "x.zip", tmp_path, "x.zip: a: packed in a way that is not known here"
    )


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_what_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch, make):
    archive = make(tmp_path / "a", [("one", b"x" * 60), ("two", b"y" * 60)])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    refused(archive, tmp_path, r"does not fit on the disk \(100 bytes free\)")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 880, 120))
    unpack(archive, tmp_path / "out")


def test_a_python_without_the_filter_unpacks_no_tar(tmp_path, monkeypatch):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("a"), io.BytesIO())
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with pytest.raises(ArchiveError, match="cannot unpack tar files safely"):
        unpack(path, tmp_path / "out", Limits())
