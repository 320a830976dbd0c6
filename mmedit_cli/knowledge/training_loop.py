"""Training the networks of an editor: steps, held-out cases, and files to continue from."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli import runtime
from mmedit_cli.errors import DataError, MmeditError
from mmedit_cli.knowledge.evaluation.answers import Answer, ask
from mmedit_cli.knowledge.evaluation.metrics import normalize
from mmedit_cli.knowledge.evaluation.protocol import (
    PREPARING,
    distinct_queries,
    score_case,
)
from mmedit_cli.knowledge.methods.base import TrainedEditor
from mmedit_cli.records import Run
from mmedit_cli.runtime import Processes
from mmedit_cli.types import EditCase, Query

LOG_EVERY = 20  # steps
SAVE_SECONDS = 60.0
# of held-out cases; the checkpoint with the best mean over the columns is kept
SCORE = "tf_em"
# among the sums since the last line of the log: how many steps there were
_STEPS = "steps"


@dataclass(frozen=True)
class Conditions:
    """Where a training runs and who is told of it; of all this only the number of processes changes the result.

    batch_size: queries in one frozen forward pass; cache_bytes: memory for frozen activations, the rest goes to disk;
    tick(what, n), say(text) and curve(name, value, step) are told of the progress.
    """

    processes: Processes = field(default_factory=Processes)
    batch_size: int = 32
    cache_bytes: int = 4 << 30
    tick: Callable[[str, int], None] = lambda _what, _n: None
    say: Callable[[str], None] = lambda _text: None
    curve: Callable[[str, float, int], None] = lambda _name, _value, _step: None


@dataclass
class _Progress:
    """Where a training is: the next step, the best score so far and its step, and the seconds spent.

    `looked` is the last step after which the held-out cases were scored.
    """

    step: int = 0
    best: float = -1.0
    best_step: int = 0
    seconds: float = 0.0
    looked: int = 0


def train_networks(
    editor: TrainedEditor,
    cases: Sequence[EditCase],
    held_out: Sequence[EditCase],
    run: Run,
    how: Conditions | None = None,
) -> dict[str, Any]:
    """Train from where `run` left it; the best networks are in `editor.safetensors` and in the editor at the end.

    The layers below the first edited one are run once for each distinct question and answer, and their output is
    cached; for an editor that changes the question itself, the image tokens are. Batches, random choices and scores
    depend on the seed and the step alone, so an interrupted training ends with the same bits. Returns what a report
    tells about the training. Raises DataError for cases that cannot be learned from.
    """
    hp = editor.hparams.training
    how = how or Conditions()
    if len(cases) < 2:
        raise DataError(
            "one case is too few: networks learn by comparing edits",
            "train on more cases",
        )
    taught = with_alternatives(cases, hp, editor.seed)
    shown = [*chain.from_iterable(taught), *held_out]
    activations = editor.backbone.cached_activations(
        editor.first_layer,
        distinct_queries(shown),
        group=how.batch_size,
        budget=how.cache_bytes,
        tick=lambda n: how.tick(PREPARING, n),
    )
    with activations:
        if found := editor.gather(cases):
            how.say(found)
        training = _EditorTraining(editor, taught, held_out, run, how)
        how.tick("steps", training.progress.step)
        training.go_on()
        chosen = training.calibrate() if how.processes.rank == 0 else {}
    if how.processes.rank:
        return {}
    editor.load_networks(run.folder / "editor.safetensors")
    log = run.read("log")
    for line in log:
        values = {**line.get("losses", {}), **line.get("scores", {})}
        for kind, part in line.get("answers", {}).items():
            values[f"{kind} answers"] = part["score"]
        for name, value in values.items():
            how.curve(name, value, line["step"])
    progress = training.progress
    validated = len(training.held_out)
    curve = [line for line in log if "score" in line]
    best = next(line for line in curve if line["step"] == progress.best_step)
    return {
        "steps": progress.step,
        "ended_early": progress.step < hp.steps,
        "calibrated": chosen,
        "validation_cases": validated,
        "validation_edits": max(validated, getattr(hp, "validation_edits", 0)),
        "best": best,
        "curve": curve,
        "losses": [line for line in log if "losses" in line],
        "trained_parameters": sum(p.numel() for p in editor.networks.parameters()),
        "cost": {"seconds": progress.seconds},
    }


class _EditorTraining:
    """The state of one training."""

    def __init__(
        self,
        editor: TrainedEditor,
        cases: Sequence[Sequence[EditCase]],
        held_out: Sequence[EditCase],
        run: Run,
        how: Conditions,
    ) -> None:
        self.editor = editor
        self.cases = cases
        self.run = run
        self.how = how
        self.processes = how.processes
        self.batch_size = how.batch_size
        self.hp = editor.hparams.training
        self.held_out = distinct(held_out)[: self.hp.validation_cases]
        taught = chain.from_iterable(cases)
        self.taught_answers = set(map(_answer, taught))
        self.parameters = dict(editor.networks.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.hp.learning_rate,
            weight_decay=self.hp.weight_decay,
        )
        self.progress = _Progress()
        self._sums: dict[str, Tensor] = {}
        self._base: dict[Query, Answer] | None = None
        self._restore()
        # all processes read the same file
        self._ended = self._has_not_risen()

    def go_on(self) -> None:
        """Take the steps that are left; control-C stops after the step that is running, so nothing is lost."""
        with runtime.Interrupts(self.how.say) as interrupts:
            self._go_on(interrupts)

    def _go_on(self, interrupts: runtime.Interrupts) -> None:
        progress = self.progress
        writes = self.processes.rank == 0
        first = progress.step
        spent = progress.seconds
        started = saved = time.monotonic()
        while self._look_is_due() or not self._is_over():
            if self._look_is_due():
                # its networks are saved already, and it may take minutes
                with interrupts.at_once():
                    line = self._validate() if writes else {}
                progress.looked = progress.step
                self._ended = self._agree(self._has_not_risen())
                seconds = time.monotonic() - started
                rate = seconds / max(1, progress.step - first)
                left = rate * (self.hp.steps - progress.step)
                if writes:
                    self.how.say(self._line(line, left))
            else:
                self._step(progress.step)
                progress.step += 1
                seconds = time.monotonic() - started
                if writes:
                    self.how.tick("steps", 1)
                    if self._look_is_due() or progress.step % LOG_EVERY == 0:
                        self._log()
            progress.seconds = spent + seconds
            looked = progress.looked == progress.step
            overdue = time.monotonic() - saved >= SAVE_SECONDS
            if writes and (looked or overdue or self._look_is_due() or interrupts.came):
                self._save()
                saved = time.monotonic()
            interrupts.stop_if_asked()

    def _look_is_due(self) -> bool:
        """Whether the held-out cases are to be scored before the next step; the first process does it."""
        step = self.progress.step
        if step <= self.progress.looked:
            return False
        is_last: bool = step == self.hp.steps
        return is_last or step % self.hp.validate_every == 0

    def _is_over(self) -> bool:
        return self._ended or self.progress.step >= self.hp.steps

    def _has_not_risen(self) -> bool:
        """Whether the last `patience` looks were none better than the one before them."""
        patience: int | None = getattr(self.hp, "patience", None)
        if patience is None:
            return False
        every: int = self.hp.validate_every
        since_best = self.progress.looked - self.progress.best_step
        return since_best >= patience * every

    def _agree(self, ended: bool) -> bool:
        """Return what the first process says: it alone knows the scores."""
        patience: int | None = getattr(self.hp, "patience", None)
        if self.processes.world == 1 or patience is None:
            return ended
        mine = ended and self.processes.rank == 0
        device = self.editor.backbone.device
        vote = torch.tensor([float(mine)], device=device)
        votes = self.processes.add(vote)
        return bool(votes.item())

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.hp, step)
        source = runtime.generator(self.editor.seed * 1_000_003 + step)
        self.editor.networks.requires_grad_(True)
        try:
            with torch.enable_grad():
                batch = self._batch(step)
                losses = self.editor.losses(
                    batch,
                    source,
                    others=self._others(batch, step),
                    rank=self.processes.rank,
                    world=self.processes.world,
                )
                self.optimizer.zero_grad()
                torch.autograd.backward(losses["total"])
        finally:
            self.editor.networks.requires_grad_(False)
        self._add_gradients()
        if self.hp.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.hp.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = {**losses, _STEPS: torch.ones(())}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()

    def _batch(self, step: int) -> list[EditCase]:
        """Return the cases of a step: every epoch in its own order; a last part that fills no batch is left out."""
        count = len(self.cases)
        size = min(count, self.hp.batch_size * self.processes.world)
        epoch, place = divmod(step, count // size)
        source = runtime.generator(self.editor.seed * 7_368_787 + epoch)
        order = torch.randperm(count, generator=source)
        variant = torch.randint(1 << 30, (count,), generator=source)
        start = place * size
        batch = []
        for index in order[start : start + size].tolist():
            variants = self.cases[index]
            which = int(variant[index]) % len(variants)
            batch.append(variants[which])
        return batch

    def _others(self, batch: Sequence[EditCase], step: int) -> list[EditCase]:
        """Return edits that are made beside the batch: routers learn to choose among many."""
        source = runtime.generator(self.editor.seed * 15_485_863 + step)
        used = {case.uid for case in batch}
        most: int = getattr(self.hp, "others", 0)
        order = torch.randperm(len(self.cases), generator=source)
        others = []
        for index in order[:most].tolist():
            case = self.cases[index][0]
            if case.uid not in used:
                others.append(case)
        return others

    def _add_gradients(self) -> None:
        """Add up the gradients of all processes, in one message."""
        if self.processes.world == 1:
            return
        having = []
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                having.append(parameter)
                gradients.append(parameter.grad.flatten())
        flat = self.processes.add(torch.cat(gradients))
        sizes = [parameter.numel() for parameter in having]
        parts = torch.split(flat, sizes)
        for parameter, part in zip(having, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _log(self) -> None:
        """Write the means since the last line."""
        steps = float(self._sums.pop(_STEPS))
        losses = {}
        # by name: a continued training reads the sums from a file, which keeps no order
        for name, total in sorted(self._sums.items()):
            losses[name] = round(float(total) / steps, 5)
        self._sums = {}
        if not math.isfinite(losses["total"]):
            raise MmeditError(
                f"the loss became {losses['total']} at step {self.progress.step}",
                "lower learning_rate",
            )
        step = self.progress.step
        line = {"step": step, "rate": rate_at(self.hp, step - 1), "losses": losses}
        self.run.append("log", [line])

    # -- held-out cases -----------------------------------------------------------------------------------------

    def calibrate(self) -> dict[str, float]:
        """Choose the editor's calibrated hyper-parameters on held-out cases, and save them with the best networks."""
        editor = self.editor
        chosen: dict[str, float] = {}
        editor.load_networks(self.run.folder / "editor.safetensors")
        for key, candidates in editor.calibrated.items():
            found = []
            for value in candidates:
                editor.hparams = replace(editor.hparams, **{key: value})
                score = statistics.fmean(_means(self._scores()).values())
                found.append((score, value))
                self.how.say(f"{key} {value}: held out mean {100 * score:.1f}")
            _, chosen[key] = max(found)
            editor.hparams = replace(editor.hparams, **{key: chosen[key]})
        self._save_networks()
        return chosen

    def _save_networks(self) -> None:
        """Write the present networks as the best ones."""
        tensors, metadata = self.editor.networks_state()
        progress = self.progress
        metadata["step"] = str(progress.best_step)
        metadata["score"] = f"{progress.best:.4f}"
        metadata["steps"] = str(progress.step)
        metadata["run"] = self.run.folder.name
        self.run.save_tensors("editor", tensors, metadata)

    def _validate(self) -> dict[str, Any]:
        """Score the held-out cases, keep the networks if they are the best so far, and return the line of the log."""
        self.editor.finalize()
        progress = self.progress
        by_case = self._scores()
        scores = _means(by_case)
        score = statistics.fmean(scores.values())
        line = {
            "step": progress.step,
            "score": score,
            "scores": scores,
            "answers": self._by_answer(by_case),
        }
        self.run.append("log", [line])
        if score > progress.best:
            progress.best = score
            progress.best_step = progress.step
            self._save_networks()
        return line

    def _by_answer(self, by_case: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Return the scores of the cases whose new answer training has taught (`seen`), and those of the others.

        Networks that learned answers by heart, and not to copy, give only the former.
        """
        parts: dict[str, list[Mapping[str, float]]] = {"seen": [], "unseen": []}
        for case, scores in zip(self.held_out, by_case, strict=True):
            taught = _answer(case) in self.taught_answers
            kind = "seen" if taught else "unseen"
            parts[kind].append(scores)
        found = {}
        for kind, some in parts.items():
            if not some:
                continue
            means = _means(some)
            score = statistics.fmean(means.values())
            found[kind] = {
                "cases": len(some),
                "score": score,
                "scores": means,
            }
        return found

    @torch.no_grad()
    def _scores(self) -> list[dict[str, float]]:
        """Edit the held-out cases in a row, ask everything about them, and take all of it back: by case and column."""
        editor = self.editor
        queries = distinct_queries(self.held_out)
        if self._base is None:
            self._base = self._ask(queries)
        wanted: int = getattr(self.hp, "validation_edits", 0)
        more = max(0, wanted - len(self.held_out))
        others = distinct([variants[0] for variants in self.cases])[:more]
        edits = [case.request for case in (*self.held_out, *others)]
        for start in range(0, len(edits), self.batch_size):
            stop = start + self.batch_size
            editor.edit(edits[start:stop])
        may_change = editor.affects(queries)
        affected = list(compress(queries, may_change))
        answers = {**self._base, **self._ask(affected)}
        editor.undo()
        by_case = []
        for case in self.held_out:
            line = score_case(case, self._base, answers, (SCORE,))
            scores = {}
            for column, score in line["scores"][SCORE].items():
                if not column.startswith("portability"):
                    scores[column] = score
            by_case.append(scores)
        return by_case

    def _ask(self, queries: Sequence[Query]) -> dict[Query, Answer]:
        return ask(
            self.editor.backbone,
            queries,
            layer=self.editor.first_layer or 0,
            top={},
            max_new_tokens=0,
            batch_size=self.batch_size,
        )

    def _line(self, look: Mapping[str, Any], seconds_left: float) -> str:
        """Return a line for the user: the last loss, the scores just made, and the time that is left."""
        progress = self.progress
        scores: Mapping[str, float] = look["scores"]
        log = [line for line in self.run.read("log") if "losses" in line]
        loss = log[-1]["losses"]["total"]
        in_percent = [f"{name} {100 * value:.1f}" for name, value in scores.items()]
        columns = "  ".join(in_percent)
        mean = f"mean {100 * look['score']:.1f}"
        for kind, part in look["answers"].items():
            mean += f", {kind} answers {100 * part['score']:.1f}"
        best = f"best {100 * progress.best:.1f}"
        if progress.best_step == progress.step:
            best = "best so far"
        return (
            f"step {progress.step}/{self.hp.steps}  loss {loss:.3f}  held out: {columns}"
            f"  {mean} ({best})  {seconds_left / 60:.0f} min left"
        )

    # -- files --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the state to continue from."""
        tensors: dict[str, Tensor] = {}
        networks = self.editor.networks.state_dict()
        for name, tensor in networks.items():
            tensors[f"networks.{name}"] = tensor
        optimizer = self.optimizer.state_dict()
        for index, state in optimizer["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = value
        for name, total in self._sums.items():
            tensors[f"sums.{name}"] = total
        progress = {}
        for key, value in vars(self.progress).items():
            progress[key] = str(value)
        self.run.save_tensors("last", tensors, progress)

    def _restore(self) -> None:
        """Continue from the last saved step; the log is cut back to it."""
        saved = self.run.load_tensors("last")
        if saved is not None:
            tensors, metadata = saved
            self.editor.networks.load_state_dict(below(tensors, "networks."))
            state = self.optimizer.state_dict()
            state["state"] = {}
            for name, value in below(tensors, "optimizer.").items():
                index, _, key = name.partition(".")
                state["state"].setdefault(int(index), {})[key] = value
            self.optimizer.load_state_dict(state)
            self._sums = below(tensors, "sums.")
            # files of version 0.1.0 do not say it: they were saved after the look
            looked = metadata.get("looked", metadata["step"])
            self.progress = _Progress(
                step=int(metadata["step"]),
                best=float(metadata["best"]),
                best_step=int(metadata["best_step"]),
                seconds=float(metadata["seconds"]),
                looked=int(looked),
            )
        if self.processes.rank == 0:
            log = self.run.read("log")
            self.run.rewrite("log", [line for line in log if self._is_past(line)])

    def _is_past(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the log belongs to what was saved."""
        last = self.progress.looked if "score" in line else self.progress.step
        step: int = line["step"]
        return step <= last


def _answer(case: EditCase) -> tuple[str, ...]:
    """Return the words of the new answer of a case."""
    return tuple(normalize(case.request.target))


def _means(by_case: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each column over the cases that have it."""
    by_column: dict[str, list[float]] = {}
    for scores in by_case:
        for column, score in scores.items():
            by_column.setdefault(column, []).append(score)
    return {column: statistics.fmean(found) for column, found in by_column.items()}


def distinct(cases: Sequence[EditCase]) -> list[EditCase]:
    """Return the cases without those that teach the same answer about the same picture as an earlier one.

    Where several edits teach one fact, any of them may answer for it, which would hide how good a single edit is.
    """
    found: list[EditCase] = []
    said: set[tuple[Path, str]] = set()
    for case in cases:
        queries = [case.request, *chain.from_iterable(case.generality.values())]
        here = set()
        for query in queries:
            if query.image is not None:
                here.add((query.image, query.target))
        if not here & said:
            found.append(case)
            said |= here
    return found


def with_alternatives(
    cases: Sequence[EditCase], training: Any, seed: int
) -> list[tuple[EditCase, ...]]:
    """Return each case with its `alternatives`: everything that networks are taught with."""
    found = []
    for case in cases:
        others = alternatives(case, cases, training.alternatives, seed)
        found.append((case, *others))
    return found


def alternatives(
    case: EditCase, cases: Sequence[EditCase], count: int, seed: int
) -> list[EditCase]:
    """Return the case with the targets of `count` other cases, so that networks learn to copy and not to remember.

    Which ones depends on the case, the number of cases and the seed alone.
    """
    source = random.Random(f"{seed}/{case.uid}")
    found = []
    for _ in range(count):
        other = source.choice(cases)
        found.append(_with_target(case, other.request.target))
    return found


def _with_target(case: EditCase, target: str) -> EditCase:
    """Return the case as if it taught another answer; what would follow from that is not known."""
    generality = {}
    for column, queries in case.generality.items():
        generality[column] = tuple(replace(query, target=target) for query in queries)
    return replace(
        case,
        request=replace(case.request, target=target),
        generality=generality,
        portability={},
        needs={},
    )


def rate_at(training: Any, step: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine to 0 or one cut, as `schedule` says."""
    rate = float(training.learning_rate)
    warmup: int = training.warmup
    if step < warmup:
        return rate * (step + 1) / warmup
    if training.schedule == "step":
        decay: float = training.decay if step >= training.decay_at else 1.0
        return rate * decay
    rest: int = max(1, training.steps - warmup)
    share = (step - warmup) / rest
    return rate * 0.5 * (1 + math.cos(math.pi * share))


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with `prefix`, without it."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tensor
    return found
