"""Transfers against a server that breaks connections, sends wrong bytes, ignores ranges, and is busy."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
from download.website import CONTENT, QUICK

from mmedit_cli.download import transfer
from mmedit_cli.download.transfer import PageInstead, Transfer, TransferError


def bring(site, target, *, size=None, manners=QUICK, path="/file"):
    ticks = []
    with transfer.client(manners) as session:
        Transfer(session, site.url + path, target, size, manners, lambda what, n, total: ticks.append(n)).run()
    return sum(ticks)


@pytest.fixture
def content():
    return CONTENT


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_parts_come_together(site, content, tmp_path):
    site.files["/file"] = content
    assert bring(site, tmp_path / "file", size=len(content)) == len(content)
    assert (tmp_path / "file").read_bytes() == content
    assert left(tmp_path) == ["file"]
    assert len(site.ranges_of("/file")) == 5  # one question, four parts


def test_a_small_file_comes_in_one_part(site, tmp_path):
    site.files["/file"] = b"small"
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"small"
    assert len(site.ranges_of("/file")) == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file(site, tmp_path, ranges):
    site.files["/file"], site.ranges = b"", ranges
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_broken_connection_is_continued_where_it_broke(site, content, tmp_path):
    site.files["/file"] = content
    site.faults["/file"] = [("none",), ("cut", 7_000), ("cut", 5_000)]
    assert bring(site, tmp_path / "file", manners=replace(QUICK, parts=1)) == len(content)
    assert (tmp_path / "file").read_bytes() == content
    assert site.ranges_of("/file")[2:] == [f"bytes=7000-{len(content) - 1}", f"bytes=12000-{len(content) - 1}"]


def test_without_ranges_it_starts_again(site, content, tmp_path):
    site.files["/file"], site.ranges = content, False
    site.faults["/file"] = [("none",), ("cut", 7_000)]
    assert bring(site, tmp_path / "file") == len(content)
    assert (tmp_path / "file").read_bytes() == content


def test_a_second_attempt_goes_on_where_the_first_gave_up(site, content, tmp_path):
    site.files["/file"] = content
    one = replace(QUICK, parts=1)
    site.faults["/file"] = [("none",), ("cut", 30_000), *[("status", 503)] * 2]
    with pytest.raises(TransferError, match="503"):
        bring(site, tmp_path / "file", manners=one)
    assert left(tmp_path) == ["file.part", "file.part.json"]
    site.seen.clear()
    bring(site, tmp_path / "file", manners=one)
    assert (tmp_path / "file").read_bytes() == content
    assert site.ranges_of("/file") == ["bytes=0-0", f"bytes=30000-{len(content) - 1}"]


def test_what_changed_on_the_server_is_not_mixed(site, content, tmp_path):
    site.files["/file"] = content
    one = replace(QUICK, parts=1)
    site.faults["/file"] = [("none",), ("cut", 30_000), *[("status", 503)] * 2]
    with pytest.raises(TransferError):
        bring(site, tmp_path / "file", manners=one)
    site.files["/file"] = content[::-1]
    bring(site, tmp_path / "file", manners=one)
    assert (tmp_path / "file").read_bytes() == content[::-1]


def test_a_file_that_changes_under_way_is_taken_anew(site, content, tmp_path):
    site.files["/file"] = content

    def change(path):
        if len(site.seen) == 2:
            site.files["/file"] = content[::-1]

    site.hook = change
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content[::-1]


@pytest.mark.parametrize(
    "note", ["{", '{"spans": 3}', json.dumps({"url": "", "validator": "", "total": 1, "spans": []})]
)
def test_a_damaged_note_is_no_obstacle(site, content, tmp_path, note):
    site.files["/file"] = content
    (tmp_path / "file.part").write_bytes(b"x" * len(content))
    (tmp_path / "file.part.json").write_text(note)
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


def test_a_busy_server_is_waited_for_as_long_as_it_asks(site, content, tmp_path):
    site.files["/file"] = content
    site.faults["/file"] = [("status", 429, {"Retry-After": "1"})]
    start = time.monotonic()
    bring(site, tmp_path / "file")
    assert time.monotonic() - start >= 1
    assert (tmp_path / "file").read_bytes() == content


def test_retry_after_may_be_a_date(site, content, tmp_path):
    site.files["/file"] = content
    site.faults["/file"] = [("status", 503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})]
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


def test_nobody_waits_an_hour(site, tmp_path):
    site.always["/file"] = ("status", 429, {"Retry-After": "3600"})
    with pytest.raises(TransferError, match=r"HTTP 429.*asks to wait 3600 seconds"):
        bring(site, tmp_path / "file")


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_is_not_there_is_not_asked_for_twice(site, tmp_path, status):
    site.always["/file"] = ("status", status)
    with pytest.raises(TransferError, match=f"HTTP {status}"):
        bring(site, tmp_path / "file")
    assert len(site.seen) == 1
    assert left(tmp_path) == []


def test_a_wrong_size_is_seen_before_anything_is_read(site, content, tmp_path):
    site.files["/file"] = content
    with pytest.raises(TransferError, match="128,000 bytes, where 5 were expected"):
        bring(site, tmp_path / "file", size=5)
    assert len(site.seen) == 1


def test_a_page_instead_of_a_file(site, tmp_path):
    site.files["/file"], site.types["/file"] = b"<html>please log in</html>", "text/html; charset=utf-8"
    with pytest.raises(PageInstead) as error:
        bring(site, tmp_path / "file")
    assert "log in" in error.value.text


def test_nobody_there(tmp_path):
    with transfer.client(QUICK) as session, pytest.raises(TransferError, match="refused"):
        Transfer(session, "http://127.0.0.1:9/x", tmp_path / "x", None, QUICK, lambda *a: None).run()
    assert left(tmp_path) == []


def test_an_interruption_keeps_what_came(site, content, tmp_path, monkeypatch):
    site.files["/file"] = content
    came = threading.Event()

    def interrupted(jobs, **kw):
        came.wait(5)
        raise KeyboardInterrupt

    with transfer.client(QUICK) as session:
        job = Transfer(session, site.url + "/file", tmp_path / "file", None, QUICK, lambda *a: came.set())
        with monkeypatch.context() as patch:
            patch.setattr(transfer, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                job.run()
    note = json.loads((tmp_path / "file.part.json").read_text())
    done = (tmp_path / "file.part").read_bytes()
    ends = [end for _, end in note["spans"]]
    for (here, _), start in zip(note["spans"], [0, *ends], strict=False):
        assert done[start:here] == content[start:here]
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
