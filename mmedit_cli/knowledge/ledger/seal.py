"""The seal of a ledger: what `edits.jsonl` has to begin with, so that lost or changed lines are noticed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError, StateError
from mmedit_cli.reading import read_json_object
from mmedit_cli.storage import write_json

SEAL = "seal.json"


class Seal:
    """`seal.json`: length and SHA-256 of the lines that are accepted.

    Lines are only ever appended, so a sealed file may have grown by lines that a killed writer could not seal. Before
    all lines are replaced, the new ones are accepted as well as the old ones. A crash of the machine may tear the last
    line although it was sealed, so the lines before it are accepted where a torn one follows.
    """

    def __init__(self, ledger: Path) -> None:
        self.path = ledger / SEAL
        self._digest = hashlib.sha256()
        self._size = 0
        self._before: Beginning | None = None
        self._started = False

    def read(self) -> list[Beginning] | None:
        """Return each accepted beginning; None for a ledger of mmedit 0.1, which has no seal.

        Raises StateError for a damaged seal.
        """
        try:
            accepted = []
            for entry in read_json_object(self.path).records("accepted"):
                size = entry.integer("bytes")
                digest = entry.text("sha256")
                accepted.append(Beginning(size, digest, entry.flag("torn", False)))
            return accepted
        except DataError as error:
            if not self.path.exists():
                return None
            raise StateError(
                f"{self.path}: damaged", _way_out(self.path.parent)
            ) from error

    def check(
        self,
        lines: bytes,
        accepted: list[Beginning] | None,
        *,
        torn: bool,
        shards: bool,
    ) -> None:
        """Raise StateError unless the lines of a ledger are those that were sealed, or more.

        `torn` says whether something without a newline follows. Without a seal only one thing can be told: lines are
        lost where there are none, but files of tensors (`shards`).
        """
        if accepted is None:
            whole = bool(lines) or not shards
        else:
            whole = any(beginning.agrees(lines, torn) for beginning in accepted)
        if not whole:
            problem = "lines were lost or changed since the last command; nothing was written or removed"
            raise StateError(
                f"{self.path.with_name('edits.jsonl')}: {problem}",
                _way_out(self.path.parent),
            )

    def start(self, lines: bytes) -> None:
        """Go on behind lines that are on disk."""
        self._digest = hashlib.sha256(lines)
        self._size = len(lines)
        self._before = None
        self._started = True

    def is_current(self, accepted: list[Beginning] | None) -> bool:
        """Tell whether the seal on disk is about the lines so far."""
        return accepted is not None and self._now() in accepted

    def extend(self, line: bytes) -> None:
        """Seal one more line that is on disk."""
        before = self._now()
        self._before = replace(before, torn=True)
        self._digest.update(line)
        self._size += len(line)
        self.write()

    def write(self, *more: bytes) -> None:
        """Seal the lines that `start` and `extend` were told of, if any; with `more`, accept those as well."""
        accepted = [self._now()] if self._started else []
        for lines in more:
            digest = hashlib.sha256(lines).hexdigest()
            accepted.append(Beginning(len(lines), digest))
        if self._before is not None:
            accepted.append(self._before)
        stored = [beginning.stored() for beginning in accepted]
        write_json(self.path, {"accepted": stored})

    def _now(self) -> Beginning:
        return Beginning(self._size, self._digest.hexdigest())


@dataclass(frozen=True)
class Beginning:
    """What lines may begin with: `size` bytes; `torn`: only where nothing but a line without its newline follows."""

    size: int
    sha256: str
    torn: bool = False

    def stored(self) -> dict[str, Any]:
        """Return it as it stands in the file."""
        return {"bytes": self.size, "sha256": self.sha256, "torn": self.torn}

    def agrees(self, lines: bytes, torn: bool) -> bool:
        """Tell whether lines, with a torn one behind them or not, begin so."""
        if self.torn and not (torn and len(lines) == self.size):
            return False
        if len(lines) < self.size:
            return False
        digest = hashlib.sha256(lines[: self.size])
        return digest.hexdigest() == self.sha256


def _way_out(ledger: Path) -> str:
    return (
        f"put the file back from a copy, or `mmedit edits repair {ledger}` takes up the edits whose tensors are still "
        "there"
    )
