"""What can go wrong on the user's side: each error is one or more lines with a place, and a hint how to go on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MmeditError(Exception):
    """A failure worth a clear message instead of a traceback.

    `problems` are independent one-line statements (all that were found, not only the first); `hint` is the way out.
    """

    exit_code = 1

    def __init__(self, problems: str | Sequence[str], hint: str = "") -> None:
        if isinstance(problems, str):
            problems = (problems,)
        self.problems = tuple(problems)
        self.hint = hint
        super().__init__("\n".join(self.problems))


class NotFinite(MmeditError):
    """A model gave NaN or infinity."""


class UserError(MmeditError):
    """The input can be mended by the user: exit code 2."""

    exit_code = 2


class HparamsError(UserError):
    """A hyper-parameter file or an override is wrong."""


class UnknownName(UserError):
    """A name that is not registered."""


class DataError(UserError):
    """A record, an image or a data folder cannot be used."""


class TooLong(DataError):
    """A query has more tokens than a model reads."""


class ModelError(UserError):
    """A model cannot be found, read or used for what was asked."""


class StateError(UserError):
    """A saved state does not fit the model or the editor it is loaded into."""


class RunError(UserError):
    """A run folder cannot be opened, continued or written."""


def near_miss(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""
