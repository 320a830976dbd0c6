"""One file over HTTP: a single stream, continued after an interruption, patient with a busy server."""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx2

from mmedit_cli import web
from mmedit_cli.output import TransferTick

_BUSY = {408, 425, 429, 500, 502, 503, 504}
_FEW_TRIES = (
    2  # a server that is not there, or says nothing, will not be there in a minute
)
_UNREACHED = (
    httpx2.ConnectError,
    httpx2.TimeoutException,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
)
_PAGE = 1 << 20  # no more than this is read of a page that came instead of a file


class TransferError(Exception):
    """A file cannot be had from this address; the text says why in one line."""


class PageInstead(TransferError):
    """A web page came where a file was expected; `text` is the page."""

    def __init__(self, text: str) -> None:
        super().__init__("a web page came instead of the file")
        self.text = text


@dataclass(frozen=True)
class Manners:
    """How patient a transfer is: tries without progress, then seconds; `pace` says what is too slow."""

    tries: int = 5
    backoff: float = 1.0
    longest_wait: float = 300.0
    timeout: float = 8.0
    pace: web.Pace = field(default_factory=web.Pace)


class _Again(Exception):
    """The transfer did not end, and another request may help; `after`: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _Started(NamedTuple):
    """What is known of the file whose first bytes lie in the part."""

    url: str
    validator: str  # names the version of the file: what If-Range may carry
    total: int


def client(manners: Manners) -> httpx2.Client:
    """Return an HTTP client for transfers."""
    return web.client(manners.timeout, manners.pace)


class Transfer:
    """Brings `url` to `target`; an earlier attempt that was interrupted is continued.

    What is on its way lies in `target`.part, always from the first byte on, and `target`.part.json says of which
    version of the file. The file gets its name when all of it is there. `size` is what is expected, None if not known.
    """

    def __init__(
        self,
        session: httpx2.Client,
        url: str,
        target: Path,
        size: int | None,
        manners: Manners,
        tick: TransferTick,
    ) -> None:
        self.session, self.url, self.target, self.manners, self.tick = (
            session,
            url,
            target,
            manners,
            tick,
        )
        self.size = self.total = size
        self.note, self.new_note, self.part = _beside(target)
        self.counted = 0

    def run(self) -> None:
        """Transfer the file.

        Raises TransferError; what came so far is kept for the next attempt, if it can be continued.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._insist()
        except httpx2.InvalidURL as error:
            raise TransferError(f"not an address: {error}") from error
        except httpx2.TooManyRedirects as error:
            raise TransferError("the address leads in a circle") from error
        except web.Refused as error:
            raise TransferError(str(error)) from error
        finally:
            if not self.note.exists():
                self.part.unlink(
                    missing_ok=True
                )  # what cannot be continued is not kept

    def _insist(self) -> None:
        """Attempt it until it is done; attempts that bring nothing new use up the patience."""
        failures = most = 0
        while True:
            try:
                self._attempt()
                break
            except web.Refused:
                raise
            except (_Again, httpx2.TransportError) as error:
                failures = 1 if self.counted > most else failures + 1
                most = max(most, self.counted)
                self._wait(error, failures)
        os.replace(self.part, self.target)
        self.note.unlink(missing_ok=True)

    def _wait(self, error: Exception, failures: int) -> None:
        """Wait before another attempt; raise TransferError if there is none."""
        reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
        proxy = web.proxy_for(self.url) if isinstance(error, _UNREACHED) else ""
        if proxy:
            reason = f"{reason}, through the proxy {proxy} of the environment"
        tries = (
            min(_FEW_TRIES, self.manners.tries)
            if isinstance(error, _UNREACHED)
            else self.manners.tries
        )
        if failures >= tries:
            raise TransferError(f"{reason} (tried {failures} times)") from error
        delay = self.manners.backoff * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
        delay = max(delay, error.after if isinstance(error, _Again) else 0.0)
        if delay > self.manners.longest_wait:
            raise TransferError(
                f"{reason}, and the server asks to wait {delay:.0f} seconds"
            ) from error
        time.sleep(delay)

    def _attempt(self) -> None:
        """Ask for what is missing, and add what comes to the part."""
        started = self._read_note()
        here = self.part.stat().st_size if started is not None else 0
        if started is not None and here == started.total:
            return
        headers = {}
        if started is not None and here:
            headers = {"Range": f"bytes={here}-", "If-Range": started.validator}
        with self._answer(headers) as response:
            if response.status_code == 200:
                here = 0
                self._start(response)
            elif started is None or _range_of(response) != (
                here,
                started.total - 1,
                started.total,
            ):
                forget_part(self.target)
                raise _Again(
                    f"HTTP {response.status_code} where the rest of the file was asked for"
                )
            else:
                self.total = started.total
            self._take(response, here)

    def _take(self, response: httpx2.Response, here: int) -> None:
        """Write the body behind the `here` bytes that the part has; refuse what is longer than the file."""
        self._count(here - self.counted)
        end = self.total
        with self.part.open("r+b", buffering=0) as file:
            file.seek(here)
            for chunk in response.iter_raw():
                if end is not None and self.counted + len(chunk) > end:
                    forget_part(self.target)
                    raise TransferError(
                        f"more than the {end:,} bytes that were expected"
                    )
                file.write(chunk)
                self._count(len(chunk))
        if end is not None and self.counted < end:
            raise httpx2.RemoteProtocolError("the connection ended early")

    @contextmanager
    def _answer(self, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        """Send the request and give the answer, to be read as it comes; raise what is no file and no part of one."""
        request = self.session.build_request("GET", self.url, headers=headers)
        response = self.session.send(request, stream=True)
        try:
            self._check_status(response, asked_for_rest=bool(headers))
            yield response
        finally:
            response.close()

    def _check_status(self, response: httpx2.Response, *, asked_for_rest: bool) -> None:
        status = response.status_code
        said = f"HTTP {status} {response.reason_phrase}".rstrip()
        if status in _BUSY:
            raise _Again(said, _retry_after(response))
        if response.is_redirect:
            raise TransferError(f"{said}: a redirect that says no place")
        if status != 200 and not (asked_for_rest and status in (206, 416)):
            raise TransferError(said)
        if status == 200 and response.headers.get("Content-Type", "").startswith(
            "text/html"
        ):
            raise PageInstead(_page(response))
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity" and status != 416:
            raise TransferError(
                f"the server sends the file as {encoding}, which nobody asked for"
            )

    def _start(self, response: httpx2.Response) -> None:
        """Begin the part anew; the note comes after it is empty, so it never speaks of other bytes."""
        stated = _stated_length(response)
        if stated is not None and self.size not in (None, stated):
            raise TransferError(f"{stated:,} bytes, where {self.size:,} were expected")
        self.total = self.size if stated is None else stated
        free = shutil.disk_usage(self.target.parent).free
        if (self.total or 0) > free:
            raise TransferError(
                f"needs {self.total:,} bytes, and the disk has {free:,} free"
            )
        forget_part(self.target)
        self.part.touch()
        validator = _validator(response)
        if validator and stated is not None:
            self.new_note.write_text(
                json.dumps(_Started(self.url, validator, stated)), encoding="utf-8"
            )
            os.replace(self.new_note, self.note)

    def _read_note(self) -> _Started | None:
        """Return what the part is the beginning of; None if there is no part that can be continued."""
        try:
            url, validator, total = json.loads(self.note.read_text(encoding="utf-8"))
            fits = self.part.is_file() and self.part.stat().st_size <= total
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        expected = (
            url == self.url
            and isinstance(validator, str)
            and self.size in (None, total)
        )
        return _Started(url, validator, total) if fits and expected else None

    def _count(self, count: int) -> None:
        self.counted += count
        self.tick(self.target.name, count, self.total)


def forget_part(target: Path) -> None:
    """Remove what earlier attempts left beside a file; the note goes first, as it must not speak of another part."""
    for path in _beside(target):
        path.unlink(missing_ok=True)


def _beside(target: Path) -> tuple[Path, Path, Path]:
    """Return where the note about the part of a file lies, a new note until it is whole, and the part."""
    note = target.with_name(f"{target.name}.part.json")
    return (
        note,
        note.with_name(f"{note.name}.new"),
        target.with_name(f"{target.name}.part"),
    )


def _page(response: httpx2.Response) -> str:
    page = b""
    for chunk in response.iter_raw():
        page += chunk
        if len(page) > _PAGE:
            break
    return page.decode("utf-8", "replace")


def _retry_after(response: httpx2.Response) -> float:
    """Return the seconds in Retry-After, which gives seconds or a date; 0 without it."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(
            0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        )
    except (ValueError, OverflowError):
        return 0.0


def _range_of(response: httpx2.Response) -> tuple[int, int, int] | None:
    """Return first byte, last byte and total of a partial answer; None if it is none, or a part of a web page."""
    match = re.fullmatch(
        r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})",
        response.headers.get("Content-Range", ""),
    )
    page = response.headers.get("Content-Type", "").startswith("text/html")
    if response.status_code != 206 or match is None or page:
        return None
    first, last, total = map(int, match.groups())
    return first, last, total


def _stated_length(response: httpx2.Response) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if re.fullmatch(r"\d{1,18}", value) else None


def _validator(response: httpx2.Response) -> str:
    """Return what If-Range may carry: a strong ETag, else the date of the last change."""
    etag: str = response.headers.get("ETag", "")
    return (
        etag
        if etag and not etag.startswith("W/")
        else response.headers.get("Last-Modified", "")
    )
