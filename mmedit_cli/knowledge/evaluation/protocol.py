"""The sequential protocol: make N edits, ask everything about all of them, at every milestone; resumable anywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mmedit_cli import runtime
from mmedit_cli.errors import MmeditError, RunError, StateError, UserError
from mmedit_cli.knowledge.evaluation import metrics
from mmedit_cli.knowledge.evaluation.answers import Answer, answer_limits, ask
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.reading import open_tensors, parse_json
from mmedit_cli.records import Run
from mmedit_cli.storage import write_atomic
from mmedit_cli.types import EditCase, Query

PROTOCOLS = ("ar", "ar_em", "ar_f1", "tf_liveedit", "tf_easyedit", "tf_em")
SAVE_SECONDS = 30.0
PREPARING = (
    "preparing"  # what `tick` calls the queries that are run through the frozen layers
)


def milestones(sequential: int) -> tuple[int, ...]:
    """Return 1, 10, 100, ... below the number of edits in a row."""
    return tuple(10**k for k in range(len(str(sequential))) if 10**k < sequential)


@dataclass(frozen=True)
class Protocol:
    """How edits are made and asked about.

    sequential: edits made in a row before the model is taken back to the base; report_at: after how many of them
    everything so far is asked (always also after the last); edit_batch: edits made in one operation; shard: cases that
    are asked together, the unit of resuming; cache_bytes: memory for frozen activations, the rest goes to disk.
    """

    sequential: int = 1
    report_at: tuple[int, ...] = ()
    edit_batch: int = 1
    protocols: tuple[str, ...] = PROTOCOLS
    max_new_tokens: int = 16
    batch_size: int = 16
    shard: int = 32
    cache_bytes: int = field(default=2 << 30, compare=False)

    def __post_init__(self) -> None:
        problems = [
            f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1"
            for name in (
                "sequential",
                "edit_batch",
                "max_new_tokens",
                "batch_size",
                "shard",
            )
            if getattr(self, name) < 1
        ]
        problems += [
            f"--report-at {m}: must lie between 1 and --sequential {self.sequential}"
            for m in self._outside()
        ]
        problems += [
            f"--protocols {p}: unknown, known are {', '.join(PROTOCOLS)}"
            for p in self._unknown()
        ]
        if not self.protocols:
            problems.append(f"--protocols is empty: choose from {', '.join(PROTOCOLS)}")
        if problems:
            raise UserError(problems)

    def _outside(self) -> list[int]:
        return [m for m in self.report_at if not 1 <= m <= self.sequential]

    def _unknown(self) -> list[str]:
        return [p for p in self.protocols if p not in PROTOCOLS]

    def groups(self, cases: int) -> list[range]:
        """Cut so many cases into groups that are edited in a row; a last shorter one is kept."""
        return [
            range(start, min(start + self.sequential, cases))
            for start in range(0, cases, self.sequential)
        ]

    def milestones(self, size: int) -> list[int]:
        """Return after how many edits a group of `size` is asked about, in order, the last edit included."""
        return sorted({m for m in self.report_at if m <= size} | {size})

    def shards(self, size: int) -> list[range]:
        """Cut a group into ranges of cases such that every milestone is a union of whole ranges.

        So a case is asked in the same company, before and after and at every milestone.
        """
        cuts = sorted({0, size, *self.milestones(size), *range(0, size, self.shard)})
        return [range(a, b) for a, b in pairwise(cuts)]

    @property
    def generates(self) -> bool:
        """Whether any protocol reads freely generated text."""
        return any(p.startswith("ar") for p in self.protocols)

    def top(self, cases: Sequence[EditCase]) -> dict[Query, int]:
        """Return how many best ids tf_easyedit compares at every position of a locality query: text 1, images 10."""
        if "tf_easyedit" not in self.protocols:
            return {}
        return {
            q: 1 if q.image is None else 10
            for c in cases
            for qs in c.locality.values()
            for q in qs
        }


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
    *,
    base_folder: Path | None = None,
    tick: Callable[[str, int], None] = lambda _what, _n: None,
) -> dict[str, float]:
    """Edit and ask; every result is in the run's `cases.jsonl` and `edits.jsonl` when this returns.

    Returns how many questions the run has asked of the model, before an interruption too, and in how many seconds.

    `base_folder` keeps the answers of the untouched model for other editors; `tick(what, n)` is told of n more queries
    that were run through the frozen layers, cases asked `before`, `edits` made, or cases asked `after`. A run that was
    interrupted goes on with the shard it was in.
    """
    groups = [
        _Group(i, r.start, cases[r.start : r.stop])
        for i, r in enumerate(protocol.groups(len(cases)))
    ]
    evaluation = _Evaluation(editor, protocol, run, base_folder, tick)
    if editor.first_layer is None:
        evaluation.all(groups)
        return evaluation.asked
    queries = [q for case in cases for _, qs in case.columns() for q in qs]
    activations = editor.backbone.cached_activations(
        editor.first_layer,
        queries,
        group=protocol.batch_size,
        budget=protocol.cache_bytes,
        tick=lambda n: tick(PREPARING, n),
    )
    with activations:
        evaluation.all(groups)
    return evaluation.asked


class _Evaluation:
    """The state of one evaluation: what was scored already, and the answers of the base model."""

    def __init__(
        self,
        editor: Editor,
        protocol: Protocol,
        run: Run,
        base_folder: Path | None,
        tick: Callable[[str, int], None],
    ) -> None:
        self.editor, self.protocol, self.run = editor, protocol, run
        self.base_folder, self.tick = base_folder, tick
        self.done = {(r["group"], r["edits"], r["index"]) for r in run.read("cases")}
        self.saved = time.monotonic()
        lines = run.read("asked")  # a single one
        self.asked: dict[str, float] = (
            lines[0]["cost"] if lines else {"questions": 0, "seconds": 0.0}
        )

    def all(self, groups: Sequence[_Group]) -> None:
        for group in groups:
            if all(key in self.done for key in self._keys(group)):
                self.tick("before", len(group.cases))
                self.tick("edits", len(group.cases))
                self.tick("after", sum(self.protocol.milestones(len(group.cases))))
            else:
                self._group(group)

    def _keys(self, group: _Group) -> Iterator[tuple[int, int, int]]:
        return (
            (group.index, m, i)
            for m in self.protocol.milestones(len(group.cases))
            for i in range(m)
        )

    def _group(self, group: _Group) -> None:
        """Edit the cases of one group in order, ask at each milestone, and take everything back."""
        shards = self.protocol.shards(len(group.cases))
        self.editor.undo()
        for shard in shards:  # before the first edit: "before" is the untouched model
            self._base(group, shard)
            self.tick("before", len(shard))
        made = self._restore(group)
        self.tick("edits", made)
        for milestone in self.protocol.milestones(len(group.cases)):
            while made < milestone:
                made = self._edit(
                    group, made, min(made + self.protocol.edit_batch, milestone)
                )
                self._save_now_and_then(group, made)
            for shard in shards:
                if shard.stop <= milestone:
                    self._score(group, shard, milestone)
        self.editor.undo()

    # -- edits --------------------------------------------------------------------------------------------------

    def _edit(self, group: _Group, start: int, stop: int) -> int:
        cases, device = group.cases[start:stop], self.editor.backbone.device
        runtime.synchronize(device)
        began = time.perf_counter()
        edited = self.editor.edit([case.request for case in cases])
        runtime.synchronize(device)
        seconds = (time.perf_counter() - began) / len(cases)
        self.run.append(
            "edits",
            [
                {
                    "group": group.index,
                    "index": start + i,
                    "case": case.uid,
                    "seconds": seconds,
                    **dict(edited.info),
                }
                for i, case in enumerate(cases)
            ],
        )
        self.tick("edits", len(cases))
        return stop

    def _save_now_and_then(self, group: _Group, made: int) -> None:
        """Save the state to continue from, but not after every edit: making some again is cheaper than writing all."""
        if time.monotonic() - self.saved < SAVE_SECONDS:
            return
        tensors, metadata = self.editor.state()
        self.run.save_tensors(
            "editor",
            tensors,
            {**metadata, "group": str(group.index), "made": str(made)},
        )
        self.saved = time.monotonic()

    def _restore(self, group: _Group) -> int:
        """Continue with the last saved state of this group; return how many edits it holds.

        The log of edits is cut back to them: those made after the state was saved are made again.
        """
        saved = self.run.load_tensors("editor")
        made = 0
        if saved is not None and saved[1]["group"] == str(group.index):
            self.editor.load_state(*saved)
            made = int(saved[1]["made"])
        log = self.run.read("edits")
        kept = [r for r in log if (r["group"], r["index"]) < (group.index, made)]
        if len(kept) < len(log):
            self.run.rewrite("edits", kept)
        return made

    # -- questions ----------------------------------------------------------------------------------------------

    def _score(self, group: _Group, shard: range, milestone: int) -> None:
        """Ask everything about the cases of a shard and append one line a case, unless that was done before."""
        missing = [i for i in shard if (group.index, milestone, i) not in self.done]
        if missing:
            cases = group.cases[shard.start : shard.stop]
            before = self._base(group, shard)
            after = self._after(cases, before)
            routing = self._routing(group, shard)
            lines = [
                {
                    "group": group.index,
                    "edits": milestone,
                    "index": i,
                    "case": case.uid,
                    "type": case.type,
                    **score_case(case, before, after, self.protocol.protocols),
                    **({} if routing is None else {"routing": routing[i]}),
                }
                for i, case in zip(shard, cases, strict=True)
            ]
            self.run.append(
                "cases", [line for line in lines if line["index"] in missing]
            )
        self.tick("after", len(shard))

    def _after(
        self, cases: Sequence[EditCase], before: Mapping[Query, Answer]
    ) -> dict[Query, Answer]:
        """Ask again what the edits may have changed; the other answers are those of the untouched model."""
        queries = _distinct(cases)
        touched = [
            q
            for q, may in zip(queries, self.editor.affects(queries), strict=True)
            if may
        ]
        return {**before, **self._ask(touched, cases)}

    def _routing(
        self, group: _Group, shard: range
    ) -> dict[int, dict[str, list[str]]] | None:
        """Return for each case of a shard where its queries were sent, by column: to the right edit, another, or none.

        None for an editor that does not send a query to one edit.
        """
        cases = group.cases[shard.start : shard.stop]
        queries = _distinct(cases)
        found = self.editor.routes(queries)
        if found is None:
            return None
        ids = [i for operation in self.editor.operations for i in operation.ids]
        edit_of = dict(zip(queries, found, strict=True))

        def verdict(query: Query, own: int) -> str:
            return (
                "none"
                if edit_of[query] is None
                else "right"
                if edit_of[query] == own
                else "other"
            )

        return {
            i: {
                c: [verdict(q, ids[i]) for q in asked]
                for c, asked in case.columns()
                if not c.startswith("needs.")
            }
            for i, case in zip(shard, cases, strict=True)
        }

    def _ask(
        self, queries: Sequence[Query], cases: Sequence[EditCase]
    ) -> dict[Query, Answer]:
        began = time.perf_counter()
        generates = self.protocol.generates
        answers = ask(
            self.editor.backbone,
            queries,
            layer=self.editor.first_layer or 0,
            top=self.protocol.top(cases),
            max_new_tokens=self.protocol.max_new_tokens if generates else 0,
            batch_size=self.protocol.batch_size,
            limits=answer_limits(self.editor.backbone, cases) if generates else None,
        )
        self.asked["questions"] += len(queries)
        self.asked["seconds"] += time.perf_counter() - began
        self.run.rewrite("asked", [{"cost": self.asked}])
        return answers

    def _base(self, group: _Group, shard: range) -> dict[Query, Answer]:
        """Return the answers of the untouched model to a shard, from the store if they are there."""
        cases = group.cases[shard.start : shard.stop]
        folder = (
            self.base_folder
            if self.base_folder is not None
            else self.run.folder / "base"
        )
        path = (
            folder
            / f"{group.start + shard.start}-{group.start + shard.stop}.safetensors"
        )
        answers = _read_answers(path, cases)
        if answers is None:
            if self.editor.operations:
                raise RunError(
                    f"{path}: the answers of the base model cannot be read",
                    "delete it and start again",
                )
            answers = self._ask(_distinct(cases), cases)
            folder.mkdir(parents=True, exist_ok=True)
            _write_answers(path, cases, answers)
        return answers


def score_case(
    case: EditCase,
    before: Mapping[Query, Answer],
    after: Mapping[Query, Answer],
    protocols: Sequence[str],
) -> dict[str, Any]:
    """Return the scores of one case by protocol and column, those of the base model, and the generated answers."""
    scores: dict[str, dict[str, float]] = {p: {} for p in protocols}
    base: dict[str, dict[str, float]] = {p: {} for p in protocols}
    texts: dict[str, list[dict[str, str | None]]] = {}
    for column, queries in case.columns():
        family, _, name = column.partition(".")
        if family == "needs":
            continue
        local = family == "locality"
        for protocol in protocols:
            scores[protocol][column] = _mean(
                protocol,
                [_score(protocol, local, q, before[q], after[q]) for q in queries],
            )
            if not local:
                base[protocol][column] = _mean(
                    protocol,
                    [_score(protocol, False, q, before[q], before[q]) for q in queries],
                )
        texts[column] = [
            {"target": q.target, "before": before[q].text, "after": after[q].text}
            for q in queries
        ]
        if family == "portability" and _knows(case.needs.get(name, ()), before):
            for table in (scores, base):
                for protocol in protocols:
                    table[protocol][f"{column} known"] = table[protocol][column]
    return {"scores": scores, "base": base, "answers": texts}


def _knows(queries: Sequence[Query], before: Mapping[Query, Answer]) -> bool:
    """Whether the untouched model answers all these questions, and there are any."""
    return bool(queries) and all(before[q].said == before[q].wanted for q in queries)


def _score(
    protocol: str, local: bool, query: Query, before: Answer, after: Answer
) -> tuple[float, float]:
    """Return (points, out of) for one query: against the target, or for locality against the answer before."""
    if protocol.startswith("ar"):
        said, was = after.text or "", before.text or ""
        pair = (said, was if local else query.target)
        if protocol == "ar":
            return (
                metrics.same_answer(was, said)
                if local
                else metrics.answer_match(said, query.target)
            ), 1
        return (
            metrics.exact_match(*pair)
            if protocol == "ar_em"
            else metrics.token_f1(*pair)
        ), 1
    if protocol == "tf_easyedit" and local:
        assert before.top is not None
        assert after.top is not None
        return metrics.topk_agreement(before.top, after.top)
    equal, length = metrics.agreement(
        after.said, before.said if local else after.wanted
    )
    return (float(equal == length), 1) if protocol == "tf_em" else (equal, length)


def _mean(protocol: str, scores: Sequence[tuple[float, float]]) -> float:
    """Return the score of a column: tf_easyedit pools the tokens of its queries, the others average the queries."""
    if protocol == "tf_easyedit":
        return sum(points for points, _ in scores) / sum(total for _, total in scores)
    return sum(points / total for points, total in scores) / len(scores)


def _distinct(cases: Sequence[EditCase]) -> list[Query]:
    return list(
        dict.fromkeys(
            q for case in cases for _, queries in case.columns() for q in queries
        )
    )


def _write_answers(
    path: Path, cases: Sequence[EditCase], answers: Mapping[Query, Answer]
) -> None:
    from safetensors.torch import save

    rows = [answers[query] for query in _distinct(cases)]
    plain = json.dumps(
        [[row.text, row.said, row.wanted] for row in rows], ensure_ascii=False
    )
    tops = {str(i): row.top for i, row in enumerate(rows) if row.top is not None}
    write_atomic(path, save(tops or {"empty": torch.zeros(0)}, {"answers": plain}))


def _read_answers(path: Path, cases: Sequence[EditCase]) -> dict[Query, Answer] | None:
    """Return stored answers; None if there are none, or if the file is damaged (then they are asked for again)."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.exists():
        return None
    try:
        with open_tensors(path, error=StateError) as file:
            plain = parse_json(
                file.metadata()["answers"], f"{path}: answers", error=StateError
            )
        tops = load(
            path.read_bytes()
        )  # a Ctrl-C within safe_open's get_tensor would come out as a ValueError
    except (MmeditError, OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    rows = [
        Answer(text, tuple(said), tuple(wanted), tops.get(str(i)))
        for i, (text, said, wanted) in enumerate(plain)
    ]
    return dict(zip(_distinct(cases), rows, strict=True))
