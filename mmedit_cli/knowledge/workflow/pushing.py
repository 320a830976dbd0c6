"""Uploads of an export to the hub; access is checked before anything is written, and an upload can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli import __version__, hub, reading
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output
from mmedit_cli.storage import remove_file, sha256_json, sha256_of, write_json

# in an export that waits for its upload: its report, and a digest of the ledger
WAITING = "not-uploaded.json"


@dataclass(frozen=True)
class Export:
    """An export that is asked for: from a ledger or a folder of concepts `made_from` to the new folder `to`.

    how: the options it is made with. repo: where it is uploaded to, if anywhere. private: whether it is private there.
    """

    made_from: Path
    to: Path
    how: dict[str, Any]
    repo: str | None
    private: bool


def export_and_push(
    asked: Export, make: Callable[[], dict[str, Any]], out: Output
) -> dict[str, Any]:
    """Return the report of `make()`, which writes the folder, with the address where it was uploaded to.

    A folder that is complete and was not uploaded is not made again. Raises UserError if the hub would refuse it,
    before anything is written, or if the upload fails.
    """
    if asked.repo is None:
        return make()
    _check(asked.repo)
    report = _waiting(asked)
    if report is not None:
        out.note(f"{asked.to} is complete, and not uploaded yet")
    else:
        report = make()
    return {**report, "url": _push(asked, asked.repo, report)}


def _check(repo: str) -> None:
    """Raise UserError unless the hub is there and this user may write to the repository's owner.

    Nothing is created.
    """
    later = "without --push-to-hub the folder is written; `hf upload OWNER/NAME FOLDER` sends it later"
    if hub.is_offline():
        raise UserError(
            "--push-to-hub: HF_HUB_OFFLINE is set, so the network is not used",
            f"unset it; {later}",
        )
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository = hub.Repository(repo)
    hub.prepare()
    try:
        validate_repo_id(repo)
        user = dict(HfApi().whoami())
        names = {user["name"], *(org["name"] for org in user.get("orgs", []))}
        role = user.get("auth", {}).get("accessToken", {}).get("role")
    except Exception as error:  # the errors of the transport below differ between releases of the hub client
        found = hub.trouble(error, repository)
        raise UserError(
            f"--push-to-hub {repo}: {found.problem}", f"{found.hint}; {later}"
        ) from error
    owner, mark, _ = repo.rpartition("/")
    if mark and owner not in names:
        known = ", ".join(sorted(names))
        raise UserError(
            f"--push-to-hub {repo}: {user['name']} does not belong to {owner}",
            f"owners: {known}",
        )
    if role == "read":
        raise UserError(
            f"--push-to-hub {repo}: the token may only read",
            "log in with a token that may write",
        )


def _waiting(asked: Export) -> dict[str, Any] | None:
    """Return the report of an export that is complete but not uploaded yet; None if there is no such export."""
    to = asked.to
    path = to / WAITING
    if not path.is_file():
        return None
    note = reading.read_json_object(
        path, error=UserError, hint=f"remove {to}, or name another folder with --to"
    )
    same = (
        note.text("made_from") == _state_of(asked.made_from)
        and dict(note.mapping("how")) == asked.how
    )
    return dict(note.mapping("report")) if same else None


def _push(asked: Export, repo: str, report: dict[str, Any]) -> str:
    """Upload an export to a repository of the hub and return its address; a repeated call uploads what is missing.

    Raises UserError if it fails; the folder is complete then.
    """
    from huggingface_hub import HfApi

    to = asked.to
    note = {
        "made_from": _state_of(asked.made_from),
        "how": asked.how,
        "report": report,
    }
    write_json(to / WAITING, note)
    api = HfApi(library_name="mmedit", library_version=__version__)
    try:
        hub.prepare()
        url = api.create_repo(repo, private=asked.private, exist_ok=True)
        api.upload_folder(
            folder_path=to,
            repo_id=url.repo_id,
            commit_message="Export of edits",
            ignore_patterns=[WAITING],
        )
    except Exception as error:  # as above
        found = hub.trouble(error, hub.Repository(repo))
        raise UserError(
            f"{repo}: cannot be uploaded: {found.problem}",
            f"{found.hint}; {to} is complete: the same command uploads it",
        ) from error
    remove_file(to / WAITING)
    return str(url)


def _state_of(folder: Path) -> str:
    """Return a digest of what a ledger or a folder of concepts lists."""
    listed = {
        path.name: sha256_of(path)
        for path in sorted(folder.glob("*.json*"))
        if path.is_file()
    }
    return sha256_json(listed)
