"""Access to the Hugging Face hub: one way to ask it, and what its failures mean for the user."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TIMEOUT = (
    10.0  # seconds for a connection to the hub, and between two pieces of an answer
)
_UNFINISHED = re.compile(
    r"(.+)\.[0-9a-f]{8}\.incomplete"
)  # the name of a file on its way into the hub's cache
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Repository:
    """A repository of the hub that was asked for; `kind` is "model" or "dataset"."""

    name: str
    kind: str = "model"
    revision: str | None = None

    @property
    def page(self) -> str:
        """The address of its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


@dataclass(frozen=True)
class Trouble:
    """Why a request to the hub failed, and the way out: one line each."""

    problem: str
    hint: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.hint}"


def is_offline() -> bool:
    """Tell whether HF_HUB_OFFLINE asks for no network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


@cache
def prepare() -> None:
    """Make huggingface_hub use the HTTP client of this program. Call it before the hub is asked.

    Raises UserError if a proxy of the environment cannot be used.
    """
    from huggingface_hub import get_session, set_client_factory

    from mmedit_cli import web

    web.client(TIMEOUT).close()  # to hear what is wrong with a proxy
    hooks = get_session().event_hooks[
        "request"
    ]  # they keep HF_HUB_OFFLINE and count downloads
    set_client_factory(lambda: web.client(TIMEOUT, web.Pace(), hooks))


def snapshot(repository: Repository, *, patterns: list[str]) -> Path:
    """Download the files of a repository that match into the hub's cache, and return the folder with them.

    Raises what huggingface_hub raises; `trouble` explains it.
    """
    from huggingface_hub import snapshot_download

    prepare()
    sweep(repository)
    return Path(
        snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=patterns,
        )
    )


def sweep(repository: Repository) -> None:
    """Remove the leftovers of killed downloads from the hub's cache. Running downloads hold a lock and stay."""
    from filelock import FileLock, Timeout
    from huggingface_hub import constants

    folder = f"{repository.kind}s--{repository.name.replace('/', '--')}"
    cache_folder = Path(constants.HF_HUB_CACHE)
    for path in (cache_folder / folder / "blobs").glob("*.incomplete"):
        match = _UNFINISHED.fullmatch(path.name)
        lock = (
            cache_folder / ".locks" / folder / f"{match.group(1) if match else ''}.lock"
        )
        if match is None or path.is_symlink() or not lock.is_file():
            continue
        try:
            with FileLock(lock, timeout=0):
                path.unlink(missing_ok=True)
        except (Timeout, OSError):
            continue


def trouble(error: Exception, repository: Repository) -> Trouble:
    """Return what a failure of huggingface_hub means for the user."""
    causes = list(_causes(error))
    for explain in (_refusal, _local, _connection):
        for cause in causes:
            found = explain(cause, repository)
            if found is not None:
                return found
    text = _first_line(error)
    if any(
        isinstance(cause, ValueError | KeyError | TypeError | AttributeError)
        for cause in causes
    ):
        return _no_hub(text)
    return Trouble(text, "the same command tries again")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refusal(error: BaseException, repository: Repository) -> Trouble | None:
    """Explain an error status of the hub; None for other failures."""
    from huggingface_hub import errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    page = repository.page
    if isinstance(error, errors.GatedRepoError):
        return Trouble(
            f"{repository.name} is gated", f"accept the licence at {page}, then {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return Trouble(
            f"no revision {repository.revision!r}",
            f"{page}/tree/main lists them; without --revision it is the newest",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return Trouble(
            f"no such repository, or a private one: {page}",
            f"check the name; if it is private, {login}",
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return Trouble("no token for the hub on this machine", login)
    if isinstance(error, errors.DisabledRepoError):
        return Trouble(f"the hub has disabled {page}", "the page says why")
    if isinstance(error, errors.HFValidationError):
        return Trouble(
            f"{repository.name!r} is no name of a repository", "names are OWNER/NAME"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Trouble("HF_HUB_OFFLINE is set, so the network is not used", "unset it")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return _status(error.response.status_code, login)
    return None


def _status(status: int, login: str) -> Trouble:
    from huggingface_hub import constants

    problem = f"HTTP {status} from {constants.ENDPOINT}"
    if status in (401, 403):
        return Trouble(f"{problem}: not allowed with this token, or without one", login)
    if status == 407:
        return Trouble(f"{problem}: the proxy wants a password", _PROXIES)
    if status == 429 or status >= 500:
        return Trouble(
            f"{problem}: it is busy or out of order",
            "the same command tries again, later",
        )
    return Trouble(problem, "is HF_ENDPOINT a hub?")


_PROXIES = "the proxies come from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY"


def _local(error: BaseException, repository: Repository) -> Trouble | None:
    """Explain a failure of this machine's disk; None for other failures."""
    from huggingface_hub import constants

    if not isinstance(error, OSError) or isinstance(error, ConnectionError):
        return None
    place = error.filename or constants.HF_HUB_CACHE
    if error.errno in _UNWRITABLE:
        return Trouble(
            f"{place}: cannot be written: {os.strerror(error.errno)}",
            "set HF_HOME to a folder that can be written",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Trouble(
            f"{place}: {os.strerror(error.errno)}",
            "make room, or set HF_HOME to a folder on another disk",
        )
    return None


def _connection(error: BaseException, repository: Repository) -> Trouble | None:
    """Explain a failed connection; None for other failures."""
    import httpx2
    from huggingface_hub import constants, errors

    from mmedit_cli import web

    hub = constants.ENDPOINT
    if isinstance(error, errors.FileMetadataError):
        return _no_hub("no name of a version")
    if isinstance(error, web.Refused):
        return Trouble(f"{hub}: {error}", "the same command tries again")
    if not isinstance(error, httpx2.TransportError):
        return None
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    proxy = web.proxy_for(hub)
    if proxy and isinstance(
        error, httpx2.ConnectError | httpx2.TimeoutException | httpx2.ProxyError
    ):
        return Trouble(
            f"{hub} cannot be reached through the proxy {proxy}: {reason}", _PROXIES
        )
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Trouble(
            f"{hub} cannot be reached: {reason}", f"is there a network? {_PROXIES}"
        )
    if isinstance(error, httpx2.TimeoutException):
        return Trouble(f"{hub} does not answer", "the same command tries again")
    return Trouble(
        f"{hub} cut the connection: {reason}",
        "the same command tries again, where it stopped",
    )


def _no_hub(what: str) -> Trouble:
    from huggingface_hub import constants

    return Trouble(
        f"{constants.ENDPOINT} answers as no hub does ({what})",
        "is HF_ENDPOINT a hub, and does this network ask for a login in the browser?",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0][:200] if lines else "") or type(error).__name__
