"""Repair of a damaged ledger: edits whose tensors are there are taken up, even if their lines were lost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmedit_cli.errors import RunError, StateError
from mmedit_cli.knowledge.ledger.ledger import Ledger, LedgerEdit
from mmedit_cli.records import Run
from mmedit_cli.storage import sha256_of, write_atomic
from mmedit_cli.types import Query


@dataclass
class Repair:
    """What a repair did: ids of edits, numbers of lines, names of files."""

    taken_up: list[int] = field(default_factory=list)
    unreadable_lines: list[int] = field(default_factory=list)
    without_tensors: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    copy: str = ""  # where the old lines are


def repair(folder: Path) -> Repair:
    """Make a ledger whole again without its model, and return what was done; the old lines are kept beside the new.

    Lines that cannot be read are left out. Files of tensors that no line names are taken up: each says whose it is,
    but those of mmedit 0.1, which stay. Undoing that only a lost line told of is lost.

    Raises UserError if there is no ledger, StateError for links in it, RunError if another process writes it.
    """
    done = Repair()
    with Ledger.open_damaged(folder) as (ledger, old):
        numbered = enumerate(old.split(b"\n")[:-1], 1)
        for number, line in numbered:
            if not _read(ledger, line):
                done.unreadable_lines.append(number)
        ledger.files.recover(ledger.current())
        found = dict(_found(ledger, done))
        take_up = _take_up_rows if ledger.rows else _take_up_state
        changed = take_up(ledger, found, done)
        there = {path.stem for path in ledger.shard_files()}
        for edit in ledger.active:
            shard = edit.shard if ledger.rows else ledger.state
            if shard not in there:
                done.without_tensors.append(edit.id)
        if changed or done.unreadable_lines:
            done.copy = _copy(folder, old)
            ledger.replace_lines(list(_lines(ledger)))
        else:
            ledger.seal_again(old)
    return done


def _read(ledger: Ledger, line: bytes) -> bool:
    """Take over what a line says and return True; change nothing and return False if it says nothing that fits."""
    run = Run.view(ledger.folder)
    try:
        (record,) = run.decode("edits", line + b"\n")
        if record["do"] == "add":
            # raises an error if the record is not whole
            Ledger(
                ledger.folder,
                run,
                ledger.config,
                [record],
            )
        elif any(i not in ledger.edits for i in record["ids"]):
            return False
        ledger.take(record)
    except (RunError, KeyError, TypeError, ValueError):
        return False
    return True


def _found(ledger: Ledger, done: Repair) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (digest, whose it is) of the files of tensors that no line names; files that do not say it are left."""
    named = ledger.current()
    for path in ledger.shard_files():
        if path.stem in named:
            continue
        try:
            whose = ledger.files.whose(path.stem)
        except StateError:
            whose = {}
        if whose.get("edits"):
            yield path.stem, whose
        else:
            done.left.append(f"shards/{path.name}")


def _take_up_rows(
    ledger: Ledger, found: dict[str, dict[str, Any]], done: Repair
) -> bool:
    """Add the edits of files that no line names, and find files for edits whose own are gone."""
    changed = False
    there = {path.stem for path in ledger.shard_files()}
    new: dict[tuple[int, Query], LedgerEdit] = {}
    for shard, whose in found.items():
        for row, record in enumerate(whose["edits"]):
            edit = _edit_of(ledger, record, shard, row)
            known = ledger.edits.get(edit.id)
            if known is None or known.request != edit.request:
                new.setdefault((edit.id, edit.request), edit)
            elif known.shard not in there:
                ledger.edits[edit.id] = replace(known, shard=shard, row=row)
                changed = True
    for edit in sorted(new.values(), key=lambda edit: edit.id):
        i = edit.id
        if i in ledger.edits:  # another edit has the number already
            i = max(ledger.edits) + 1
        ledger.edits[i] = replace(edit, id=i, first=i)
        done.taken_up.append(i)
    ordered = sorted(ledger.edits.items())
    ledger.edits.clear()
    ledger.edits.update(ordered)
    return changed or bool(new)


def _take_up_state(
    ledger: Ledger, found: dict[str, dict[str, Any]], done: Repair
) -> bool:
    """Take up the file that stands for most edits, if it goes on from what the lines say; the others are left."""
    there = {path.stem for path in ledger.shard_files()}
    best = ""
    edits = dict(ledger.edits)
    for shard, whose in found.items():
        in_file = {}
        for record in whose["edits"]:
            edit = _edit_of(ledger, record, None, 0)
            in_file[edit.id] = edit
        if not _goes_on(in_file, ledger):
            continue
        has_more = len(in_file) > len(edits)
        has_the_same = len(in_file) == len(edits) and ledger.state not in there
        if has_more or (has_the_same and not best):
            undone = set(whose.get("undone", ()))
            best = shard
            edits = {}
            for i, edit in in_file.items():
                edits[i] = replace(edit, active=i not in undone)
    done.left += [f"shards/{shard}.safetensors" for shard in found if shard != best]
    if not best:
        return False
    done.taken_up = [i for i in edits if i not in ledger.edits]
    ledger.edits.update(edits)
    ledger.state = best
    return True


def _goes_on(edits: dict[int, LedgerEdit], ledger: Ledger) -> bool:
    """Whether a file has every edit that the lines know."""
    known = ledger.edits.items()
    return all(i in edits and edits[i].request == edit.request for i, edit in known)


def _edit_of(
    ledger: Ledger, record: dict[str, Any], shard: str | None, row: int
) -> LedgerEdit:
    """Return an edit as it is described in the file of its tensors."""
    image = None
    if record["image"] is not None:
        image = ledger.folder / "pictures" / record["image"]
    request = Query(
        record["prompt"],
        record["target"],
        image,
        record["background"],
        record["chat"],
    )
    i = int(record["id"])
    return LedgerEdit(
        i,
        request,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        before=record["before"],
        picture=record["picture"],
        active=True,
        first=int(record.get("first", i)),
        shard=shard,
        row=row,
    )


def _lines(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield the lines that say what a ledger holds now."""
    if ledger.rows:
        for edit in ledger.edits.values():
            yield ledger.record(
                [edit],
                edit.shard,
                edit.row,
            )
    else:
        for ids, _ in ledger.operations(undone=True):
            yield ledger.record(
                [ledger.edits[i] for i in ids],
                ledger.state,
                0,
            )
    undone = [i for i, edit in ledger.edits.items() if not edit.active]
    if undone:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        yield {
            "do": "undo",
            "time": now,
            "ids": undone,
            "shard": None if ledger.rows else ledger.state,
        }


def _copy(folder: Path, lines: bytes) -> str:
    """Keep the old lines under a new name and return it; a copy that a killed repair made is enough."""
    digest = hashlib.sha256(lines).hexdigest()
    number = 1
    while (path := folder / f"edits.before-repair-{number}.jsonl").exists():
        if path.is_file() and sha256_of(path) == digest:
            return path.name
        number += 1
    write_atomic(path, lines)
    return path.name
