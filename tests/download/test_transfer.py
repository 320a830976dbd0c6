"""Transfers against a server that breaks connections, sends wrong bytes, ignores ranges, and is busy."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import httpx2
import pytest
from download.website import CHUNKED, CONTENT, HASTY, QUICK

from mmedit_cli import web
from mmedit_cli.download import transfer
from mmedit_cli.download.sources import Courier
from mmedit_cli.download.transfer import (
    PageInstead,
    Transfer,
    TransferError,
    _validator,
)
from mmedit_cli.errors import UserError


def bring(site, target, *, size=None, manners=QUICK, path="/file"):
    ticks = []
    with transfer.client(manners) as session:
        Transfer(
            session,
            site.url + path,
            target,
            size,
            manners,
            lambda what, n, total: ticks.append(n),
        ).run()
    return sum(ticks)


@pytest.fixture
def content():
    return CONTENT


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_a_file_comes_in_one_stream(site, content, tmp_path):
    site.files["/file"] = content
    assert bring(site, tmp_path / "file", size=len(content)) == len(content)
    assert (tmp_path / "file").read_bytes() == content
    assert left(tmp_path) == ["file"]
    assert site.ranges_of("/file") == [""]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file(site, tmp_path, ranges):
    site.files["/file"], site.ranges = b"", ranges
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_broken_connection_is_continued_where_it_broke(site, content, tmp_path):
    site.files["/file"] = content
    site.faults["/file"] = [("cut", 7_000), ("cut", 5_000)]
    assert bring(site, tmp_path / "file") == len(content)
    assert (tmp_path / "file").read_bytes() == content
    assert site.ranges_of("/file") == ["", "bytes=7000-", "bytes=12000-"]


def test_without_ranges_it_starts_again(site, content, tmp_path):
    site.files["/file"], site.ranges = content, False
    site.faults["/file"] = [("cut", 7_000)]
    assert bring(site, tmp_path / "file") == len(content)
    assert (tmp_path / "file").read_bytes() == content


@pytest.fixture
def broken(site, content, tmp_path):
    """A transfer that gave up after 30,000 bytes."""
    site.files["/file"] = content
    site.faults["/file"] = [("cut", 30_000), *[("status", 503)] * 2]
    with pytest.raises(TransferError, match="503"):
        bring(site, tmp_path / "file")
    assert left(tmp_path) == ["file.part", "file.part.json"]
    assert (tmp_path / "file.part").read_bytes() == content[:30_000]
    site.seen.clear()
    return site


def test_a_second_attempt_goes_on_where_the_first_gave_up(broken, content, tmp_path):
    bring(broken, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert broken.ranges_of("/file") == ["bytes=30000-"]
    assert left(tmp_path) == ["file"]


def test_what_changed_on_the_server_is_not_mixed(broken, content, tmp_path):
    broken.files["/file"] = content[::-1]
    bring(broken, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content[::-1]


def test_the_version_is_asked_for_with_the_rest(broken, tmp_path):
    """A server that does not know If-Range would mix two versions; the note says which one the part is of."""
    url, validator, total = json.loads((tmp_path / "file.part.json").read_text())
    assert (url, total) == (f"{broken.url}/file", len(CONTENT))
    assert len(validator) == 66


def test_what_is_whole_already_is_not_asked_for(broken, content, tmp_path):
    (tmp_path / "file.part").write_bytes(content)
    bring(broken, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert broken.seen == []


def test_what_a_killed_attempt_left_beside_a_whole_file_goes(broken, content, tmp_path):
    """It would be taken for a file that was downloaded."""
    (tmp_path / "file.part").rename(tmp_path / "file")
    Courier().fetch(f"{broken.url}/file", tmp_path / "file")
    assert left(tmp_path) == ["file"]
    assert broken.seen == []


@pytest.mark.parametrize(
    "fault",
    [
        ("status", 416, {"Content-Range": "bytes */30000"}),
        ("headers", {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}),
        (
            "headers",
            {"Content-Range": f"bytes 30000-{len(CONTENT) - 1}/{len(CONTENT) + 1}"},
        ),
        (
            "headers",
            {"Content-Range": f"bytes 30000-{len(CONTENT) - 2}/{len(CONTENT)}"},
        ),
        ("headers", {"Content-Range": "bytes"}),
        ("headers", {"Content-Type": "text/html"}),
        ("status", 206, {}),
    ],
)
def test_an_answer_that_is_not_the_rest_is_never_put_behind_the_first_part(
    broken, content, tmp_path, fault
):
    broken.faults["/file"] = [fault]
    bring(broken, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert broken.ranges_of("/file") == ["bytes=30000-", ""]


@pytest.mark.parametrize(
    "note",
    [
        "{",
        "[]",
        '{"url": 3}',
        "null",
        '["a", "b", "c"]',
        json.dumps(["", "", 1]),
        "[" * 100_000,
    ],
)
def test_a_damaged_note_is_no_obstacle(site, content, tmp_path, note):
    site.files["/file"] = content
    (tmp_path / "file.part").write_bytes(b"x" * len(content))
    (tmp_path / "file.part.json").write_text(note)
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert left(tmp_path) == ["file"]


def test_a_busy_server_is_waited_for_as_long_as_it_asks(site, content, tmp_path):
    site.files["/file"] = content
    site.faults["/file"] = [("status", 429, {"Retry-After": "1"})]
    start = time.monotonic()
    bring(site, tmp_path / "file")
    assert time.monotonic() - start >= 1
    assert (tmp_path / "file").read_bytes() == content


def test_retry_after_may_be_a_date(site, content, tmp_path):
    site.files["/file"] = content
    site.faults["/file"] = [
        ("status", 503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    ]
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
    site.files["/file"], site.types["/file"] = (
        b"<html>please log in</html>",
        "text/html; charset=utf-8",
    )
    with pytest.raises(PageInstead) as error:
        bring(site, tmp_path / "file")
    assert "log in" in error.value.text


def test_nobody_there(tmp_path):
    with (
        transfer.client(QUICK) as session,
        pytest.raises(TransferError, match="refused"),
    ):
        Transfer(
            session,
            "http://127.0.0.1:9/x",
            tmp_path / "x",
            None,
            QUICK,
            lambda *a: None,
        ).run()
    assert left(tmp_path) == []


def test_an_interruption_keeps_what_came(site, content, tmp_path):
    site.files["/file"] = content
    came = []

    def interrupt(what, count, total):
        came.append(count)
        if sum(came) > 1:
            raise KeyboardInterrupt

    with transfer.client(QUICK) as session, pytest.raises(KeyboardInterrupt):
        Transfer(
            session, site.url + "/file", tmp_path / "file", None, QUICK, interrupt
        ).run()
    part = (tmp_path / "file.part").read_bytes()
    assert part
    assert content.startswith(part)
    site.seen.clear()
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert site.ranges_of("/file") in ([f"bytes={len(part)}-"], [])


def refused(site, tmp_path, match, *, manners=QUICK, **more):
    """A transfer fails in one line within seconds, and leaves no finished file."""
    start = time.monotonic()
    with pytest.raises(TransferError, match=match) as caught:
        bring(site, tmp_path / "file", manners=manners, **more)
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "file").exists()


def test_an_endless_body_stops_at_the_expected_size(site, tmp_path):
    site.always["/file"] = ("endless", CHUNKED)
    refused(
        site, tmp_path, "more than the 100,000 bytes that were expected", size=100_000
    )
    assert left(tmp_path) == []


def test_an_endless_body_of_which_nobody_knows_the_size_stops_too(
    site, tmp_path, monkeypatch
):
    monkeypatch.setattr(web, "_UNSTATED_BODY", 300_000)
    site.always["/file"] = ("endless", CHUNKED)
    refused(site, tmp_path, "more than 300,000 bytes")
    assert left(tmp_path) == []


def test_an_endless_redirect_and_an_endless_page_are_not_read(
    site, tmp_path, monkeypatch
):
    site.always["/file"] = (
        "endless",
        b"HTTP/1.1 302 Found\r\nLocation: /other\r\nTransfer-Encoding: chunked\r\n\r\n",
    )
    refused(site, tmp_path, "an answer of more than 1,048,576 bytes")
    site.always["/file"] = (
        "endless",
        CHUNKED.replace(b"OK", b"OK\r\nContent-Type: text/html"),
    )
    refused(site, tmp_path, "a web page came instead of the file")


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 100000\r\n\r\n",
    ],
)
def test_a_body_that_drips_is_given_up(site, tmp_path, sent):
    site.always["/file"] = ("drip", sent)
    refused(site, tmp_path, "too slow: |no answer within", manners=HASTY)
    assert len(site.seen) == 1


def test_headers_that_drip_are_given_up(site, tmp_path):
    site.always["/file"] = ("drip", b"HTTP/1.1 200 OK\r\nX-Long: ")
    refused(site, tmp_path, "no answer within 0.6 seconds", manners=HASTY)
    assert len(site.seen) == 1


def test_a_server_that_says_nothing_is_given_up(site, tmp_path):
    site.always["/file"] = ("hang",)
    refused(site, tmp_path, r"tried 2 times", manners=HASTY)


def test_a_stall_is_continued(site, content, tmp_path):
    site.files["/file"] = content
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\nLast-Modified: now\r\n\r\n".encode()
    site.faults["/file"] = [("raw", head + content[:5_000])]
    bring(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert site.ranges_of("/file") == ["", "bytes=5000-"]


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (("status", 302), "HTTP 302 Found: a redirect that says no place"),
        (("status", 302, {"Location": "http://[broken"}), "."),
        (("status", 302, {"Location": "ftp://127.0.0.1/file"}), "."),
        (("status", 302, {"Location": "/file"}), "the address leads in a circle"),
        (("status", 204), "HTTP 204"),
        (("status", 206), "HTTP 206"),
        (("status", 304), "HTTP 304"),
        (("status", 416), "HTTP 416"),
        (("headers", {"Content-Encoding": "gzip"}), "sends the file as gzip"),
        (("headers", {"Content-Encoding": "br"}), "sends the file as br"),
        (("headers", {"Content-Length": "-5"}), "."),
        (("headers", {"Content-Length": "9" * 5000}), "."),
        (("headers", {"Content-Length": "9" * 17}), "and the disk has"),
        (("raw", b""), "disconnected"),
        (("raw", b"<html>not HTTP at all</html>"), "."),
        (("raw", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000), "."),
        (("raw", b"HTTP/1.1 999 \xff\r\n\r\n"), "."),
        (("raw", CHUNKED + b"fffffffffffffff\r\nabc"), "."),
        (("raw", CHUNKED + b"not a number\r\nabc"), "."),
    ],
)
def test_what_is_no_file_never_becomes_one(site, content, tmp_path, fault, match):
    site.files["/file"] = content
    site.always["/file"] = fault
    refused(site, tmp_path, match)


def test_a_body_shorter_than_expected_is_refused(site, content, tmp_path):
    site.files["/file"] = content
    site.always["/file"] = ("headers", {"Content-Length": str(len(content) - 1)})
    refused(
        site, tmp_path, "127,999 bytes, where 128,000 were expected", size=len(content)
    )


def test_a_redirect_from_https_to_http_is_not_followed():
    asked = []

    def answer(request):
        asked.append(str(request.url))
        where = {
            "/down": "http://example.org/file",
            "/over": "https://example.org/file",
        }.get(request.url.path)
        return (
            httpx2.Response(302, headers={"Location": where})
            if where
            else httpx2.Response(200, content=b"x")
        )

    with web.client(5) as session:
        session._transport = httpx2.MockTransport(answer)
        session._mounts = {}
        with pytest.raises(
            web.Refused,
            match=r"safe.org redirects from https to http, to example.org: not followed",
        ):
            session.get("https://safe.org/down")
        assert asked == ["https://safe.org/down"]
        assert session.get("https://safe.org/over").text == "x"
        assert session.get("http://safe.org/down").text == "x"


def test_proxies_of_the_environment_are_used(site, content, tmp_path, monkeypatch):
    site.files["/file"] = content
    monkeypatch.setenv("HTTP_PROXY", site.url)
    with transfer.client(QUICK) as session:
        Transfer(
            session,
            "http://files.example/file",
            tmp_path / "file",
            None,
            QUICK,
            lambda what, n, total: None,
        ).run()
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://x"])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    if proxy.startswith("socks5"):
        monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    with pytest.raises(UserError, match=r"proxy .*cannot be used"):
        transfer.client(QUICK)


def test_a_proxy_that_is_not_there_is_named_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    with transfer.client(HASTY) as session, pytest.raises(TransferError) as caught:
        Transfer(
            session,
            "http://files.example/x",
            tmp_path / "x",
            None,
            HASTY,
            lambda *a: None,
        ).run()
    assert "through the proxy http://127.0.0.1:9 of the environment" in str(
        caught.value
    )
    assert "secret" not in str(caught.value)


def test_a_stream_that_ends_early_is_no_file(tmp_path):
    """Without a stated length the end of a stream looks like the end of the file."""
    target = tmp_path / "file"
    (tmp_path / "file.part").touch()
    begun = Transfer(None, "http://x/file", target, 10, QUICK, lambda *_: None)
    response = SimpleNamespace(iter_raw=lambda: iter([b"abc", b"def"]))
    with pytest.raises(httpx2.RemoteProtocolError, match="ended early"):
        begun._take(response, 0)
    assert (tmp_path / "file.part").read_bytes() == b"abcdef"


@pytest.mark.parametrize(
    ("etag", "validator"), [('"a"', '"a"'), ('W/"a"', "yesterday"), ("", "yesterday")]
)
def test_a_weak_etag_does_not_name_the_bytes(etag, validator):
    headers = {"ETag": etag, "Last-Modified": "yesterday"}
    assert _validator(httpx2.Response(200, headers=headers)) == validator
