"""The command as users see it: catalogue, sources in order, checks, refusals; and the published catalogue."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from filelock import FileLock

from mmedit_cli.download import sources, transfer
from mmedit_cli.download.catalogue import find_group, is_inside, load_catalogue
from mmedit_cli.download.install import Installer
from mmedit_cli.download.receipt import difference

ANNOTATIONS = ROOT.parent / "shared" / "data" / "annotations"
PHOTOS = {
    "wrapped/photos/a.png": b"A" * 500,
    "wrapped/photos/b.png": b"B" * 500,
    "wrapped/LICENSE": b"free",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Downloads go here; nobody is patient."""
    monkeypatch.setenv("MMEDIT_DATA", str(tmp_path / "data"))
    impatient = transfer.Manners(tries=2, backoff=0.01, longest_wait=5, timeout=5)
    monkeypatch.setattr("mmedit_cli.download.commands.Manners", lambda: impatient)
    return tmp_path / "data" / "things"


@pytest.fixture
def things(tmp_path, site, here):
    """Write a catalogue with the group `things`; return the words that name it on the command line."""

    def write(**items):
        groups = {
            "things": {
                "summary": "things",
                "licence": "CC0",
                "terms": "be kind",
                "items": items,
            }
        }
        (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump(groups))
        return "download", "things", "--catalogue", tmp_path / "catalogue.yaml"

    return write


def sha(content):
    return hashlib.sha256(content).hexdigest()


def files_of(folder):
    return (
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        if folder.exists()
        else set()
    )


def zipped(entries):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return raw.getvalue()


def pictures(site, *urls, **more):
    found = [{"url": f"{site.url}{url}"} for url in urls]
    return {
        "images": {
            "unpack": True,
            "sources": found,
            "layout": {"photos/*.png": 2},
            **more,
        }
    }


def two_files(site, **more):
    files = [
        {"path": "a b.json", "bytes": 5, "sha256": sha(b"alpha")},
        {"path": "sub/b.json", "sha256": sha(b"beta")},
    ]
    return {
        "files": {
            "files": files,
            "sources": [{"url": f"{site.url}/raw/{{path}}"}],
            **more,
        }
    }


def test_files_are_fetched_checked_and_noted(cli, site, things, here):
    site.files |= {"/raw/a b.json": b"alpha", "/raw/sub/b.json": b"beta"}
    words = things(**two_files(site))
    code, out, err = cli(*words)
    assert (code, "licence: CC0; be kind" in err) == (0, True)
    assert "catalogue" in out
    assert files_of(here) == {"a b.json", "sub/b.json", "download.json"}
    noted = json.loads((here / "download.json").read_text())["items"]["files"]
    assert noted["files"]["sub/b.json"] == [4, sha(b"beta")]
    site.seen.clear()
    code, out, _ = cli(*words, "--json")
    assert json.loads(out)["items"][0]["state"] == "present"
    assert site.seen == []
    assert cli(*words, "--verify")[0] == 0
    (here / "a b.json").write_bytes(b"alphb")
    code, out, _ = cli(*words, "--verify", "--json")
    assert (code, "a b.json: wrong checksum" in out) == (1, True)


def test_the_next_source_is_tried(cli, site, things, here):
    site.files["/second.zip"] = zipped(PHOTOS)
    site.always["/first.zip"] = ("status", 404)
    code, out, err = cli(
        *things(**pictures(site, "/first.zip", "/second.zip")), "--json"
    )
    assert code == 0, err
    (row,) = json.loads(out)["items"]
    assert row["source"] == f"{site.url}/second.zip"
    assert row["checked"] == "unverified"
    assert files_of(here) == {
        "photos/a.png",
        "photos/b.png",
        "LICENSE",
        "download.json",
    }


