"""One file over HTTP: in parts, continued after an interruption, patient with a busy server."""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import httpx2

from mmedit_cli.output import TransferTick

T = TypeVar("T")
_BUSY = {408, 425, 429, 500, 502, 503, 504}
_UNREACHED = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
_CONNECTS = 2  # a server that is not there will not be there in a minute
_SAVE_EVERY = 8 << 20
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
    """How a transfer behaves: parts at once, smallest part in bytes, tries without progress, and seconds."""

    parts: int = 4
    part_bytes: int = 16 << 20
    tries: int = 5
    backoff: float = 1.0
    longest_wait: float = 300.0
    timeout: float = 30.0


class _Changed(Exception):
    """The server no longer serves what the parts were taken from."""


class _Busy(Exception):
    def __init__(self, reason: str, after: float | None) -> None:
        super().__init__(reason)
        self.after = after


def client(manners: Manners) -> httpx2.Client:
    """Return an HTTP client that follows redirects and honours the proxy variables of the environment."""
    return httpx2.Client(
        follow_redirects=True,
        timeout=manners.timeout,
        headers={"User-Agent": "mmedit", "Accept-Encoding": "identity"},
    )


class Transfer:
    """Brings `url` to `target`; an earlier attempt that was interrupted is continued.

    What is on its way lies in `target`.part, and `target`.part.json remembers which bytes are there; the file gets its
    name when all are. `size` is what is expected, and checked before anything is read.
    """

    def __init__(
        self, session: httpx2.Client, url: str, target: Path, size: int | None, manners: Manners, tick: TransferTick
    ) -> None:
        self.session, self.url, self.target, self.manners, self.tick = session, url, target, manners, tick
        self.size = size
        self.part = target.with_name(target.name + ".part")
        self.note = target.with_name(target.name + ".part.json")
        self.validator = ""
        self.total = 0
        self.spans: list[list[int]] = []  # [next byte, end] of each part
        self.counted = self.unsaved = 0
        self.lock, self.stop = threading.Lock(), threading.Event()

    def run(self) -> None:
        """Transfer the file.

        Raises TransferError; what came so far is kept for the next attempt.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if not self._probe():
            self._whole()
        else:
            try:
                self._parts()
            except _Changed:
                self._whole()
        self.note.unlink(missing_ok=True)
        os.replace(self.part, self.target)

    def _probe(self) -> bool:
        """Ask for one byte; return whether the server gives parts."""

        def ask() -> bool:
            with _answer(self.session, self.url, {"Range": "bytes=0-0"}) as response:
                if response.status_code == 416:  # an empty file has no first byte
                    return False
                found = _content_range(response)
                if found is None:
                    self._check_size(_length(response))
                    return False
                self.total, self.validator = found[2], _validator(response)
                self._check_size(self.total)
                self._check_room()
                return True

        return self._patiently(ask)

    def _parts(self) -> None:
        """Take all parts at once, each from where it stopped."""
        if not self._resume():
            count = max(1, min(self.manners.parts, self.total // self.manners.part_bytes))
            cuts = [self.total * i // count for i in range(count + 1)]
            self.spans = [[start, end] for start, end in pairwise(cuts)]
            with self.part.open("wb") as file:
                file.truncate(self.total)
            self._save()
        self._count(self.total - sum(end - here for here, end in self.spans))
        with ThreadPoolExecutor(len(self.spans)) as pool:
            jobs = [pool.submit(self._patiently, lambda span=span: self._span(span)) for span in self.spans]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()
            finally:
                self.stop.set()
                pool.shutdown()
                self._save()
                self.stop.clear()

    def _span(self, span: list[int]) -> None:
        """Take one part; what has come is noted even if the connection breaks."""
        if span[0] >= span[1]:
            return
        headers = {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        if self.validator:
            headers["If-Range"] = self.validator
        with _answer(self.session, self.url, headers) as response, self.part.open("r+b", buffering=0) as file:
            found = _content_range(response)
            if found is None or found[0] != span[0] or found[2] != self.total:
                raise _Changed
            file.seek(span[0])
            for chunk in response.iter_raw():
                chunk = chunk[: span[1] - span[0]]
                file.write(chunk)
                with self.lock:
                    span[0] += len(chunk)
                    self._count(len(chunk))
                    self.unsaved += len(chunk)
                    if self.unsaved >= _SAVE_EVERY:
                        self._save()
                if self.stop.is_set() or span[0] >= span[1]:
                    break
        if span[0] < span[1] and not self.stop.is_set():
            raise httpx2.RemoteProtocolError("the connection ended early")

    def _whole(self) -> None:
        """Take the file in one piece, from the start at every attempt: the server gives no parts."""

        def take() -> None:
            self.note.unlink(missing_ok=True)
            self._count(-self.counted)
            with _answer(self.session, self.url, {}) as response, self.part.open("wb") as file:
                length = _length(response)
                self._check_size(length)
                for chunk in response.iter_raw():
                    file.write(chunk)
                    self._count(len(chunk))
            if length is not None and self.counted < length:
                raise httpx2.RemoteProtocolError("the connection ended early")

        self._patiently(take)
        self._check_size(self.counted)

    def _patiently(self, job: Callable[[], T]) -> T:
        """Do the job again after a fault that may pass; progress in between resets the patience."""
        failures, before = 0, self.counted
        while True:
            try:
                return job()
            except (_Busy, httpx2.TransportError) as error:
                failures = 1 if self.counted > before else failures + 1
                before = max(before, self.counted)
                delay = self.manners.backoff * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
                delay = max(delay, getattr(error, "after", None) or 0.0)
                reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
                tries = min(_CONNECTS, self.manners.tries) if isinstance(error, _UNREACHED) else self.manners.tries
                if failures >= tries:
                    raise TransferError(f"{reason} (tried {failures} times)") from error
                if delay > self.manners.longest_wait:
                    raise TransferError(f"{reason}, and the server asks to wait {delay:.0f} seconds") from error
                if self.stop.wait(delay):
                    raise TransferError(reason) from error

    def _check_size(self, found: int | None) -> None:
        if found is not None and self.size is not None and found != self.size:
            raise TransferError(f"{found:,} bytes, where {self.size:,} were expected")

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if self.total > free and not self.part.exists():
            raise TransferError(f"needs {self.total:,} bytes, and the disk has {free:,} free")

    def _count(self, count: int) -> None:
        self.counted += count
        self.tick(self.target.name, count, self.total or self.size)

    def _resume(self) -> bool:
        """Read which bytes are there already; return False if there are none, or of another version."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            same = (note["url"], note["validator"], note["total"]) == (self.url, self.validator, self.total)
            spans = [[int(here), int(end)] for here, end in note["spans"]]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not same or not self.part.is_file() or self.part.stat().st_size != self.total:
            return False
        self.spans = spans
        return True

    def _save(self) -> None:
        note = {"url": self.url, "validator": self.validator, "total": self.total, "spans": self.spans}
        temporary = self.note.with_name(self.note.name + ".new")
        temporary.write_text(json.dumps(note), encoding="utf-8")
        os.replace(temporary, self.note)
        self.unsaved = 0


