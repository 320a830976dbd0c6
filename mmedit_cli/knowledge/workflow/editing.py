"""What `mmedit edit` and `mmedit edits` do: make edits and show their effect, take them back, compare, tidy up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmedit_cli import registry, runtime
from mmedit_cli.knowledge.ledger.edited_model import (
    EditOptions,
    begin_edits,
    check_pictures,
    described,
    open_edits,
    question,
)
from mmedit_cli.knowledge.ledger.ledger import Ledger, LedgerEdit
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.output import Output
from mmedit_cli.pictures import picture_digest
from mmedit_cli.types import EditCase, Query, in_one_line

_TOLD = 5  # edits whose loss did not move, one by one
_TEXTS = (
    "What is the capital of Peru?",
    "Which category does a toolbox belong to?",
    "What is the currency of Japan?",
    "What is the capital of Kenya?",
)
_PICTURES = (
    "1f415",
    "1f697",
    "1f33b",
    "1f34c",
)  # of EmojiKB: a dog, a car, a sunflower, a banana


def make_edits(
    folder: Path,
    options: EditOptions,
    requests: Sequence[Query],
    batch: int | None,
    out: Output,
) -> Any:
    """Make edits, keep them, and return what they did: answers and locality probes before and after, time, memory.

    Of many requests those that the ledger has already are not made again, only asked again: so an interrupted command
    can be repeated, and a finished one shows what it showed.
    """
    from mmedit_cli.knowledge.evaluation.answers import target_losses
    from mmedit_cli.knowledge.evaluation.metrics import answer_match, same_answer

    check_pictures(requests)
    requests = _in_one_line(requests, out)
    probes = locality_probes(requests)
    with begin_edits(folder, options, out) as model:
        ids = (
            _made_before(requests, model.ledger, out)
            if len(requests) > 1
            else [None] * len(requests)
        )
        new = [
            request
            for request, known in zip(requests, ids, strict=True)
            if known is None
        ]
        if not new:
            probes = []
        with out.progress({"edits": len(new)}) as tick:
            model.check(new)
            before = model.generate(probes)
            losses = iter(target_losses(model.backbone, new) if new else [])
            added = iter(model.edit(new, batch=batch, tick=tick))
            after = model.generate(probes)
        made = [
            model.ledger.edits[next(added) if known is None else known] for known in ids
        ]
        losses_before = [next(losses) if known is None else None for known in ids]
        answers = model.generate([edit.request for edit in made])
        losses_after = target_losses(model.backbone, [edit.request for edit in made])
        peak, active = (
            runtime.peak_memory(model.backbone.device),
            len(model.ledger.active),
        )
    edits = [
        {
            **described(edit),
            "after": answer,
            "holds": answer_match(answer, edit.request.target) == 1,
            "loss_before": loss_before,
            "loss_after": loss_after,
        }
        for edit, answer, loss_before, loss_after in zip(
            made, answers, losses_before, losses_after, strict=True
        )
    ]
    _tell_unmoved(edits, out)
    locality = [
        {
            "prompt": probe.prompt,
            "picture": "" if probe.image is None else probe.image.name,
            "before": old,
            "after": new,
            "same": same_answer(old, new) == 1,
        }
        for probe, old, new in zip(probes, before, after, strict=True)
    ]
    cost = {"seconds": model.seconds, "peak_memory": peak}
    return {
        "ledger": str(folder),
        "editor": options.editor,
        "active": active,
        "new": len(new),
        "edits": edits,
        "locality": locality,
        "cost": cost,
    }


def _tell_unmoved(edits: Sequence[dict[str, Any]], out: Output) -> None:
    """Say which edits do not hold and left the loss of their target where it was."""
    unmoved = [
        edit
        for edit in edits
        if not edit["holds"]
        and edit["loss_before"] is not None  # it was made just now
        and math.isclose(edit["loss_before"], edit["loss_after"], rel_tol=1e-3)
    ]
    for edit in unmoved[:_TOLD]:
        out.note(
            f"edit {edit['id']}: its loss did not move ({edit['loss_after']:.4g}), so nothing was learned"
        )
    if len(unmoved) > _TOLD:
        out.note(f"and {len(unmoved) - _TOLD:,} more whose loss did not move")


def _in_one_line(requests: Sequence[Query], out: Output) -> list[Query]:
    """Return requests whose targets have no line break; say so of those that had one."""
    changed = [in_one_line(request) for request in requests]
    count = sum(
        request.target != new.target
        for request, new in zip(requests, changed, strict=True)
    )
    if count:
        out.note(
            f"targets with line breaks: {count:,}; an answer is one line, so blanks take their place"
        )
    return changed


def _made_before(
    requests: Sequence[Query], ledger: Ledger, out: Output
) -> list[int | None]:
    """Return for each request the newest active edit of its picture and question, None unless that says the same."""

    def known(query: Query) -> tuple[Any, ...]:
        return (
            query.prompt,
            query.image and picture_digest(query.image),
            query.background,
            query.chat,
        )

    newest = {known(edit.request): edit for edit in ledger.active}
    found = [newest.get(known(request)) for request in requests]
    ids = [
        edit.id if edit is not None and edit.request.target == request.target else None
        for edit, request in zip(found, requests, strict=True)
    ]
    there = len(ids) - ids.count(None)
    if there:
        out.note(
            f"{there:,} of {len(ids):,} edits are in {ledger.folder} already: asked again, not made again"
        )
    return ids


def locality_probes(requests: Sequence[Query]) -> list[Query]:
    """Return questions that no edit should touch: facts in text, other pictures, the same picture asked otherwise."""
    folder = registry.emojikb_dir() / "noto"
    edited = {
        picture_digest(request.image)
        for request in requests
        if request.image is not None
    }
    pictures = [
        path
        for code in _PICTURES
        if (path := folder / f"{code}.png").is_file()
        and picture_digest(path) not in edited
    ]
    probes = [Query(text) for text in _TEXTS] + [
        Query("What is this?", image=path) for path in pictures
    ]
    asked = {(request.prompt, request.image) for request in requests}
    first = next((request for request in requests if request.image is not None), None)
    other = "What colour is the background?"
    if first is not None and (other, first.image) not in asked:
        probes.append(replace(first, prompt=other, target=""))
    return [probe for probe in probes if (probe.prompt, probe.image) not in asked]


def read_facts(file: Path) -> list[EditCase]:
    """Return the facts or cases of a .jsonl, .json or .csv file; raise DataError naming what is wrong."""
    from mmedit_cli.knowledge.data.base import read_data

    return read_data(str(file)).cases


def change_edits(
    folder: Path, do: str, text: str, model: ModelOptions, out: Output
) -> dict[str, Any]:
    """Undo or redo the edits that `text` names; the model is loaded only where the other edits depend on them."""
    with Ledger.open(folder, writing=True) as ledger:
        ids = ledger.select(text, active=do == "undo")
        if ledger.rows:
            ledger.mark(do, ids)
            return {do: ids, "active": len(ledger.active)}
    with open_edits(folder, model=model, writing=True, out=out) as edited:
        ids = edited.ledger.select(
            text, active=do == "undo"
        )  # again: another command may have come between
        out.note(
            f"{edited.editor.name} makes the remaining edits again: they depend on each other"
        )
        getattr(edited, do)(ids)
        return {do: ids, "active": len(edited.ledger.active)}


def compact(
    folder: Path, remake: bool, model: ModelOptions, out: Output
) -> dict[str, Any]:
    """Write a ledger anew in few files; `remake` makes every edit again, which mends damaged tensors.

    Returns sizes before and after, and which files were removed: those that were replaced, and those that no line of
    the ledger named.
    """
    from mmedit_cli.knowledge.methods.base import Operation

    if remake:
        with open_edits(
            folder, model=model, writing=True, bare=True, out=out
        ) as edited:
            ledger = edited.ledger
            before = _size(ledger)
            edited.editor.replay(
                [Operation(*pair) for pair in ledger.operations(undone=ledger.rows)]
            )
            removed = ledger.rewrite(edited.editor.tensors())
    else:
        with Ledger.open(folder, writing=True) as ledger:
            before = _size(ledger)
            removed = ledger.rewrite(ledger.tensors(undone=True))
    return {"before": before, "after": _size(ledger), "removed": removed}


def _size(ledger: Ledger) -> dict[str, int]:
    files = ledger.shard_files()
    return {"shards": len(files), "bytes": sum(file.stat().st_size for file in files)}


def diff(one: Path, two: Path) -> dict[str, Any]:
    """Return how the active edits of two ledgers differ, by picture, background and question; no model is loaded."""
    left, right = (Ledger.open(folder) for folder in (one, two))

    def asked(ledger: Ledger) -> dict[tuple[Any, ...], LedgerEdit]:
        return {question(replace(e.request, image=e.request.image and Path(e.request.image.name))): e
                for e in ledger.active}  # fmt: skip

    a, b = asked(left), asked(right)
    settings = {
        key: [left.config[key], right.config[key]]
        for key in ("editor", "hparams", "model", "dtype", "seed", "checkpoint")
        if left.config[key] != right.config[key]
    }
    both = [key for key in a if key in b]
    return {
        "only_in_first": [described(a[key]) for key in a if key not in b],
        "only_in_second": [described(b[key]) for key in b if key not in a],
        "other_target": [
            {"first": described(a[key]), "second": described(b[key])}
            for key in both
            if a[key].request.target != b[key].request.target
        ],
        "same": sum(a[key].request.target == b[key].request.target for key in both),
        "settings": settings,
    }