def test_wrong_bytes_are_named_and_nothing_is_left(cli, site, things, here):
    site.files |= {"/raw/a b.json": b"alphX", "/raw/sub/b.json": b"beta"}
    code, _, err = cli(*things(**two_files(site)))
    assert code == 1
    assert (
        f"a b.json: wrong checksum: sha256 {sha(b'alphX')}, expected {sha(b'alpha')}"
        in err
    )
    assert "a b.json" not in {Path(name).name for name in files_of(here)}
    site.files["/raw/a b.json"] = b"alpha"
    site.seen.clear()
    assert cli(*things(**two_files(site)))[0] == 0
    assert "/raw/sub/b.json" not in dict(site.seen)  # it came the first time


def evil_tar():
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as file:
        link = tarfile.TarInfo("photos/out")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../../etc/passwd"
        file.addfile(link)
    return raw.getvalue()


REFUSED = {
    "a zip that climbs out": (
        zipped(PHOTOS | {"../evil": b"x"}),
        "../evil: does not stay in the folder",
    ),
    "a tar with a link out": (
        evil_tar(),
        "photos/out: "
        if hasattr(tarfile, "data_filter")
        else "cannot unpack tar files safely",
    ),
    "a truncated file": (
        zipped(PHOTOS)[:-30],
        "neither a zip nor a tar file, or damaged",
    ),
    "a page of text": (b"please log in", "neither a zip nor a tar file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_named_and_nothing_left_behind(cli, site, things, here, tmp_path, case):
    site.files["/x.zip"], reason = REFUSED[case]
    words = things(**pictures(site, "/x.zip"))
    before = files_of(tmp_path)
    code, _, err = cli(*words)
    assert code == 1
    assert f"things/images: {site.url}/x.zip: " in err
    assert reason in err
    assert files_of(tmp_path) == before
    assert not here.exists()


def test_another_layout_is_named_and_the_archive_kept(cli, site, things, here):
    site.files["/x.zip"] = zipped({"readme.txt": b"x"})
    words = things(**pictures(site, "/x.zip"))
    code, _, err = cli(*words)
    assert (code, "photos/*.png: 0 files, expected 2; found readme.txt" in err) == (
        1,
        True,
    )
    assert files_of(here) == {".download/lock", ".download/images/0/files/x.zip"}
    site.files["/x.zip"] = zipped(PHOTOS)
    assert (
        cli(*words)[0] == 1
    )  # the archive that came is looked at again, not fetched again
    assert cli(*words, "--force")[0] == 0


def test_several_archives_make_one_folder(cli, site, things, here):
    site.files |= {
        "/raw/1.zip": zipped({"photos/a.png": b"A"}),
        "/raw/2.zip": zipped({"photos/b.png": b"B"}),
    }
    files = [{"path": "1.zip"}, {"path": "2.zip"}]
    item = {
        "unpack": True,
        "files": files,
        "sources": [{"url": f"{site.url}/raw/{{path}}"}],
        "layout": {"photos/*": 2},
    }
    code, _, err = cli(*things(images=item))
    assert code == 0, err
    assert files_of(here) == {"photos/a.png", "photos/b.png", "download.json"}


def test_a_tree_is_checked_as_a_whole(cli, site, things, here):
    lines = "".join(
        f"{sha(PHOTOS['wrapped/photos/' + name])}  photos/{name}\n"
        for name in ("a.png", "b.png")
    )
    tree = {"folder": "photos", "bytes": 1000, "sha256": sha(lines.encode())}
    site.files["/x.zip"] = zipped(PHOTOS | {"wrapped/photos/a.png": b"C" * 500})
    words = things(**pictures(site, "/x.zip", tree=tree))
    code, _, err = cli(*words)
    assert (
        code,
        "wrong checksum: photos: its 2 files are not the published ones" in err,
    ) == (1, True)
    assert not here.exists()
    site.files["/x.zip"] = zipped(PHOTOS)
    assert cli(*words)[0] == 0
    assert cli(*words, "--verify")[0] == 0


def test_put_there_by_hand(cli, site, things, here):
    site.always["/x.zip"] = ("status", 403)
    items = pictures(site, "/x.zip")
    items["images"]["sources"].append(
        {"manual": "https://example.org/page", "note": "code 1"}
    )
    words = things(**items)
    code, _, err = cli(*words)
    assert code == 1
    assert (
        f"by hand: open https://example.org/page (code 1); save the archive as {here}/images.zip"
        in err
    )
    here.mkdir(parents=True)
    (here / "images.zip").write_bytes(zipped(PHOTOS))
    code, out, err = cli(*words)
    assert code == 0, err
    assert "images.zip" in out
    assert {"images.zip", "photos/a.png"} <= files_of(here)
    (here / "download.json").unlink()
    code, out, _ = cli(*words, "--json")
    assert json.loads(out)["items"][0]["source"] == "put there by hand"


def test_other_peoples_files_are_not_written_over(cli, site, things, here):
    site.files |= {"/raw/a b.json": b"alpha", "/raw/sub/b.json": b"beta"}
    here.mkdir(parents=True)
    (here / "a b.json").write_text("mine")
    code, _, err = cli(*things(**two_files(site)))
    assert (code, "is there with another content; --force writes over it" in err) == (
        1,
        True,
    )
    assert (here / "a b.json").read_text() == "mine"
    assert cli(*things(**two_files(site)), "--force")[0] == 0
    assert (here / "a b.json").read_text() == "alpha"


def test_a_folder_that_is_a_link_out_is_not_followed(cli, site, things, here, tmp_path):
    site.files |= {"/raw/a b.json": b"alpha", "/raw/sub/b.json": b"beta"}
    (tmp_path / "elsewhere").mkdir()
    here.mkdir(parents=True)
    (here / "sub").symlink_to(tmp_path / "elsewhere")
    code, _, err = cli(*things(**two_files(site)))
    assert (code, "is a link that leads out of" in err) == (1, True)
    assert files_of(tmp_path / "elsewhere") == set()


def test_an_interrupted_move_is_finished(cli, site, things, here, monkeypatch):
    site.files["/x.zip"] = zipped(PHOTOS)
    words = things(**pictures(site, "/x.zip"))
    with monkeypatch.context() as patch:
        patch.setattr(
            Installer, "_note", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert cli(*words)[0] == 130
    site.seen.clear()
    assert cli(*words)[0] == 0
    assert site.seen == []
    assert files_of(here) == {
        "photos/a.png",
        "photos/b.png",
        "LICENSE",
        "download.json",
    }


def test_google_drive(cli, site, things, here, monkeypatch):
    monkeypatch.setattr(sources, "DRIVE", f"{site.url}/download")
    words = things(
        images={
            "unpack": True,
            "sources": [{"drive": "id1"}],
            "layout": {"photos/*.png": 2},
        }
    )
    site.files["/download"], site.types["/download"] = (
        b"<html>Quota exceeded</html>",
        "text/html",
    )
    code, _, err = cli(*words)
    assert (code, "the file is gone, private, or over its quota" in err) == (1, True)
    assert "https://drive.google.com/file/d/id1/view" in err
    form = (
        '<form action="/confirmed"><input type="hidden" name="uuid" value="7"></form>'
    )
    site.files |= {"/download": form.encode(), "/confirmed": zipped(PHOTOS)}
    code, _, err = cli(*words)
    assert code == 0, err
    assert "photos/a.png" in files_of(here)


def test_an_optional_item_is_not_missed(cli, site, things):
    site.files |= {"/raw/a b.json": b"alpha", "/raw/sub/b.json": b"beta"}
    test = {
        "optional": True,
        "sources": [{"manual": "https://example.org"}],
        "layout": {"test/*": 1},
    }
    words = things(**two_files(site), test=test)
    code, _, err = cli(*words)
    assert (code, "by hand: open https://example.org; put test/*" in err) == (0, True)
    code, _, err = cli("download", "things/test", *words[2:])
    assert (code, "by hand: open https://example.org" in err) == (1, True)


def test_dry_run_and_list_touch_nothing(cli, site, things, here):
    words = things(**two_files(site))
    code, out, _ = cli(*words, "--dry-run", "--json")
    assert (code, json.loads(out)["items"][0]["state"]) == (0, "missing")
    code, out, _ = cli("download", "--list", "--catalogue", words[-1], "--json")
    assert (code, "things/files" in [row["name"] for row in json.loads(out)]) == (
        0,
        True,
    )
    assert site.seen == []
    assert not here.exists()


def test_two_downloads_at_once(cli, site, things, here):
    (here / ".download").mkdir(parents=True)
    with FileLock(here / ".download" / "lock"):
        code, _, err = cli(*things(**two_files(site)))
    assert (code, "another download is at work there" in err) == (1, True)


def test_wrong_words(cli, site, things, tmp_path, here):
    for words, expected in {
        ("vlkep",): "did you mean vlkeb?",
        ("vlkeb/pictures",): "no item 'pictures'",
        ("vlkeb", "--revision", "v1"): "--revision is for models",
        ("tiny-llava",): "nothing to download",
        ("llava-1.5-7b", "--to", "x"): "--to is for data sets",
        ("vlkeb", "--to", str(Path(__file__))): "not a folder",
        ("vlkeb", "--catalogue", str(tmp_path / "none.yaml")): "no such file",
    }.items():
        code, _, err = cli("download", *words)
        assert (code, expected in err) == (2, True), (words, err)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ({"a": {"sources": [{"ftp": "x"}], "layout": {"*": 1}}}, "a source is one of"),
        (
            {"a": {"sources": [{"url": "file:///etc/passwd"}], "layout": {"*": 1}}},
            "no http address",
        ),
        (
            {"a": {"sources": [{"url": "http://x"}]}},
            "needs sources, and files or a layout",
        ),
        (
            {"a": {"sources": [{"url": "http://x"}], "files": [{"path": "../x"}]}},
            "does not stay in the folder",
        ),
        (
            {
                "a": {
                    "sources": [{"url": "http://x"}],
                    "files": [{"path": "x", "sha256": "1"}],
                }
            },
            "is no sha256",
        ),
        ({"a": {"layout": {"*": 1}}}, "sources is missing"),
        (
            {"a": {"sources": [{"bundled": "../../etc"}], "layout": {"*": 1}}},
            "leads out of the data that come along",
        ),
        (
            {"a": {"sources": [{"bundled": "/etc"}], "layout": {"*": 1}}},
            "leads out of the data that come along",
        ),
        (
            {"a": {"sources": [{"url": 3}], "layout": {"*": 1}}},
            "items.a.sources[0].url: expected a text, got 3",
        ),
        (
            {"a": {"sources": [{"url": "http://x"}], "layout": {"*": "x"}}},
            "expected a whole number",
        ),
        ({"a": 3}, "items.a: expected an object with keys, got 3"),
        (
            {"../a": {"sources": [{"url": "http://x"}], "layout": {"*": 1}}},
            "is no name for an item",
        ),
    ],
)
def test_a_wrong_catalogue(cli, things, items, expected):
    code, _, err = cli(*things(**items))
    assert (code, expected in err) == (2, True), err


def test_no_network_says_what_was_tried_and_what_to_do(cli, here, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def unknown(host, *words, **more):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, out, err = cli("download", "mmedit-data")
    assert (code, out) == (1, "")
    assert "vqa/vqa_train.json: Name or service not known" in err
    assert (
        "Google Drive file 1fQzJBFkok5kFZT6QUuT-HCuYKk2Vb93O: Name or service not known"
        in err
    )
    assert (
        "by hand: open https://drive.google.com/drive/folders/1jBdTJxUb9wEeHnvG-RY8dv5_I4QlDpUS"
        in err
    )
    assert "Traceback" not in err
    assert not here.parent.joinpath("mmedit-data").exists()


def test_offline_is_respected(cli, here):
    code, _, err = cli("download", "vlkeb")
    assert (code, err.count("HF_HUB_OFFLINE is set")) == (1, 3)


def test_the_mini_models_are_copied_or_their_place_is_named(
    cli, here, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "share_dir", lambda name: tmp_path / "share" / name)
    code, _, err = cli("download", "mini")
    assert (code, "not published anywhere yet; a checkout" in err) == (1, True)
    folder = tmp_path / "share" / "data" / "models" / "mini-blip2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    code, _, err = cli("download", "mini")
    assert code == 0, err
    assert files_of(here.parent / "mini") == {"mini-blip2/config.json", "download.json"}
    assert (folder / "config.json").is_file()


def test_the_published_catalogue():
    groups = load_catalogue()
    assert set(groups) == {
        "mmedit-data",
        "vlkeb",
        "dreambooth",
        "ip2p",
        "magicbrush",
        "mini",
    }
    for group in groups.values():
        assert group.licence
        assert group.terms
        for item in group.items:
            assert find_group(f"{group.name}/{item.name}", groups)[1] == (item,)
            for source in item.sources:
                pinned = source.revision is None or len(source.revision) == 40
                assert pinned, source
    assert not is_inside("a/../b")


@pytest.mark.parametrize(("group", "folder"), [("mmedit-data", ""), ("vlkeb", "VLKEB")])
def test_the_published_digests_are_those_of_the_real_files(group, folder):
    if not ANNOTATIONS.is_dir():
        pytest.skip("the annotation files are not part of the repository")
    (item,) = find_group(f"{group}/annotations", load_catalogue())[1]
    compared = 0
    for file in item.files:
        path = ANNOTATIONS / folder / file.path
        if file.sha256 is not None:
            assert difference(path, file) == ""
            compared += 1
    assert compared >= 4


def test_no_error_shows_a_placeholder(cli, site, things, here):
    site.files |= {"/raw/a b.json": b"alphX"}
    words = things(**two_files(site))
    code, _, err = cli(*words)
    assert (code, "{path}" in err) == (1, False)
    assert (
        f"things/files: {site.url}/raw/: a b.json: wrong checksum" in err
        or "sub/b.json: HTTP 404" in err
    )
    site.files |= {"/raw/a b.json": b"alpha", "/raw/sub/b.json": b"beta"}
    code, out, _ = cli(*words)
    assert (code, "{path}" in out) == (0, False)


def test_aliases_that_multiply_are_refused_at_once(cli, tmp_path, here):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    code, _, err = cli("download", "--list", "--catalogue", tmp_path / "laughs.yaml")
    assert (code, "laughs.yaml:1: anchors and aliases are not supported" in err) == (
        2,
        True,
    ), err


@pytest.mark.parametrize(
    "name", ["catalogue", "download.json", ".download/files/ready.json"]
)
def test_files_linked_to_a_device_are_not_read(cli, site, things, here, tmp_path, name):
    site.files |= {"/raw/a b.json": b"alpha", "/raw/sub/b.json": b"beta"}
    words = things(**two_files(site))
    if name == "catalogue":
        (tmp_path / "zero.yaml").symlink_to("/dev/zero")
        code, _, err = cli("download", "--list", "--catalogue", tmp_path / "zero.yaml")
        assert (code, "is a device, not a file" in err) == (2, True)
        return
    (here / name).parent.mkdir(parents=True)
    (here / name).symlink_to("/dev/zero")
    code, _, err = cli(*words)
    assert code in (0, 2), err


@pytest.mark.parametrize("name", ["images/0/files/x.zip.part", "lock"])
def test_what_a_killed_download_left_goes(cli, site, things, here, name):
    """A kill after the receipt was written leaves the staging folder; the same command removes it."""
    site.files["/x.zip"] = zipped(PHOTOS)
    words = things(**pictures(site, "/x.zip"))
    assert cli(*words)[0] == 0
    left = here / ".download" / name
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert cli(*words)[0] == 0
    assert files_of(here) == {
        "photos/a.png",
        "photos/b.png",
        "LICENSE",
        "download.json",
    }
    assert not (here / ".download").exists()


def test_unpacking_that_was_killed_is_done_again(cli, things, site, here):
    site.always["/x.zip"] = ("status", 403)
    here.mkdir(parents=True)
    (here / "images.zip").write_bytes(zipped(PHOTOS))
    (here / ".download" / "images" / "0" / "unpacked" / "photos").mkdir(parents=True)
    code, _, err = cli(*things(**pictures(site, "/x.zip")))
    assert code == 0, err
    assert {"images.zip", "photos/a.png", "photos/b.png"} <= files_of(here)
