"""The HTTP server: routes, keys, limits on what is sent, and a clean end."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.knowledge.workflow.asking import Asker
from mmedit_cli.output import Output, report_failure
from mmedit_cli.reading import LARGEST_TEXT
from mmedit_cli.serving import replies
from mmedit_cli.serving.chat import ApiError, ChatRequest, read_request
from mmedit_cli.serving.desk import Desk, Done, Event, Failed, Question, Words
from mmedit_cli.types import Query

_MOST_READ = 64  # bodies that are read at the same time
_MOST_DECODED = (
    2  # pictures, of 50 million pixels at most, that are decoded at the same time
)
_BODY_SECONDS = 120
_LOOK_SECONDS = 1.0  # between looks whether a client is still there
_LAST_SECONDS = 5  # for answers that are under way when the server is stopped


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and the key that it wants, if any; port 0 is any free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise UserError("the key: only printable ASCII fits into a header")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class Site:
    """The server of one model, known to clients as `name`; a context manager.

    It listens from the start of the block on; `run` answers until `stop`, control-C or SIGTERM. `url` is what clients
    call the base URL. Raises UserError if nothing can listen there.
    """

    def __init__(
        self, asker: Asker, name: str, options: ServerOptions, out: Output
    ) -> None:
        self.name = name
        self.options = options
        self.out = out
        self.desk = Desk(asker)
        self._stack = ExitStack()
        self._told_of_turns = False
        self._reading = 0
        self._decoding = asyncio.Semaphore(_MOST_DECODED)
        self._began = int(time.time())

    def __enter__(self) -> Site:
        with ExitStack() as stack:
            listening = _listening(self.options)
            self._socket = stack.enter_context(listening)
            folder = tempfile.TemporaryDirectory(prefix="mmedit-serve-")
            self._folder = Path(stack.enter_context(folder))
            stack.enter_context(self.desk)
            self._stack = stack.pop_all()
        config = uvicorn.Config(
            self._app(),
            access_log=False,
            log_config=None,
            log_level="critical",  # what goes wrong is reported here
            http="h11",
            ws="none",
            lifespan="off",
            limit_concurrency=4 * _MOST_READ,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        self._server = uvicorn.Server(config)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host = self.options.host
        if ":" in host:
            host = f"[{host}]"
        _, port, *_ = self._socket.getsockname()
        return f"http://{host}:{port}/v1"

    def run(self) -> None:
        """Answer until the end; answers that are under way then have a few seconds."""
        with ended_by_sigterm(), suppress(KeyboardInterrupt):
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Let `run` come to its end, from any thread."""
        self._server.should_exit = True

    # -- routes -------------------------------------------------------------------------------------------------

    def _app(self) -> Starlette:
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        handlers = {
            HTTPException: _not_found,
            MmeditError: _refused,
            ClientDisconnect: _left,
            Exception: _broken,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._admit(request)
        if request.path_params["name"] != self.name:
            raise ApiError(404, f"only {self.name!r} is served", "model_not_found")
        return JSONResponse(self._described())

    async def _complete(self, request: Request) -> Response:
        self._admit(request)
        with self._seat():
            body = await _body_of(request)
            async with self._decoding:
                asked = await asyncio.to_thread(read_request, body, self.name)
                del body
                picture = await asyncio.to_thread(self._kept, asked.picture)
        self._say_of_turns(asked)
        events: asyncio.Queue[Event] = asyncio.Queue()
        question = Question(
            Query(asked.text, image=picture),
            asked.limit,
            partial(_pass_on, asyncio.get_running_loop(), events),
            picture,
        )
        self.desk.put(question)
        if not asked.stream:
            done = await _whole(request, question, events)
            return JSONResponse(replies.Reply(self.name).whole(done))
        first = await _next(request, question, events)
        parts = self._parts(asked, question, first, events)
        return StreamingResponse(parts, media_type="text/event-stream")

    async def _parts(
        self,
        asked: ChatRequest,
        question: Question,
        event: Words | Done,
        events: asyncio.Queue[Event],
    ) -> AsyncIterator[str]:
        """Yield the server-sent events of an answer, from its first event on."""
        reply = replies.Reply(self.name)
        opening = {"role": "assistant", "content": ""}
        try:
            yield replies.event(reply.part(opening))
            latest: Event = event
            while isinstance(latest, Words):
                yield replies.event(reply.part({"content": latest.text}))
                latest = await events.get()
            if isinstance(latest, Failed):
                yield replies.event(replies.described(latest.error))
                return
            yield replies.event(reply.part({}, latest.spoken.finish))
            if asked.with_usage:
                yield replies.event(reply.counted(latest))
            yield replies.LAST_EVENT
        finally:
            question.gone = True

    def _described(self) -> dict[str, object]:
        return {
            "id": self.name,
            "object": "model",
            "created": self._began,
            "owned_by": "mmedit",
        }

    # -- what is let in -----------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Raise ApiError for a wrong key, or for a page of the web that sends its visitor's browser here."""
        key = self.options.key
        if key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.encode(), key.encode())
            if scheme.lower() != "bearer" or not right:
                problem = "the key is wrong, or missing (Authorization: Bearer KEY)"
                raise ApiError(401, problem, "invalid_api_key")
        elif self.options.local:
            called = request.url.hostname or ""
            if called not in ("localhost", "127.0.0.1", "::1", self.options.host):
                raise ApiError(403, f"{called!r} is not the name of this machine")
        sent = request.headers.get("content-type", "").partition(";")[0]
        if request.method == "POST" and sent.strip().lower() != "application/json":
            raise ApiError(
                415, "the body must be JSON (Content-Type: application/json)"
            )

    @contextmanager
    def _seat(self) -> Iterator[None]:
        """Keep a seat for a body that is read; raise ApiError if all are taken."""
        if self._reading >= _MOST_READ:
            raise ApiError(429, "too many requests at once", "rate_limit_exceeded")
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def _kept(self, picture: bytes | None) -> Path | None:
        """Write a picture where the model reads it from."""
        if picture is None:
            return None
        path = self._folder / secrets.token_hex(16)
        path.write_bytes(picture)
        return path

    def _say_of_turns(self, asked: ChatRequest) -> None:
        if asked.alone or self._told_of_turns:
            return
        self._told_of_turns = True
        self.out.note(
            "a conversation was sent: only its last question is asked, as `mmedit ask` does"
        )