@contextmanager
def _answer(session: httpx2.Client, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
    """Open a response that is read as it comes; an answer that is no file is raised."""
    try:
        with session.stream("GET", url, headers=headers) as response:
            _check_status(response)
            yield response
    except httpx2.InvalidURL as error:
        raise TransferError(f"not an address: {error}") from error
    except httpx2.TooManyRedirects as error:
        raise TransferError("the address leads in a circle") from error


def _check_status(response: httpx2.Response) -> None:
    status = response.status_code
    if status in _BUSY:
        raise _Busy(f"HTTP {status} {response.reason_phrase}".rstrip(), _retry_after(response))
    if status >= 400 and status != 416:
        raise TransferError(f"HTTP {status} {response.reason_phrase}".rstrip())
    if _is_page(response) and status == 200:
        page = b""
        for chunk in response.iter_raw():
            page += chunk
            if len(page) > _PAGE:
                break
        raise PageInstead(page.decode("utf-8", "replace"))


def _is_page(response: httpx2.Response) -> bool:
    return bool(response.headers.get("Content-Type", "").startswith("text/html"))


def _retry_after(response: httpx2.Response) -> float | None:
    """Read Retry-After: seconds, or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _content_range(response: httpx2.Response) -> tuple[int, int, int] | None:
    """Return first byte, last byte and total of a partial answer, None if it is not one."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or match is None or _is_page(response):  # of a page, all is wanted
        return None
    first, last, total = map(int, match.groups())
    return first, last, total


def _length(response: httpx2.Response) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdigit() and response.status_code == 200 else None


def _validator(response: httpx2.Response) -> str:
    """Return what If-Range may carry: a strong ETag, else the date of the last change."""
    etag: str = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
