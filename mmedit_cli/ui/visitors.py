"""Whose edits are whose: a ledger for each visitor of the page, and ledgers that several open by name."""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path

from mmedit_cli.errors import UserError

_NAME = re.compile(r"\w[\w. -]{0,63}", re.ASCII)


class Visitors:
    """Where the ledgers of visitors lie: their own in `home`, those with a name in `shared`, which may be None."""

    def __init__(self, home: Path, shared: Path | None) -> None:
        self.home = home
        self.shared = shared

    def begin(self) -> Path:
        """Return a place for a ledger that nobody else knows."""
        name = secrets.token_hex(16)
        return self.home / name

    def open(self, name: str) -> Path:
        """Return the place of the ledger of that name; raise UserError where names are not open, or not a name."""
        if self.shared is None:
            raise UserError(
                "ledgers with a name are closed here", "mmedit ui --ledgers FOLDER"
            )
        name = name.strip()
        if not _NAME.fullmatch(name):
            raise UserError(
                "a ledger's name is made of letters, digits, blanks, dots, - and _"
            )
        return self.shared / name

    def leave(self, ledger: str) -> None:
        """Remove the ledger of a visitor who has left; one with a name stays."""
        folder = Path(ledger)
        if ledger and folder.parent == self.home:
            shutil.rmtree(folder, ignore_errors=True)
