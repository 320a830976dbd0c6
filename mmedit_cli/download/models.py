"""Models by name or hub id: into the cache of huggingface_hub, where `--model` and transformers look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedit_cli import catalog, hub
from mmedit_cli.download import receipt
from mmedit_cli.download.catalogue import Source
from mmedit_cli.download.install import DownloadError
from mmedit_cli.download.sources import SourceError, check_room, hub_files
from mmedit_cli.errors import UserError


def repository(name: str) -> str | None:
    """Return the hub repository behind a name of `mmedit list` or a hub id, None if it is neither.

    Raises UserError for a model that needs no download.
    """
    if name in catalog.bundled():
        raise UserError(
            f"{name}: comes along, in {catalog.bundled()[name]}",
            f"use it: --model {name}",
        )
    entry = catalog.named_models().get(name)
    if entry is not None and entry.is_random:
        raise UserError(
            f"{name}: is built from a config, there is nothing to download",
            f"use it: --model {name}",
        )
    if entry is not None:
        return entry.repo
    is_hub_id = name.count("/") == 1 and not Path(name).is_dir()
    return name if is_hub_id else None


def plan(repo: str, revision: str | None) -> dict[str, Any]:
    """Return which files would be fetched, their sizes and the licence, and whether they are in the cache.

    Raises DownloadError.
    """
    source = Source("hub", repo, "model", revision, catalog.patterns(repo))
    try:
        commit, files, licence = hub_files(source)
    except SourceError as error:
        raise _failure(repo, str(error)) from error
    folder = cached(repo, commit)
    here = folder is not None and all((folder / file.path).is_file() for file in files)
    return {
        "model": repo,
        "revision": commit,
        "licence": licence,
        "files": files,
        "folder": folder,
        "bytes": sum(file.bytes or 0 for file in files),
        "state": "present" if here else "missing",
    }


def get(repo: str, revision: str | None, planned: dict[str, Any]) -> dict[str, Any]:
    """Fetch what was planned and compare each file with the digest that the hub states.

    Raises DownloadError.
    """
    from huggingface_hub import constants

    state = planned["state"]
    repository = hub.Repository(repo, revision=revision)
    try:
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        check_room(cache, planned["bytes"] if state == "missing" else 0)
        folder = hub.snapshot(repository, patterns=list(catalog.patterns(repo)))
    except SourceError as error:
        raise _failure(repo, str(error)) from error
    except Exception as error:  # the errors of the transport below differ between releases of the hub client
        raise _failure(repo, str(hub.trouble(error, repository))) from error
    planned = {
        **planned,
        "folder": folder,
        "state": "present" if state == "present" else "downloaded",
    }
    problems = receipt.damage(planned["folder"], planned["files"])
    if problems:
        hint = "remove the model from the cache (`hf cache rm`) and download it again"
        raise DownloadError([f"{repo}: {problem}" for problem in problems], hint)
    return planned


def cached(repo: str, revision: str | None) -> Path | None:
    """Return the folder of a model in the cache without asking the hub, None if it is not there."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(catalog.patterns(repo)),
            local_files_only=True,
        )
    except (OSError, ValueError):  # not there, or no name for a repository
        return None
    return Path(folder)


def _failure(repo: str, reason: str) -> DownloadError:
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    by_hand = f"by hand: copy the model's files into a folder and use it: --model FOLDER (cache: {cache})"
    return DownloadError([f"{repo}: hub model: {reason}", f"{repo}: {by_hand}"])


def names() -> list[str]:
    """Return the models that have a name of their own and a hub repository."""
    return [name for name, entry in catalog.MODELS.items() if entry.repo is not None]
