"""The sequential protocol: make N edits, ask everything about all of them, at every milestone; resumable anywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import torch

from mmedit_cli import runtime
from mmedit_cli.errors import MmeditError, RunError, StateError, UserError
from mmedit_cli.knowledge.evaluation import metrics
from mmedit_cli.knowledge.evaluation.ability import (
    Ability,
    compared,
    measure_ability,
)
from mmedit_cli.knowledge.evaluation.answers import Answer, answer_limits, ask
from mmedit_cli.knowledge.evaluation.sharing import Conditions, Sharing
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.reading import open_tensors, parse_json
from mmedit_cli.records import Run
from mmedit_cli.storage import write_atomic
from mmedit_cli.types import EditCase, Query

PROTOCOLS = ("ar", "ar_em", "ar_f1", "tf_liveedit", "tf_easyedit", "tf_em")
SAVE_SECONDS = 30.0
# what `tick` calls the queries that are run through the frozen layers
PREPARING = "preparing"
_AT_LEAST_ONE = ("sequential", "edit_batch", "max_new_tokens", "batch_size", "chunk")


def milestones(sequential: int) -> tuple[int, ...]:
    """Return 1, 10, 100, ... below the number of edits in a row."""
    return tuple(10**k for k in range(len(str(sequential))) if 10**k < sequential)


@dataclass(frozen=True)
class Protocol:
    """How edits are made and asked about.

    sequential: edits made in a row before the model is taken back to the base; report_at: after how many of them
    everything so far is asked (always also after the last); edit_batch: edits made in one operation; chunk: cases that
    are asked together, the unit of resuming; cache_bytes: memory for frozen activations, the rest goes to disk.
    """

    sequential: int = 1
    report_at: tuple[int, ...] = ()
    edit_batch: int = 1
    protocols: tuple[str, ...] = PROTOCOLS
    max_new_tokens: int = 16
    batch_size: int = 16
    chunk: int = 32
    cache_bytes: int = field(default=2 << 30, compare=False)

    def __post_init__(self) -> None:
        known = ", ".join(PROTOCOLS)
        problems = []
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value < 1:
                option = name.replace("_", "-")
                problems.append(f"--{option} {value}: must be at least 1")
        for milestone in self.report_at:
            if not 1 <= milestone <= self.sequential:
                bounds = f"between 1 and --sequential {self.sequential}"
                problems.append(f"--report-at {milestone}: must lie {bounds}")
        for name in self.protocols:
            if name not in PROTOCOLS:
                problems.append(f"--protocols {name}: unknown, known are {known}")
        if not self.protocols:
            problems.append(f"--protocols is empty: choose from {known}")
        if problems:
            raise UserError(problems)

    def stored(self) -> dict[str, Any]:
        """Return what a run records of it: all that may change a number.

        The size of a chunk is stored as `shard`, as version 0.1.0 called it, so that run ids stay the same.
        """
        values = {}
        for name, value in asdict(self).items():
            if name != "cache_bytes":
                values[name] = list(value) if isinstance(value, tuple) else value
        values["shard"] = values.pop("chunk")
        return values

    def groups(self, cases: int) -> list[range]:
        """Cut so many cases into groups that are edited in a row; a last shorter one is kept."""
        starts = range(0, cases, self.sequential)
        return [range(start, min(start + self.sequential, cases)) for start in starts]

    def milestones(self, size: int) -> list[int]:
        """Return after how many edits a group of `size` is asked about, in order, the last edit included."""
        return sorted({m for m in self.report_at if m <= size} | {size})

    def chunks(self, size: int) -> list[range]:
        """Cut a group into ranges of cases such that every milestone is a union of whole ranges.

        So a case is asked in the same company, before and after and at every milestone.
        """
        cuts = {0, size}
        cuts.update(self.milestones(size))
        cuts.update(range(0, size, self.chunk))
        return [range(start, stop) for start, stop in pairwise(sorted(cuts))]

    @property
    def generates(self) -> bool:
        """Whether any protocol reads freely generated text."""
        return any(p.startswith("ar") for p in self.protocols)

    def top(self, cases: Sequence[EditCase]) -> dict[Query, int]:
        """Return how many best ids tf_easyedit compares at every position of a locality query: text 1, images 10."""
        if "tf_easyedit" not in self.protocols:
            return {}
        wanted = {}
        for case in cases:
            for queries in case.locality.values():
                for query in queries:
                    wanted[query] = 1 if query.image is None else 10
        return wanted


@dataclass(frozen=True)
class _Group:
    """Cases edited in a row, from `start` of all cases on."""

    index: int
    start: int
    cases: Sequence[EditCase]


def evaluate_edits(
    editor: Editor,
    cases: Sequence[EditCase],
    run: Run,
    protocol: Protocol,
    how: Conditions | None = None,
) -> dict[str, float]:
    """Edit and ask; every result is in the run's `cases.jsonl` and `edits.jsonl` when this returns.

    Returns how many questions the run has asked of the model, before an interruption too, and in how many seconds.
    A run that was interrupted goes on with the chunk it was in. Of several processes each asks about chunks of its
    own, and the first writes what all have found: the lines are those of one process.
    """
    how = how or Conditions()
    groups = []
    for index, members in enumerate(protocol.groups(len(cases))):
        part = cases[members.start : members.stop]
        groups.append(_Group(index, members.start, part))
    evaluation = _SequentialEvaluation(editor, protocol, run, how)
    if editor.first_layer is None:
        evaluation.run_groups(groups)
        return evaluation.sharing.cost
    queries: list[Query] = []
    for case in cases:
        for _, asked in case.columns():
            queries.extend(asked)
    activations = editor.backbone.cached_activations(
        editor.first_layer,
        queries,
        group=protocol.batch_size,
        budget=protocol.cache_bytes,
        tick=lambda n: how.tick(PREPARING, n),
    )
    with activations as cache, evaluation.sharing.activations(cache):
        evaluation.run_groups(groups)
    return evaluation.sharing.cost


class _SequentialEvaluation:
    """The state of one evaluation: what was scored already, and the answers of the base model."""

    def __init__(
        self,
        editor: Editor,
        protocol: Protocol,
        run: Run,
        how: Conditions,
    ) -> None:
        self.editor = editor
        self.protocol = protocol
        self.run = run
        self.base_folder = how.base_folder or run.folder / "base"
        self.tick = how.tick
        self.probe = how.probe
        lines = run.read("cases")
        self.done = {(line["group"], line["edits"], line["index"]) for line in lines}
        self.saved = time.monotonic()
        self.sharing = Sharing(run, how.processes)
        # all have read before the first one writes
        how.processes.wait()

    def run_groups(self, groups: Sequence[_Group]) -> None:
        """Evaluate the groups that are not done yet."""
        for group in groups:
            if all(key in self.done for key in self._keys(group)):
                size = len(group.cases)
                self.tick("before", size)
                self.tick("edits", size)
                self.tick("after", sum(self.protocol.milestones(size)))
            else:
                self._run_group(group)
        self.sharing.hand_over()

    def _keys(self, group: _Group) -> Iterator[tuple[int, int, int]]:
        """Yield (group, edits, index) of every line that the group ends with."""
        for milestone in self.protocol.milestones(len(group.cases)):
            for index in range(milestone):
                yield group.index, milestone, index

    def _run_group(self, group: _Group) -> None:
        """Edit the cases of one group in order, ask at each milestone, and take everything back."""
        chunks = self.protocol.chunks(len(group.cases))
        self.editor.undo()
        able = self._ability(group)
        for number, chunk in enumerate(chunks):
            # before the first edit: "before" is the untouched model
            if self._is_mine(group, number):
                self._base(group, chunk)
            self.tick("before", len(chunk))
        made = self._restore(group)
        self.tick("edits", made)
        for milestone in self.protocol.milestones(len(group.cases)):
            # what was asked before is written before there are more edits to go on from
            if made and made < milestone:
                self.sharing.hand_over()
            while made < milestone:
                stop = min(made + self.protocol.edit_batch, milestone)
                self._edit(group, made, stop)
                made = stop
                self._save_now_and_then(group, made)
            if made == len(group.cases):
                self._look_at_all(group, able)
            for number, chunk in enumerate(chunks):
                if chunk.stop <= milestone:
                    if self._is_mine(group, number):
                        self._score(group, chunk, milestone)
                    self.tick("after", len(chunk))
                    self.sharing.passed()
        self.editor.undo()

    def _is_mine(self, group: _Group, number: int) -> bool:
        return self.sharing.is_mine(group.index + number)

    def _look_at_all(self, group: _Group, able: Ability | None) -> None:
        """Look at the edited model as such, once the last edit of a group is made."""
        if able is not None:
            self._note_ability(able)
        if not group.index:
            self.sharing.check_alike(self.editor)

    # -- edits --------------------------------------------------------------------------------------------------

    def _edit(self, group: _Group, start: int, stop: int) -> None:
        """Make the edits of the cases from `start` to `stop` in one operation, and log them."""
        cases = group.cases[start:stop]
        device = self.editor.backbone.device
        runtime.synchronize(device)
        began = time.perf_counter()
        edited = self.editor.edit([case.request for case in cases])
        runtime.synchronize(device)
        seconds = (time.perf_counter() - began) / len(cases)
        lines = []
        for index, case in enumerate(cases, start):
            line = {"group": group.index, "index": index, "case": case.uid}
            lines.append({**line, "seconds": seconds, **edited.info})
        if self.sharing.writes:
            self.run.append("edits", lines)
        self.tick("edits", len(cases))

    def _ability(self, group: _Group) -> Ability | None:
        """Return what the untouched model can do; None where it is not asked for, or known already."""
        if self.probe is None or group.index or not self.sharing.writes:
            return None
        if self.run.read("ability"):
            return None
        return measure_ability(self.editor.backbone, self.probe)

    def _note_ability(self, before: Ability) -> None:
        """Measure what the edited model can do."""
        assert self.probe is not None
        after = measure_ability(self.editor.backbone, self.probe)
        self.run.rewrite("ability", [compared(before, after)])

    def _save_now_and_then(self, group: _Group, made: int) -> None:
        """Save the state to continue from, but not after every edit: making some again is cheaper than writing all."""
        if not self.sharing.writes or time.monotonic() - self.saved < SAVE_SECONDS:
            return
        tensors, metadata = self.editor.state()
        place = {"group": str(group.index), "made": str(made)}
        self.run.save_tensors("editor", tensors, {**metadata, **place})
        self.saved = time.monotonic()

    def _restore(self, group: _Group) -> int:
        """Continue with the last saved state of this group; return how many edits it holds.

        The log of edits is cut back to them: those made after the state was saved are made again.
        """
        saved = self.run.load_tensors("editor")
        made = 0
        if saved is not None:
            tensors, metadata = saved
            if metadata["group"] == str(group.index):
                self.editor.load_state(tensors, metadata)
                made = int(metadata["made"])
        # all have read before the first one writes
        self.sharing.processes.wait()
        if not self.sharing.writes:
            return made
        log = self.run.read("edits")
        end = (group.index, made)
        kept = [line for line in log if (line["group"], line["index"]) < end]
        if len(kept) < len(log):
            self.run.rewrite("edits", kept)
        return made

    # -- questions ----------------------------------------------------------------------------------------------

    def _score(self, group: _Group, chunk: range, milestone: int) -> None:
        """Ask everything about the cases of a chunk and keep one line a case, unless that was done before."""
        missing = [
            index for index in chunk if (group.index, milestone, index) not in self.done
        ]
        if missing:
            cases = group.cases[chunk.start : chunk.stop]
            before = self._base(group, chunk)
            after = self._after(cases, before)
            routing = self._routing(group, chunk)
            lines = []
            for index, case in zip(chunk, cases, strict=True):
                if index not in missing:
                    continue
                line: dict[str, Any] = {"group": group.index, "edits": milestone}
                line |= {"index": index, "case": case.uid, "type": case.type}
                if case.concept:
                    line["concept"] = case.concept
                line |= score_case(case, before, after, self.protocol.protocols)
                if routing is not None:
                    line["routing"] = routing[index]
                lines.append(line)
            self.sharing.keep(lines)

    def _after(
        self, cases: Sequence[EditCase], before: Mapping[Query, Answer]
    ) -> dict[Query, Answer]:
        """Ask again what the edits may have changed; the other answers are those of the untouched model."""
        queries = distinct_queries(cases)
        may_change = self.editor.affects(queries)
        affected = list(compress(queries, may_change))
        return {**before, **self._ask(affected, cases)}

    def _routing(
        self, group: _Group, chunk: range
    ) -> dict[int, dict[str, list[str]]] | None:
        """Return for each case of a chunk where its queries were sent, by column: to the right edit, another, or none.

        None for an editor that does not send a query to one edit.
        """
        cases = group.cases[chunk.start : chunk.stop]
        queries = distinct_queries(cases)
        found = self.editor.routes(queries)
        if found is None:
            return None
        ids: list[int] = []
        for operation in self.editor.operations:
            ids.extend(operation.ids)
        edit_of = dict(zip(queries, found, strict=True))
        routing: dict[int, dict[str, list[str]]] = {}
        for index, case in zip(chunk, cases, strict=True):
            routing[index] = {}
            for column, asked in case.columns():
                if not column.startswith("needs."):
                    routing[index][column] = [
                        _verdict(edit_of[query], ids[index]) for query in asked
                    ]
        return routing

    def _ask(
        self, queries: Sequence[Query], cases: Sequence[EditCase]
    ) -> dict[Query, Answer]:
        began = time.perf_counter()
        backbone = self.editor.backbone
        max_new_tokens = 0
        limits = None
        if self.protocol.generates:
            max_new_tokens = self.protocol.max_new_tokens
            limits = answer_limits(backbone, cases)
        answers = ask(
            backbone,
            queries,
            layer=self.editor.first_layer or 0,
            top=self.protocol.top(cases),
            max_new_tokens=max_new_tokens,
            batch_size=self.protocol.batch_size,
            limits=limits,
        )
        self.sharing.count(len(queries), time.perf_counter() - began)
        return answers

    def _base(self, group: _Group, chunk: range) -> dict[Query, Answer]:
        """Return the answers of the untouched model to a chunk, from the store if they are there."""
        cases = group.cases[chunk.start : chunk.stop]
        first = group.start + chunk.start
        last = group.start + chunk.stop
        path = self.base_folder / f"{first}-{last}.safetensors"
        answers = _read_answers(path, cases)
        if answers is None:
            if self.editor.operations:
                raise RunError(
                    f"{path}: the answers of the base model cannot be read",
                    "delete it and start again",
                )
            answers = self._ask(distinct_queries(cases), cases)
            self.base_folder.mkdir(parents=True, exist_ok=True)
            _write_answers(path, cases, answers)
        return answers


def _verdict(sent_to: int | None, own: int) -> str:
    """Say whether a query was sent to the edit of its own case, to another one, or to none."""
    if sent_to is None:
        return "none"
    return "right" if sent_to == own else "other"


def score_case(
    case: EditCase,
    before: Mapping[Query, Answer],
    after: Mapping[Query, Answer],
    protocols: Sequence[str],
) -> dict[str, Any]:
    """Return the scores of one case by protocol and column, those of the base model, and the generated answers."""
    scores: dict[str, dict[str, float]] = {protocol: {} for protocol in protocols}
    base: dict[str, dict[str, float]] = {protocol: {} for protocol in protocols}
    texts: dict[str, list[dict[str, str | None]]] = {}
    for column, queries in case.columns():
        family, _, name = column.partition(".")
        if family == "needs":
            continue
        local = family == "locality"
        known = not local and _knows(case.needs.get(name, ()), before)
        for protocol in protocols:
            points = [
                _points(
                    protocol,
                    local,
                    query,
                    before[query],
                    after[query],
                )
                for query in queries
            ]
            scores[protocol][column] = _mean(protocol, points)
            if not local:
                points = [
                    _points(
                        protocol,
                        False,
                        query,
                        before[query],
                        before[query],
                    )
                    for query in queries
                ]
                base[protocol][column] = _mean(protocol, points)
            if known:
                for table in (scores[protocol], base[protocol]):
                    table[f"{column} known"] = table[column]
        texts[column] = [
            {
                "target": query.target,
                "before": before[query].text,
                "after": after[query].text,
            }
            for query in queries
        ]
    return {"scores": scores, "base": base, "answers": texts}


def _knows(queries: Sequence[Query], before: Mapping[Query, Answer]) -> bool:
    """Whether the untouched model answers all these questions, and there are any."""
    return bool(queries) and all(before[q].said == before[q].wanted for q in queries)


def _points(
    protocol: str, local: bool, query: Query, before: Answer, after: Answer
) -> tuple[float, float]:
    """Return (points, out of) for one query: against the target, or for locality against the answer before."""
    if protocol.startswith("ar"):
        return _points_of_text(protocol, local, query, before, after), 1
    if protocol == "tf_easyedit" and local:
        assert before.top is not None
        assert after.top is not None
        return metrics.topk_agreement(before.top, after.top)
    expected = before.said if local else after.wanted
    equal, length = metrics.agreement(after.said, expected)
    if protocol == "tf_em":
        return float(equal == length), 1
    return equal, length


def _points_of_text(
    protocol: str, local: bool, query: Query, before: Answer, after: Answer
) -> float:
    """Return the points of a freely generated answer, from 0 to 1."""
    said = after.text or ""
    was = before.text or ""
    if protocol == "ar" and local:
        return metrics.same_answer(was, said)
    expected = was if local else query.target
    compare = {
        "ar": metrics.answer_match,
        "ar_em": metrics.exact_match,
        "ar_f1": metrics.token_f1,
    }[protocol]
    return compare(said, expected)


def _mean(protocol: str, scores: Sequence[tuple[float, float]]) -> float:
    """Return the score of a column: tf_easyedit pools the tokens of its queries, the others average the queries."""
    if protocol == "tf_easyedit":
        points = sum(some for some, _ in scores)
        total = sum(most for _, most in scores)
        return points / total
    shares = [points / total for points, total in scores]
    return sum(shares) / len(scores)


def distinct_queries(cases: Iterable[EditCase]) -> list[Query]:
    """Return every query of some cases once, in the order in which they are asked first."""
    found: dict[Query, None] = {}
    for case in cases:
        for _, queries in case.columns():
            found.update(dict.fromkeys(queries))
    return list(found)


def _write_answers(
    path: Path, cases: Sequence[EditCase], answers: Mapping[Query, Answer]
) -> None:
    from safetensors.torch import save

    plain = []
    tops = {}
    for index, query in enumerate(distinct_queries(cases)):
        answer = answers[query]
        plain.append([answer.text, answer.said, answer.wanted])
        if answer.top is not None:
            tops[str(index)] = answer.top
    text = json.dumps(plain, ensure_ascii=False)
    tensors = tops or {"empty": torch.zeros(0)}
    write_atomic(path, save(tensors, {"answers": text}))


def _read_answers(path: Path, cases: Sequence[EditCase]) -> dict[Query, Answer] | None:
    """Return stored answers; None if there are none, or if the file is damaged (then they are asked for again)."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.exists():
        return None
    try:
        with open_tensors(path, error=StateError) as file:
            text = file.metadata()["answers"]
        plain = parse_json(text, f"{path}: answers", error=StateError)
        # not by `get_tensor` of the open file: control-C inside it comes out as a ValueError
        tops = load(path.read_bytes())
    except (MmeditError, OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    rows = []
    for index, (text, said, wanted) in enumerate(plain):
        top = tops.get(str(index))
        rows.append(
            Answer(
                text,
                tuple(said),
                tuple(wanted),
                top,
            )
        )
    return dict(zip(distinct_queries(cases), rows, strict=True))
