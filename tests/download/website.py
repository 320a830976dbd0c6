"""A real HTTP server on this machine that misbehaves as it is told."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from mmedit_cli.download.transfer import Manners
from mmedit_cli.web import Pace

COMMIT = "c" * 40
QUICK = Manners(tries=3, backoff=0.01, longest_wait=5, timeout=5)
HASTY = Manners(tries=3, backoff=0.01, timeout=0.3, pace=Pace(seconds=0.3, answer=0.6))


class Site:
    """Files by path, and what goes wrong next at a path: a queue of faults, one used up by each request.

    A fault is one of

    - `("cut", n)`: the connection ends after n bytes of the body;
    - `("status", code, headers)`;
    - `("garbage",)`: as many bytes as asked for, but other ones;
    - `("headers", headers)`: these instead of the right ones;
    - `("raw", bytes)`: these bytes instead of an answer, then the connection ends;
    - `("hang",)`: the connection is open, and nothing comes;
    - `("drip", bytes)`: these bytes, then one byte every 50 ms for ever;
    - `("endless", bytes)`: these bytes, then a chunk of 64 KiB again and again.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.types: dict[str, str] = {}
        self.faults: dict[str, list[tuple]] = defaultdict(list)
        self.always: dict[str, tuple] = {}
        self.ranges = True
        self.seen: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.hook: Callable[[str], None] = lambda path: None
        self.url = ""
        self.closing = threading.Event()

    def ranges_of(self, path: str) -> list[str]:
        """The Range headers of the requests for a path."""
        return [asked for where, asked in self.seen if where == path]

    def repository(
        self,
        repo: str,
        files: dict[str, bytes],
        *,
        kind: str = "datasets",
        licence: str = "mit",
    ) -> None:
        """Serve a repository as the hub does: a description, a tree, and its files at one commit."""
        prefix = "" if kind == "models" else f"/{kind}"
        entries, tree = [], []
        for path, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            large = not path.endswith((".json", ".txt"))
            lfs = {
                "sha256": sha256,
                "oid": sha256,
                "size": len(content),
                "pointerSize": 130,
            }
            entries.append(
                {
                    "rfilename": path,
                    "size": len(content),
                    "blobId": blob,
                    **({"lfs": lfs} if large else {}),
                }
            )
            tree.append(
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": blob,
                    **({"lfs": lfs} if large else {}),
                }
            )
            for revision in ("main", COMMIT):
                self.files[f"{prefix}/{repo}/resolve/{revision}/{path}"] = content
        info = {
            "_id": "0",
            "id": repo,
            "sha": COMMIT,
            "private": False,
            "disabled": False,
            "tags": [],
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "siblings": entries,
            "cardData": {"license": licence},
        }
        for revision in ("", "/revision/main", f"/revision/{COMMIT}"):
            self.files[f"/api/{kind}/{repo}{revision}"] = json.dumps(info).encode()
        for revision in ("main", COMMIT):
            self.files[f"/api/{kind}/{repo}/tree/{revision}"] = json.dumps(
                tree
            ).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def _answer(self, *, body: bool) -> None:
        site, path = self.site, unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range", "")
        site.seen.append((path, asked))
        site.tokens.add(self.headers.get("Authorization", ""))
        site.hook(path)
        fault = site.always.get(path) or (
            site.faults[path].pop(0) if site.faults[path] else ("none",)
        )
        if fault[0] in _ODD:
            self.close_connection = True
            return _ODD[fault[0]](self, *fault[1:])
        if fault[0] == "status":
            return self._head(
                fault[1],
                {**(fault[2] if len(fault) > 2 else {}), "Content-Length": "0"},
            )
        if path not in site.files:
            headers = (
                {"X-Error-Code": "RepoNotFound"} if path.startswith("/api") else {}
            )
            return self._head(404, {**headers, "Content-Length": "0"})
        content = site.files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {
            "ETag": etag,
            "X-Repo-Commit": COMMIT,
            "Content-Type": site.types.get(path, "application/json"),
        }
        status, start, end = 200, 0, len(content)
        if asked and site.ranges and self.headers.get("If-Range", etag) == etag:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            status, start, end = (
                206,
                int(first),
                min(int(last) + 1 if last else end, end),
            )
            if start >= len(content):
                return self._head(
                    416,
                    {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"},
                )
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        payload = content[start:end] if fault[0] != "garbage" else bytes(end - start)
        headers |= {"Content-Length": str(len(payload)), "Accept-Ranges": "bytes"}
        self._head(status, headers | fault[1] if fault[0] == "headers" else headers)
        if body and fault[0] == "cut":
            self.wfile.write(payload[: fault[1]])
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
        elif body:
            self.wfile.write(payload)

    def _raw(self, sent: bytes) -> None:
        self.wfile.write(sent)

    def _hang(self) -> None:
        self.site.closing.wait()

    def _drip(self, sent: bytes) -> None:
        self.wfile.write(sent)
        with suppress(OSError):  # the client has gone
            while not self.site.closing.wait(0.05):
                self.wfile.write(b"x")

    def _endless(self, sent: bytes) -> None:
        self.wfile.write(sent)
        with suppress(OSError):
            while not self.site.closing.is_set():
                self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


_ODD = {
    "raw": _Handler._raw,
    "hang": _Handler._hang,
    "drip": _Handler._drip,
    "endless": _Handler._endless,
}
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextmanager
def serve() -> Iterator[Site]:
    """Run a site on this machine while the block runs."""
    found = Site()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"site": found})
    )
    server.daemon_threads = True
    server.handle_error = lambda *words: (
        None
    )  # clients go away here, as they are meant to
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}
    )
    thread.start()
    try:
        yield found
    finally:
        found.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


# bytes that differ at every place, so that a part in the wrong place shows
CONTENT = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(4_000))
