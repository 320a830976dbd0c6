"""The work of `mmedit edit` and `mmedit edits`: make edits, measure their effect, undo, redo, compare, compact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from mmedit_cli.knowledge.workflow.asking_otherwise import Otherwise
from mmedit_cli.output import Output
from mmedit_cli.pictures import picture_digest
from mmedit_cli.types import EditCase, Query, in_one_line

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.models.base import VisionLanguageModel

_MOST_NOTES = 5  # on edits whose loss did not move, one by one
_TEXTS = (
    "What is the capital of Peru?",
    "Which category does a toolbox belong to?",
    "What is the currency of Japan?",
    "What is the capital of Kenya?",
)
# of EmojiKB: a dog, a car, a sunflower, a banana
_PICTURES = ("1f415", "1f697", "1f33b", "1f34c")


def make_edits(
    folder: Path,
    options: EditOptions,
    requests: Sequence[Query],
    batch: int | None,
    out: Output,
    otherwise: Sequence[Otherwise] = (),
    backbone: VisionLanguageModel | None = None,
) -> Any:
    """Make edits, keep them, and return what they did: answers and locality probes before and after, time, memory.

    `otherwise` are the same facts asked in other ways, before and after; `backbone` is the model, where it is loaded.
    Of many requests, those that are in the ledger already are only asked again. So an interrupted command can be
    repeated, and a finished one shows the same again.
    """
    from mmedit_cli.knowledge.evaluation.answers import target_losses
    from mmedit_cli.knowledge.evaluation.metrics import answer_match, same_answer

    reworded = [way.query for way in otherwise]
    check_pictures([*requests, *reworded])
    requests = _in_one_line(requests, out)
    with begin_edits(folder, options, out, backbone) as model:
        probes = locality_probes(requests, pictures=model.backbone.sees)
        ids: list[int | None] = [None] * len(requests)
        if len(requests) > 1:
            ids = _made_before(requests, model.ledger, out)
        pairs = zip(requests, ids, strict=True)
        new = [request for request, known in pairs if known is None]
        if not new:
            probes, reworded = [], []
        asked_twice = [*probes, *reworded]
        with out.progress({"edits": len(new)}) as tick:
            model.check([*new, *reworded])
            before = model.generate(asked_twice)
            losses = iter(target_losses(model.backbone, new) if new else [])
            added = iter(model.edit(new, batch=batch, tick=tick))
            after = model.generate(asked_twice)
        made = []
        losses_before = []
        for known in ids:
            losses_before.append(next(losses) if known is None else None)
            made.append(model.ledger.edits[next(added) if known is None else known])
        asked = [edit.request for edit in made]
        answers = model.generate(asked)
        losses_after = target_losses(model.backbone, asked)
        peak_memory = runtime.peak_memory(model.backbone.device)
        active = len(model.ledger.active)
    edits = []
    for i, edit in enumerate(made):
        line = described(edit)
        line["after"] = answers[i]
        line["holds"] = answer_match(answers[i], edit.request.target) == 1
        line["loss_before"] = losses_before[i]
        line["loss_after"] = losses_after[i]
        edits.append(line)
    _tell_unmoved(edits, out)
    locality = []
    for probe, was, said in zip(probes, before, after, strict=False):
        line = {"prompt": probe.prompt}
        line["picture"] = "" if probe.image is None else probe.image.name
        line["before"] = was
        line["after"] = said
        line["same"] = same_answer(was, said) == 1
        locality.append(line)
    pairs_otherwise = zip(before[len(probes) :], after[len(probes) :], strict=True)
    ways = []
    for way, (was, said) in zip(otherwise, pairs_otherwise, strict=False):
        ways.append(way.asked(was, said))
    return {
        "ledger": str(folder),
        "editor": options.editor,
        "active": active,
        "new": len(new),
        "edits": edits,
        "otherwise": ways,
        "locality": locality,
        "cost": {"seconds": model.seconds, "peak_memory": peak_memory},
    }


def _tell_unmoved(edits: Sequence[dict[str, Any]], out: Output) -> None:
    """Say which edits do not hold and left the loss of their target where it was."""
    unmoved = [
        edit
        for edit in edits
        if not edit["holds"]
        and edit["loss_before"] is not None  # it was made just now
        and math.isclose(
            edit["loss_before"],
            edit["loss_after"],
            rel_tol=1e-3,
        )
    ]
    for edit in unmoved[:_MOST_NOTES]:
        out.note(
            f"edit {edit['id']}: its loss did not move ({edit['loss_after']:.4g}), so nothing was learned"
        )
    more = len(unmoved) - _MOST_NOTES
    if more > 0:
        out.note(f"and {more:,} more whose loss did not move")


def _in_one_line(requests: Sequence[Query], out: Output) -> list[Query]:
    """Return requests whose targets have no line break; say so of those that had one."""
    changed = []
    count = 0
    for request in requests:
        new = in_one_line(request)
        changed.append(new)
        count += request.target != new.target
    if count:
        out.note(
            f"targets with line breaks: {count:,}; an answer is one line, so blanks take their place"
        )
    return changed


def _made_before(
    requests: Sequence[Query], ledger: Ledger, out: Output
) -> list[int | None]:
    """Return for each request the id of the edit that taught it already; None if there is none.

    Of several edits of one picture and question only the newest active one counts.
    """

    def key(query: Query) -> tuple[Any, ...]:
        picture = query.image and picture_digest(query.image)
        return query.prompt, picture, query.background, query.chat

    newest = {key(edit.request): edit for edit in ledger.active}
    ids: list[int | None] = []
    for request in requests:
        edit = newest.get(key(request))
        is_taught = edit is not None and edit.request.target == request.target
        ids.append(edit.id if edit is not None and is_taught else None)
    there = len(ids) - ids.count(None)
    if there:
        out.note(
            f"{there:,} of {len(ids):,} edits are in {ledger.folder} already: asked again, not made again"
        )
    return ids


def locality_probes(requests: Sequence[Query], *, pictures: bool = True) -> list[Query]:
    """Return questions that no edit should touch: facts in text, other pictures, the same picture asked otherwise."""
    folder = registry.emojikb_dir() / "noto"
    about_pictures = [request for request in requests if request.image is not None]
    edited = set()
    for request in about_pictures:
        assert request.image is not None
        edited.add(picture_digest(request.image))
    probes = [Query(text) for text in _TEXTS]
    for code in _PICTURES if pictures else ():
        path = folder / f"{code}.png"
        if path.is_file() and picture_digest(path) not in edited:
            probes.append(Query("What is this?", image=path))
    if about_pictures:
        other = "What colour is the background?"
        probes.append(replace(about_pictures[0], prompt=other, target=""))
    asked = {(request.prompt, request.image) for request in requests}
    return [probe for probe in probes if (probe.prompt, probe.image) not in asked]


def read_facts(file: Path, how: DataOptions | None = None) -> list[EditCase]:
    """Return the facts or cases of a .jsonl, .json, .csv or .tsv file; raise DataError naming what is wrong."""
    from mmedit_cli.knowledge.data.base import DataOptions, read_data

    return read_data(str(file), options=how or DataOptions()).cases


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
        # again: another command may have come between
        ids = edited.ledger.select(text, active=do == "undo")
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
            operations = ledger.operations(undone=ledger.rows)
            edited.editor.replay([Operation(*pair) for pair in operations])
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
    left = Ledger.open(one)
    right = Ledger.open(two)
    settings = {}
    for key in ("editor", "hparams", "model", "dtype", "seed", "checkpoint"):
        if left.config[key] != right.config[key]:
            settings[key] = [left.config[key], right.config[key]]
    first = _by_question(left)
    second = _by_question(right)
    other_target = []
    same = 0
    for asked, edit in first.items():
        counterpart = second.get(asked)
        if counterpart is None:
            continue
        if counterpart.request.target == edit.request.target:
            same += 1
        else:
            pair = {"first": described(edit), "second": described(counterpart)}
            other_target.append(pair)
    return {
        "only_in_first": _without(first, second),
        "only_in_second": _without(second, first),
        "other_target": other_target,
        "same": same,
        "settings": settings,
    }


def contradictions(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the active edits that ask the same and want another answer, described, a list a question.

    The same is: a picture of equal content on an equal background, and a question that differs in case, blanks and
    signs alone; answers are compared likewise.
    """
    by_question: dict[tuple[Any, ...], list[LedgerEdit]] = {}
    ledger = Ledger.open(folder)
    for edit in ledger.active:
        asked = edit.request
        key = [_words(asked.prompt), asked.chat]
        if asked.image is not None:
            key += [asked.image.name, asked.background]
        same = by_question.setdefault(tuple(key), [])
        same.append(edit)
    found = []
    for edits in by_question.values():
        answers = {_words(edit.request.target) for edit in edits}
        if len(answers) > 1:
            group = [described(edit) for edit in edits]
            found.append(group)
    return found


def _words(text: str) -> str:
    """Return a text without case, articles and signs, or as it is, where nothing else is left."""
    from mmedit_cli.knowledge.evaluation.metrics import normalize

    words = normalize(text)
    if not words:
        return text
    return " ".join(words)


_ByQuestion = dict[tuple[Any, ...], LedgerEdit]


def _by_question(ledger: Ledger) -> _ByQuestion:
    """Return the active edits by picture, background and question; ledgers name a picture after its content."""
    found = {}
    for edit in ledger.active:
        image = edit.request.image and Path(edit.request.image.name)
        found[question(replace(edit.request, image=image))] = edit
    return found


def _without(edits: _ByQuestion, others: _ByQuestion) -> list[dict[str, Any]]:
    """Return as plain values the edits whose question is not among `others`."""
    return [described(edit) for key, edit in edits.items() if key not in others]
