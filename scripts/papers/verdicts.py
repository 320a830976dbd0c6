"""Does a claim of a paper hold? A rule compares figures, and an answer is given only where their intervals allow one.

A rule says of one row, after a number of edits, for one score:

    above: [rows] or others, by: POINTS      it is above each of them; others: every row that the paper gives it for
    below: [rows], by: POINTS                it is below each of them
    at_least: POINTS, at_most: POINTS
    loses_at_most, loses_at_least: POINTS, since: EDITS      compared with itself after fewer edits

Of two figures the difference lies between low minus high and high minus low, which is wider than its own interval, so
neither answer is a matter of which cases were drawn. One comparison that fails decides against the claim;
one that is missing or open leaves it open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from figures import Figure, Table

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
OPEN = "cannot be told"
KINDS = (
    "above",
    "below",
    "at_least",
    "at_most",
    "loses_at_most",
    "loses_at_least",
)


@dataclass(frozen=True)
class Verdict:
    """A verdict and the reason for it."""

    word: str
    why: str


@dataclass(frozen=True)
class _Margin:
    """By how much a comparison holds, at least and at most; None: a figure is missing. `against` is the other row."""

    against: str
    low: float | None
    high: float | None


def judge(claim: Mapping[str, Any], table: Table, rivals: Sequence[str]) -> Verdict:
    """Return whether a claim holds in a table; `rivals` are the rows that `others` means.

    Raises ValueError for a rule that has none, or several, of the kinds above.
    """
    rule = claim.get("rule")
    if rule is None:
        return Verdict(OPEN, claim["why"])
    models = claim.get("on_models")
    if models and table.model not in models:
        return Verdict(OPEN, f"it is about {' and '.join(models)}")
    kinds = [kind for kind in KINDS if kind in rule]
    if len(kinds) != 1:
        raise ValueError(f"a rule has one of {', '.join(KINDS)}, not {kinds}")
    own = table.figures.get((rule["of"], rule["after"], rule["score"]))
    if own is None:
        return Verdict(OPEN, f"{rule['of']}: not measured")
    margins = _margins(kinds[0], rule, own, table, rivals)
    return _decide(margins, strict=kinds[0] in ("above", "below"))


def _margins(
    kind: str,
    rule: Mapping[str, Any],
    own: Figure,
    table: Table,
    rivals: Sequence[str],
) -> list[_Margin]:
    limit = rule[kind]
    if kind == "at_least":
        return [_Margin("", own.low - limit, own.high - limit)]
    if kind == "at_most":
        return [_Margin("", limit - own.high, limit - own.low)]
    if kind in ("loses_at_most", "loses_at_least"):
        before = table.figures.get((rule["of"], rule["since"], rule["score"]))
        if before is None:
            return [_Margin(f"itself after {rule['since']}", None, None)]
        low = before.low - own.high - limit
        high = before.high - own.low - limit
        if kind == "loses_at_most":
            low, high = -high, -low
        return [_Margin("", low, high)]
    rows = rivals if limit == "others" else limit
    by = rule.get("by", 0)
    found = []
    for row in rows:
        other = table.figures.get((row, rule["after"], rule["score"]))
        if other is None:
            found.append(_Margin(row, None, None))
            continue
        low, high = own.low - other.high, own.high - other.low
        if kind == "below":
            low, high = -high, -low
        found.append(_Margin(row, low - by, high - by))
    return found


def _decide(margins: Sequence[_Margin], *, strict: bool) -> Verdict:
    failed, missing, unsure = [], [], []
    for margin in margins:
        if margin.low is None or margin.high is None:
            missing.append(margin.against)
        elif margin.high < 0 or (strict and margin.high == 0):
            failed.append(margin.against)
        elif margin.low < 0 or (strict and margin.low == 0):
            unsure.append(margin.against)
    if failed:
        return Verdict(NOT_REPRODUCED, _named("fails against", failed))
    reasons = []
    if unsure:
        reasons.append(_named("within the intervals of", unsure))
    if missing:
        reasons.append("not measured: " + ", ".join(missing))
    if reasons or not margins:
        return Verdict(OPEN, "; ".join(reasons) or "nothing to compare with")
    return Verdict(REPRODUCED, "")


def _named(what: str, rows: Sequence[str]) -> str:
    names = [row for row in rows if row]
    if names:
        return f"{what} {', '.join(names)}"
    return "" if what.startswith("fails") else "within its interval"


def together(verdicts: Sequence[Verdict]) -> str:
    """Return the verdict over several tables: all have to agree that it holds, one is enough that it does not."""
    words = {verdict.word for verdict in verdicts}
    if NOT_REPRODUCED in words:
        return NOT_REPRODUCED
    return REPRODUCED if words == {REPRODUCED} else OPEN


def rivals_of(
    claim: Mapping[str, Any], rows: Sequence[str], published: Sequence[Table]
) -> list[str]:
    """Return the rows that `others` means: those for which the paper gives the figure, variants left out."""
    rule = claim.get("rule") or {}
    given = set()
    for table in published:
        for row, edits, score in table.figures:
            if (edits, score) == (rule.get("after"), rule.get("score")):
                given.add(row)
    return [row for row in rows if row in given and row != rule.get("of")]
