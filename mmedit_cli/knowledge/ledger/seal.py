"""The seal of a ledger: what `edits.jsonl` has to begin with, so that lost or changed lines are noticed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

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
            accepted = read_json_object(self.path).records("accepted")
            return [
                Beginning(e.integer("bytes"), e.text("sha256"), e.flag("torn", False))
                for e in accepted
            ]
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
        self._digest, self._size, self._before = hashlib.sha256(lines), len(lines), None
        self._started = True

    def is_current(self, accepted: list[Beginning] | None) -> bool:
        """Tell whether the seal on disk is about the lines so far."""
        return accepted is not None and self._now() in accepted

    def extend(self, line: bytes) -> None:
        """Seal one more line that is on disk."""
        before = self._now()
        self._before = Beginning(before.bytes, before.sha256, torn=True)
        self._digest.update(line)
        self._size += len(line)
        self.write()

    def write(self, *more: bytes) -> None:
        """Seal the lines that `start` and `extend` were told of, if any; with `more`, accept those as well."""
        accepted = [self._now()] if self._started else []
        accepted += [
            Beginning(len(lines), hashlib.sha256(lines).hexdigest()) for lines in more
        ]
        if self._before is not None:
            accepted.append(self._before)
        write_json(self.path, {"accepted": [vars(beginning) for beginning in accepted]})

    def _now(self) -> Beginning:
        return Beginning(self._size, self._digest.hexdigest())


@dataclass(frozen=True)
class Beginning:
    """What lines may begin with; `torn`: only where nothing but a line without its newline follows."""

    bytes: int
    sha256: str
    torn: bool = False

    def agrees(self, lines: bytes, torn: bool) -> bool:
        """Tell whether lines, with a torn one behind them or not, begin so."""
        if self.torn and not (torn and len(lines) == self.bytes):
            return False
        return (
            len(lines) >= self.bytes
            and hashlib.sha256(lines[: self.bytes]).hexdigest() == self.sha256
        )


def _way_out(ledger: Path) -> str:
    return (
        f"put the file back from a copy, or `mmedit edits repair {ledger}` takes up the edits whose tensors are still "
        "there"
    )
