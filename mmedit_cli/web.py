"""The HTTP client of this program. It uses proxies, never steps down from https to http, and limits every answer."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx2

from mmedit_cli.errors import UserError

T = TypeVar("T")
_SMALL_BODY = 1 << 20  # of a redirect or of an error: nobody reads more of it
_API_BODY = 64 << 20  # of a question to the hub: a list of files at most
_PACKED_BODY = (
    256 << 10
)  # the same, if it is compressed though nobody asked for that: it unpacks to a thousand times more
_UNSTATED_BODY = 1 << 30  # of a file whose length the server does not state


class Refused(httpx2.TransportError):
    """An answer that was given up; a second request would not help."""


@dataclass(frozen=True)
class Pace:
    """How slow an answer may be: `least` bytes in each `seconds`; its headers come within `answer` seconds."""

    least: int = 1_000
    seconds: float = 10.0
    answer: float = 15.0


def client(
    timeout: float,
    pace: Pace = Pace(),
    request_hooks: Sequence[Callable[[httpx2.Request], object]] = (),
) -> httpx2.Client:
    """Return a client that follows redirects, uses the proxies of the environment, and gives up what `Pace` excludes.

    `timeout`: seconds for a connection, and between two pieces of an answer.

    Raises UserError if a proxy of the environment cannot be used.
    """

    def prepare(request: httpx2.Request) -> None:
        request.headers["Accept-Encoding"] = (
            "identity"  # a part of a compressed answer cannot be continued
        )
        given = request.extensions.get("timeout", {})
        if not any(given.values()):  # huggingface_hub turns the timeouts off
            request.extensions["timeout"] = httpx2.Timeout(timeout).as_dict()

    def watch(response: httpx2.Response) -> None:
        _refuse_downgrade(response)
        response.stream = _Watched(response.stream, _limit_of(response), pace)  # type: ignore[arg-type]

    try:
        return _Client(
            pace.answer,
            follow_redirects=True,
            timeout=timeout,
            event_hooks={"request": [*request_hooks, prepare], "response": [watch]},
        )
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        names = ", ".join(
            f"{scheme} proxy {plain_address(url)}"
            for scheme, url in getproxies().items()
        )
        raise UserError(
            f"{names}: cannot be used: {error}",
            "the proxies come from HTTP_PROXY, HTTPS_PROXY and ALL_PROXY",
        ) from error


def proxy_for(url: str) -> str:
    """Return the proxy of the environment that requests to `url` go through, without its password; "" if none."""
    address = httpx2.URL(url)
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all") or ""
    if not proxy or proxy_bypass(address.host):
        return ""
    return plain_address(proxy)


def plain_address(url: str) -> str:
    """Return an address without the user name and password in it."""
    scheme, mark, rest = url.rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


class _Client(httpx2.Client):
    """A client with a limit on the whole time until the headers of an answer are there.

    Timeouts count from one byte to the next: headers that trickle in never exceed them.
    """

    def __init__(self, seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._seconds = seconds

    def send(self, request: httpx2.Request, **settings: Any) -> httpx2.Response:
        """Send a request; raise Refused if its answer takes too long. An upload may take any time."""
        send = super().send
        if request.method not in ("GET", "HEAD"):
            return send(request, **settings)
        return _within(self._seconds, lambda: send(request, **settings))


def _within(seconds: float, job: Callable[[], T]) -> T:
    """Run `job` in a thread and return its result; raise Refused, and abandon the thread, if it takes too long."""
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            results.put((job(), None))
        except BaseException as error:
            results.put((None, error))

    context = contextvars.copy_context()
    threading.Thread(target=lambda: context.run(work), daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise Refused(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


class _Watched(httpx2.SyncByteStream):
    """The body of an answer; reading fails when it becomes too long or too slow."""

    def __init__(self, stream: httpx2.SyncByteStream, limit: int, pace: Pace) -> None:
        self._stream, self._limit, self._pace = stream, limit, pace

    def __iter__(self) -> Iterator[bytes]:
        count = recent = 0
        since = time.monotonic()
        for chunk in self._stream:
            count += len(chunk)
            recent += len(chunk)
            if count > self._limit:
                raise Refused(
                    f"an answer of more than {self._limit:,} bytes, where none so long was announced"
                )
            now = time.monotonic()
            if now - since >= self._pace.seconds:
                if recent < self._pace.least:
                    raise Refused(
                        f"too slow: {recent:,} bytes in {now - since:.0f} seconds"
                    )
                since, recent = now, 0
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _refuse_downgrade(response: httpx2.Response) -> None:
    if response.url.scheme != "https" or not response.has_redirect_location:
        return
    try:
        target = response.url.join(response.headers["Location"])
    except httpx2.InvalidURL:
        return  # the client itself says so
    if target.scheme == "http":
        raise Refused(
            f"{response.url.host} redirects from https to http, to {target.host}: not followed"
        )


def _limit_of(response: httpx2.Response) -> int:
    """Return the limit on the length of a body; the client itself enforces a stated length."""
    if response.has_redirect_location or response.status_code >= 400:
        return _SMALL_BODY
    if response.url.path.startswith("/api/"):
        return _PACKED_BODY if "Content-Encoding" in response.headers else _API_BODY
    stated = response.headers.get("Content-Length", "")
    return int(stated) if stated.isdigit() else _UNSTATED_BODY