def _listening(options: ServerOptions) -> socket.socket:
    """Return a socket that listens; raise UserError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    address = (options.host, options.port)
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{options.host}, port {options.port}: cannot listen there: {reason}",
            "another --port, or 0 for any free one; another --host",
        ) from error


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside the block, SIGTERM ends the program as any exit does: what is open is closed."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(0)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pass_on(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event
) -> None:
    """Hand an event to the loop of the server, from the thread of the model."""
    with suppress(RuntimeError):  # the loop has ended, and nobody waits
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _body_of(request: Request) -> bytes:
    """Return the body of a request; raise ApiError if it is too large or takes too long.

    What is too large is read to its end, but not kept: else the client would not come to read the answer.
    """
    found = bytearray()
    size = 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= LARGEST_TEXT:
                    found += chunk
    except TimeoutError:
        problem = f"the body did not come within {_BODY_SECONDS} seconds"
        raise ApiError(408, problem) from None
    if size > LARGEST_TEXT:
        raise ApiError(413, f"the body is larger than {LARGEST_TEXT >> 20} MiB")
    return bytes(found)


async def _next(
    request: Request, question: Question, events: asyncio.Queue[Event]
) -> Words | Done:
    """Return the next event; raise its error if it failed, or ClientDisconnect if nobody waits any more."""
    while True:
        try:
            event = await asyncio.wait_for(events.get(), _LOOK_SECONDS)
        except TimeoutError:
            if await request.is_disconnected():
                question.gone = True
                raise ClientDisconnect from None
            continue
        except asyncio.CancelledError:
            question.gone = True
            raise
        if isinstance(event, Failed):
            raise event.error
        return event


async def _whole(
    request: Request, question: Question, events: asyncio.Queue[Event]
) -> Done:
    """Return the end of an answer; raise as `_next` does."""
    event = await _next(request, question, events)
    while isinstance(event, Words):
        event = await _next(request, question, events)
    return event


def _failure(error: Exception, status: int) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(replies.described(error), status, headers)


async def _refused(_request: Request, error: Exception) -> Response:
    return _failure(error, replies.status_of(error))


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    asked = f"{request.method} {request.url.path}"
    problem = f"{asked}: there is only GET /v1/models and POST /v1/chat/completions"
    unknown = ApiError(status, problem, "unknown_url")
    return _failure(unknown, status)


async def _left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _broken(_request: Request, error: Exception) -> Response:
    report_failure(error)
    return _failure(error, 500)
